//! A store with one template in it, that the stand-in VM can start sandboxes from.
//!
//! Called by [`crate::daemon`] before each daemon starts. Refuses to need a kernel or a guest.

use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use mica_storage::{
    BlockingFile, FlatWriter, Part, ReadyWhen, SnapshotKind, SnapshotManifest, Store, TemplateSpec,
    run_blocking,
};
use mica_units::{Mebibytes, TemplateName, VcpuCount, frames_of};

/// The name of the only template.
pub const TEMPLATE: &str = "base";

/// Memory and disk of its sandboxes: enough for the stand-in, and quickly made.
pub const MEMORY: Mebibytes = Mebibytes::new(16);
const DISK_BYTES: usize = 1 << 20;

/// A state of the stand-in VM: its magic, and that it was stopped once.
const STANDIN_STATE: [u8; 16] = *b"STANDIN1\x01\0\0\0\0\0\0\0";

/// A template as a build leaves it: its files, and the snapshot that its sandboxes start from, with
/// a state that the stand-in takes for its own.
pub fn make_template(directory: &Path) {
    let store = Store::open(&directory.join("store")).expect("a store");
    let (kernel, disk) = (directory.join("kernel"), directory.join("disk"));
    std::fs::write(&kernel, b"not a kernel: the stand-in VM does not look").expect("a file");
    std::fs::write(&disk, vec![0x5a; DISK_BYTES]).expect("a file");
    let name: TemplateName = TEMPLATE.parse().expect("a name");
    let staging = store.stage(&name, false).expect("a stage");
    staging.copy_part(Part::Kernel, &kernel).expect("the kernel");
    staging.copy_part(Part::Disk, &disk).expect("the disk");
    let spec = TemplateSpec {
        name: name.clone(),
        vcpus: VcpuCount::new(2).expect("a count"),
        memory: MEMORY,
        cmdline: "console=ttyS0".to_owned(),
        envd_version: mica_wire::guest::ENVD_VERSION.to_owned(),
        ready: ReadyWhen::Agent,
        inputs_hash: String::new(),
    };
    let id = staging.commit(&spec).expect("a template").manifest().id.clone();

    let staging = store.stage_snapshot(&id).expect("a stage");
    let (layer, file) = staging.create_layer().expect("a layer");
    let base = FlatWriter::new(BlockingFile::new(file), layer, frames_of(MEMORY));
    let base = run_blocking(base.finish()).expect("a layer");
    staging.clone_disk(&File::open(&disk).expect("the disk")).expect("a disk");
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time");
    let manifest = SnapshotManifest {
        id: id.clone(),
        kind: SnapshotKind::Template,
        name: None,
        template_id: id,
        template_name: name,
        parent: None,
        sandbox: None,
        tenant: None,
        created_unix_ms: u64::try_from(since.as_millis()).expect("a time"),
        vcpus: spec.vcpus,
        memory: spec.memory,
        envd_version: spec.envd_version,
        ready: spec.ready,
        layers: vec![base],
        disk_bytes: u64::try_from(DISK_BYTES).expect("a length"),
        state: STANDIN_STATE.to_vec(),
        record: Vec::new(),
    };
    staging.seal(manifest).expect("a snapshot");
}
