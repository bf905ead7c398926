//! Histories of snapshots with faults and a power cut, and what must be true after them.
//!
//! Called by tests only. One seed decides everything: the operations, the content, the faults, the
//! step at which the machine stops, and what the device keeps.
//!
//! 1. Every acknowledged snapshot is there after the cut, and restores byte for byte: memory, disk,
//!    state. So is every acknowledged record of a sandbox. What was acknowledged as deleted is gone.
//! 2. An operation that failed, or was cut off, has happened whole or not at all; a snapshot whose
//!    manifest was never renamed is not there.
//! 3. Nothing else lies in the store after the next start.
//! 4. A full disk is told as [`StorageError::NoSpace`], and nothing that was there is harmed.
//! 5. A protocol with any one of its syncs left out breaks the first (the canaries).

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use mica_units::{FrameRun, SandboxId};
use rustix::io::Errno;

use super::{Defect, Faults, Random, Simulation};
use crate::crashsafe::Disk;
use crate::flatten::{FlattenLimits, Flattened};
use crate::layer::{Layer, LayerInfo};
use crate::snapshot::tests::{FRAMES, manifest, memory_of};
use crate::snapshot::{SnapshotKind, SnapshotManifest};
use crate::testing::{TempDir, names_in, put};
use crate::writer::{BlockingFile, FlatWriter, PackedWriter, run_blocking};
use crate::{Result, StorageError, Store};

const DISK_BYTES: usize = 8192;
/// Steps of a history without faults: where stops are drawn from.
const STEPS: u32 = 300;

#[derive(Clone, Debug, PartialEq)]
struct Content {
    memory: Vec<u8>,
    disk: Option<Vec<u8>>,
    state: Vec<u8>,
}

/// What is known of something from what its operation answered.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    There,
    /// The operation failed, or was cut off, when it may have happened.
    Perhaps,
}

struct History {
    random: Random,
    dir: TempDir,
    simulation: Arc<Simulation>,
    store: Store,
    snapshots: BTreeMap<String, (Known, Content)>,
    /// What a sandbox's record may be.
    records: BTreeMap<SandboxId, Vec<Option<Vec<u8>>>>,
    /// Templates' names, and which ids they may point at.
    templates: BTreeMap<&'static str, Vec<Option<String>>>,
    full: u32,
}

impl History {
    fn new(seed: u64, faults: Faults) -> Option<Self> {
        let dir = TempDir::in_memory();
        let simulation = Arc::new(Simulation::new(dir.path(), seed ^ 0x5eed, faults));
        let disk = Disk { simulation: Some(Arc::clone(&simulation)), ..Disk::default() };
        // A stop while the store is made leaves nothing to look at.
        let store = Store::open_on(dir.path(), disk).ok()?;
        Some(Self {
            random: Random::new(seed),
            dir,
            simulation,
            store,
            snapshots: BTreeMap::new(),
            records: BTreeMap::new(),
            templates: BTreeMap::new(),
            full: 0,
        })
    }

    fn run(&mut self) {
        for number in 0..14 {
            self.simulation.watch();
            let choice = self.random.below(12);
            self.simulation.note(format!("operation {number}, choice {choice}"));
            match choice {
                0..=1 => self.make(None),
                2..=5 => self.make_child(),
                6 => self.delete(),
                7..=8 => self.flatten(),
                9 => self.record(),
                10 => self.template(),
                _ => self.working_set(),
            }
            if self.simulation.has_stopped() {
                return;
            }
            // Whatever failed, what is there is whole, for those who read on.
            if !self.simulation.injected().is_empty() {
                self.check(&self.store, "while it runs");
            }
        }
    }

    /// Judges what an operation answered: a failure must be the one that was injected.
    fn judge<T>(&mut self, result: Result<T>) -> Option<T> {
        let injected = self.simulation.injected();
        match result {
            Ok(done) => Some(done),
            Err(error) => {
                // Some faults are only logged, so there may have been another kind before.
                let no_space = matches!(error, StorageError::NoSpace { .. });
                let explained = injected.iter().any(|e| (*e == Errno::NOSPC) == no_space);
                assert!(
                    self.simulation.has_stopped() || explained,
                    "{error} ({:?}) after {injected:?}",
                    std::error::Error::source(&error)
                );
                self.full += u32::from(no_space);
                None
            }
        }
    }

