//! `mica-lab push-template`: brings a template's archive into the host and imports it there.
//!
//! The archive is plugged in as a read-only drive, so that only the bytes which the import reads
//! are moved, by the emulated disk and not through the network. The drive is unplugged whatever
//! the import says.

use super::channel::client::Channel;
use super::drives::TOOLS;
use super::progress::say;
use super::qemu::HOT_PLUG_SLOT;
use super::qmp::Qmp;
use super::state::Home;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Instant;

const NODE: &str = "pushed";
const SECTOR: u64 = 512;

/// Returns the exit code of the import. With `force` a template of the same name is replaced.
pub fn push(home: &Home, archive: &Path, force: bool) -> Result<i32> {
    let lab = home.running()?;
    let archive = fs::canonicalize(archive)
        .with_context(|| format!("find the archive {}", archive.display()))?;
    let bytes = fs::metadata(&archive).context("look at the archive")?.len();
    ensure!(
        bytes > 0 && bytes.is_multiple_of(SECTOR),
        "{} is no tar archive: its length is not a multiple of {SECTOR}",
        archive.display()
    );
    let _lock = home.lock()?;
    let started = Instant::now();
    let mut qmp = Qmp::connect(&home.qmp_socket())?;
    plug(&mut qmp, &archive)?;
    let code = import(&lab.channel(), force);
    let unplugged = unplug(&mut qmp);
    let code = code?;
    unplugged?;
    say(&format!("import ended with {code} after {:.1} s", started.elapsed().as_secs_f64()));
    Ok(code)
}

fn plug(qmp: &mut Qmp, archive: &Path) -> Result<()> {
    let file = archive.to_str().context("the archive's path is not UTF-8")?;
    qmp.command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": NODE, "read-only": true,
               "file": {"driver": "file", "filename": file, "read-only": true}}),
    )?;
    let added = qmp.command(
        "device_add",
        json!({"driver": "virtio-blk-pci", "id": NODE, "drive": NODE, "bus": HOT_PLUG_SLOT,
               "serial": NODE}),
    );
    if added.is_err() {
        qmp.command("blockdev-del", json!({"node-name": NODE}))?;
    }
    added.map(drop)
}

fn unplug(qmp: &mut Qmp) -> Result<()> {
    qmp.command("device_del", json!({"id": NODE}))?;
    qmp.wait_event("DEVICE_DELETED", "device", NODE)?;
    qmp.command("blockdev-del", json!({"node-name": NODE})).map(drop)
}

/// The host finds the drive by its serial number, waiting for it to appear.
const IMPORT: &str = r#"
modprobe virtio_blk || exit 1
for attempt in $(seq 100); do
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial" 2>/dev/null)" = pushed ] || continue
        program=$1
        shift
        exec "$program" template import --store /var/lib/mica "$@" "/dev/${disk##*/}"
    done
    sleep 0.1
done
echo "the plugged drive did not appear" >&2
exit 1
"#;

fn import(channel: &Channel, force: bool) -> Result<i32> {
    let program = format!("{TOOLS}/bin/mica");
    let mut argv = ["sh", "-c", IMPORT, "sh", &program].map(str::to_owned).to_vec();
    if force {
        argv.push("--force".to_owned());
    }
    let ready = channel.exec_with_input(&["test", "-x", &program], std::io::empty())?;
    if ready.code != 0 {
        bail!("the host has no {program}; run `mica lab up` with the programs built");
    }
    channel.exec_attached(argv)
}