    fn id(&mut self) -> String {
        (0..20).map(|_| char::from(b'a' + u8::try_from(self.random.below(26)).unwrap())).collect()
    }

    fn pick(&mut self) -> Option<String> {
        let ids: Vec<&String> = self.snapshots.keys().collect();
        let at = self.random.below(u32::try_from(ids.len()).unwrap());
        ids.get(at as usize).map(|id| (*id).clone())
    }

    /// A snapshot over a parent, or of its own.
    fn make(&mut self, parent: Option<&str>) {
        let id = self.id();
        let plan = Plan::draw(&mut self.random);
        let parent = match parent.map(|id| self.store.open_snapshot(id)).transpose() {
            Ok(parent) => parent.flatten(),
            Err(error) => panic!("a snapshot cannot be read: {error}"),
        };
        let below = parent.map(|parent| parent.layers).unwrap_or_default();
        let content = plan.content(&below);
        let made = self.store_snapshot(&id, &below, &plan, &content);
        self.simulation.note(format!("made {id}: {}", made.is_ok()));
        match self.judge(made) {
            Some(()) => drop(self.snapshots.insert(id, (Known::There, content))),
            None if self.simulation.tried_rename_to(&format!("{id}/manifest")) => {
                self.snapshots.insert(id, (Known::Perhaps, content));
            }
            None => {}
        }
    }

    fn make_child(&mut self) {
        match self.pick() {
            // Only on what is there for certain; the others are for the check alone.
            Some(parent) if self.snapshots[&parent].0 == Known::There => self.make(Some(&parent)),
            _ => self.make(None),
        }
    }

    fn store_snapshot(
        &self,
        id: &str,
        below: &[Layer],
        plan: &Plan,
        content: &Content,
    ) -> Result<()> {
        let staging = self.store.stage_snapshot(id)?;
        staging.link_layers(below)?;
        let (layer, file) = staging.create_layer()?;
        let path = staging.layer_path(layer);
        let file = BlockingFile::on(self.store.disk.clone(), file, path);
        let info = if below.is_empty() {
            let mut writer = FlatWriter::new(file, layer, FRAMES);
            run_blocking(async {
                writer.push(&content.memory).await?;
                writer.finish().await
            })
        } else {
            run_blocking(plan.write(PackedWriter::new(file, layer, FRAMES)))
        };
        let mut layers: Vec<LayerInfo> = below.iter().map(|layer| *layer.info()).collect();
        layers.push(info?);
        let mut manifest =
            SnapshotManifest { state: content.state.clone(), ..manifest(id, layers) };
        if let Some(disk) = &content.disk {
            let path = self.dir.join("guest-disk");
            std::fs::write(&path, disk).unwrap();
            staging.clone_disk(&File::open(&path).unwrap())?;
            manifest.disk_bytes = disk.len() as u64;
        }
        let jobs = staging.prepare(&manifest)?;
        // In whatever order.
        let jobs = jobs.into_iter().rev().map(crate::SyncJob::run);
        staging.commit(manifest, jobs.collect::<Result<_>>()?).map(drop)
    }

    fn delete(&mut self) {
        let Some(id) = self.pick() else { return };
        let deleted = self.store.delete_snapshot(&id);
        self.simulation.note(format!("deleted {id}: {deleted:?}"));
        if self.judge(deleted).is_some() {
            self.snapshots.remove(&id);
        } else if let Some((known, _)) = self.snapshots.get_mut(&id) {
            *known = Known::Perhaps;
        }
    }

    fn flatten(&mut self) {
        let Some(id) = self.pick() else { return };
        let percent = 20 + self.random.below(60);
        let limits = FlattenLimits { layers_max: 2, runs_max: 40, flat_percent: percent };
        let done = self.store.flatten(&id, &limits);
        self.simulation.note(format!("flattened {id}: {done:?}"));
        let known = self.snapshots[&id].0;
        if let Some(Flattened::Gone) = self.judge(done) {
            assert_eq!(known, Known::Perhaps, "{id} is gone");
        }
    }

    fn working_set(&mut self) {
        let Some(id) = self.pick() else { return };
        let Some(snapshot) = self.store.find_snapshot(&id).unwrap() else { return };
        let runs = [FrameRun::new(self.random.below(100), 9).unwrap()];
        let written = self.store.write_working_set(&snapshot, &runs);
        self.judge(written);
    }

    fn record(&mut self) {
        let sandbox = SandboxId::from_random([self.random.below(2).to_le_bytes()[0]; 20]);
        if !self.records.contains_key(&sandbox) {
            let made = self.store.create_sandbox(&sandbox, None);
            if self.judge(made).is_none() {
                return;
            }
            self.records.insert(sandbox, vec![None]);
        }
        let record = self.id().into_bytes();
        let written = self.store.write_record(&sandbox, &record, true);
        let written = self.judge(written).is_some();
        let may_be = self.records.get_mut(&sandbox).unwrap();
        if written {
            may_be.clear();
        }
        may_be.push(Some(record));
    }

    /// A template with a running snapshot, in place of the one before; or its deletion.
    fn template(&mut self) {
        let name = if self.random.coin() { "one" } else { "two" };
        let known = self.templates.entry(name).or_insert_with(|| vec![None]).clone();
        let only = |this: &mut Self, target: Option<String>, certain: bool| {
            let may_be = this.templates.get_mut(name).unwrap();
            if certain {
                may_be.clear();
            }
            may_be.push(target);
        };
        // The running snapshot goes with its template, so it is not certain once that may have gone.
        for id in known.iter().flatten() {
            if let Some((known, _)) = self.snapshots.get_mut(id) {
                *known = Known::Perhaps;
            }
        }
        let forget = |this: &mut Self| {
            for id in known.iter().flatten() {
                this.snapshots.remove(id);
            }
        };
        if self.random.below(3) == 0 {
            let deleted = self.store.delete_template(&name.parse().unwrap());
            if self.judge(deleted).is_some() {
                forget(self);
                only(self, None, true);
            } else {
                only(self, None, false);
            }
            return;
        }
        let made = put(&self.store, name, 1, true);
        let Some(template) = self.judge(made) else {
            // The id is not known, so neither is what the name points at.
            self.templates.get_mut(name).unwrap().push(Some(String::new()));
            return;
        };
        forget(self);
        let id = template.manifest().id.clone();
        only(self, Some(id.clone()), true);
        let content =
            Content { memory: vec![0; FRAMES as usize * 4096], disk: None, state: vec![] };
        let made = self.store_running(&id);
        match self.judge(made) {
            Some(()) => drop(self.snapshots.insert(id, (Known::There, content))),
            None => drop(self.snapshots.insert(id, (Known::Perhaps, content))),
        }
    }

    fn store_running(&self, id: &str) -> Result<()> {
        let staging = self.store.stage_snapshot(id)?;
        let (layer, file) = staging.create_layer()?;
        let path = staging.layer_path(layer);
        let file = BlockingFile::on(self.store.disk.clone(), file, path);
        let info = run_blocking(FlatWriter::new(file, layer, FRAMES).finish())?;
        let kind = SnapshotKind::Template;
        let (template_id, state) = (id.to_owned(), Vec::new());
        let manifest = SnapshotManifest { kind, template_id, state, ..manifest(id, vec![info]) };
        staging.seal(manifest).map(drop)
    }

    /// Everything that must be true of a store at any time.
    fn check(&self, store: &Store, when: &str) {
        for (id, (known, content)) in &self.snapshots {
            let opened = store.open_snapshot(id);
            let opened = opened.unwrap_or_else(|e| panic!("{when}: {id} cannot be read: {e}"));
            let Some(open) = opened else {
                assert_eq!(*known, Known::Perhaps, "{when}: {id} is lost");
                continue;
            };
            for layer in &open.layers {
                layer.verify().unwrap_or_else(|e| panic!("{when}: {id} is damaged: {e}"));
            }
            assert!(
                memory_of(&open.layers) == content.memory,
                "{when}: the memory of {id} differs"
            );
            let disk = open.disk.map(|disk| {
                let mut bytes = vec![0; DISK_BYTES];
                std::os::unix::fs::FileExt::read_exact_at(&*disk, &mut bytes, 0).unwrap();
                bytes
            });
            assert!(disk == content.disk, "{when}: the disk of {id} differs");
            assert!(open.snapshot.manifest().state == content.state, "{when}: its state differs");
        }
        let records: BTreeMap<SandboxId, Vec<u8>> = store.records().unwrap().into_iter().collect();
        for (sandbox, may_be) in &self.records {
            let found = records.get(sandbox).cloned();
            assert!(may_be.contains(&found), "{when}: the record of {sandbox} is {found:?}");
        }
    }

    /// Cuts the power, starts again on what the device kept, and looks at everything.
    fn cut_and_check(&self) {
        let after = TempDir::in_memory();
        self.simulation.power_cut(after.path());
        let store = Store::open(after.path()).unwrap();
        self.check(&store, "after the cut");
        let all = store.select_snapshots(|manifest| Some(manifest.clone())).unwrap();
        for found in &all {
            let id = &found.id;
            let template = found.kind == SnapshotKind::Template;
            let known = self.snapshots.contains_key(id);
            assert!(known || (template && self.may_be_a_template(id)), "{id} came from nowhere");
            let mut expected: Vec<String> =
                found.layers.iter().map(|info| info.id.file_name()).collect();
            expected.push("manifest".to_owned());
            expected.extend(found.has_disk().then(|| "disk".to_owned()));
            expected.sort();
            let mut names = names_in(&after.join("snapshots").join(id));
            names.retain(|name| name != "working-set");
            assert_eq!(names, expected, "rubbish beside {id}");
        }
        let ids: Vec<String> = all.into_iter().map(|found| found.id).collect();
        assert_eq!(names_in(&after.join("snapshots")), ids, "rubbish was left");
        for (name, may_be) in &self.templates {
            let found = store.find_template(name).unwrap().map(|t| t.manifest().id.clone());
            let unknown = may_be.contains(&Some(String::new()));
            assert!(unknown || may_be.contains(&found), "template {name} is {found:?}");
        }
    }

    fn may_be_a_template(&self, id: &str) -> bool {
        self.templates.values().flatten().flatten().any(|known| known == id)
    }
}

/// What a guest wrote.
struct Plan {
    writes: Vec<(FrameRun, u8)>,
    disk: Option<Vec<u8>>,
    state: Vec<u8>,
}

impl Plan {
    fn draw(random: &mut Random) -> Self {
        let mut writes = Vec::new();
        let mut at = 0;
        for _ in 0..=random.below(4) {
            let first = at + random.below(60);
            let count = 1 + random.below(30);
            if first + count > FRAMES {
                break;
            }
            writes.push((FrameRun::new(first, count).unwrap(), random.next().to_le_bytes()[0]));
            at = first + count;
        }
        let byte = random.next().to_le_bytes()[0];
        let disk = random.coin().then(|| vec![byte; DISK_BYTES]);
        let state = random.next().to_le_bytes().repeat(40);
        Self { writes, disk, state }
    }

    fn content(&self, below: &[Layer]) -> Content {
        let mut memory = memory_of(below);
        for (run, byte) in &self.writes {
            memory[run.first() as usize * 4096..run.end() as usize * 4096].fill(*byte);
        }
        Content { memory, disk: self.disk.clone(), state: self.state.clone() }
    }

    async fn write(&self, mut writer: PackedWriter<BlockingFile>) -> Result<LayerInfo> {
        writer.allocate(FRAMES, 10).await?;
        for (run, byte) in &self.writes {
            let mut chunk = writer.reserve().await?;
            chunk.as_mut().fill(*byte);
            writer.push(&[*run], chunk).await?;
        }
        writer.finish().await
    }
}

/// Runs the history of one seed.
pub(super) fn history(seed: u64, defect: Option<Defect>) -> Ended {
    let mut random = Random::new(!seed);
    // A third without faults, and two thirds stop somewhere; all end with a power cut.
    let one_in = [0, 40, 120][random.below(3) as usize];
    let stop_at = (random.below(3) > 0).then(|| u64::from(random.below(STEPS)));
    crate::id::seeded::set(Some(seed));
    let Some(mut history) = History::new(seed, Faults { one_in, stop_at, defect }) else {
        return Ended { full: 0, stopped: true, log: String::new() };
    };
    let simulation = Arc::clone(&history.simulation);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        history.run();
        history.cut_and_check();
    }));
    if let Err(panic) = outcome {
        if defect.is_none() {
            eprintln!("run it again: MICA_SEED={seed} cargo test -p mica-storage replay");
        }
        std::panic::resume_unwind(panic);
    }
    let stopped = stop_at.is_some_and(|stop| stop < simulation.steps());
    let root = history.store.root().display().to_string();
    Ended { full: history.full, stopped, log: simulation.log().replace(&root, "") }
}

/// How a history ended.
pub(super) struct Ended {
    /// How often it met a full disk.
    pub(super) full: u32,
    /// Whether the machine stopped by itself.
    pub(super) stopped: bool,
    /// Its steps.
    pub(super) log: String,
}
