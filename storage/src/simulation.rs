//! A simulated file system behind [`crate::crashsafe::Disk`], with faults from one seed.
//!
//! Called by tests only. Files are real, in memory: what the program reads back is what it wrote.
//! Beside them stands a model (`simulation/model.rs`) of what is on the device. When the machine
//! stops, the model is laid out as a new directory, and the store is opened there.
//! `simulation/history.rs` has the histories, `simulation/properties.rs` runs them; `MICA_SEED=N cargo test -p
//! mica-storage replay` runs the one of seed `N` and prints its steps.
//!
//! # The fault model
//!
//! Content of files:
//! - What was written is volatile until the file is synced. A stop keeps or loses each page of an
//!   unsynced write, and each change of length, by a coin of its own, in any combination.
//! - A write that was under way at a stop, or fails, may be torn: any of its sectors of 512 bytes are
//!   there and the others are not.
//! - A sync that fails decides the fate of all unsynced writes at that instant, and a later sync that
//!   succeeds does not bring the lost ones back, although reads still show them.
//!
//! Names:
//! - Making, linking, renaming and removing a name is volatile until its directory is synced. A stop
//!   keeps or loses each of them by a coin of its own. A rename within a directory is atomic.
//! - A file's content and its names are independent: a synced file may have no name after a stop, and
//!   a name that is on the device may stand for a file whose content is not.
//! - Syncing a directory says nothing about the directory's own name in its parent.
//!
//! Operations:
//! - Any may fail, with `EIO` or `ENOSPC`, before it did anything, or (but for syncs) after it did all.
//! - The machine may stop at any of them, before or after it was done. All later ones fail.
//!
//! This is weaker than what XFS, btrfs and ext4 promise, on purpose: all three keep the order of
//! changes of names. What is not modelled: a device that lies about a sync, and content that changes
//! at rest. The checksums find the latter; nothing helps against the former.

mod history;
mod model;
mod properties;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::io::Errno;

use crate::crashsafe::Effect;
use model::Model;

/// A stream of numbers from a seed (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.next() % u64::from(bound.max(1))).unwrap()
    }

    pub(crate) fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// Which syncs are left out: a defect that the properties must find.
/// It is asked with the operation, its path, and what was renamed before.
pub(crate) type Defect = fn(&str, &Path, &[PathBuf]) -> bool;

/// What may go wrong in one history.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    /// One step in how many fails; 0 for none.
    pub(crate) one_in: u32,
    /// The step at which the machine stops by itself.
    pub(crate) stop_at: Option<u64>,
    pub(crate) defect: Option<Defect>,
}

/// The file system.
#[derive(Debug)]
pub(crate) struct Simulation {
    world: Mutex<World>,
}

#[derive(Debug)]
struct World {
    random: Random,
    faults: Faults,
    steps: u64,
    stopped: bool,
    model: Model,
    /// The faults since [`Simulation::watch`].
    injected: Vec<Errno>,
    log: Vec<String>,
    renamed: Vec<PathBuf>,
}

enum Verdict {
    Happens,
    /// The program is told that it happened.
    LeftOut,
    Fails(Errno),
    FailsAfter(Errno),
    StopsBefore,
    StopsAfter,
}

impl World {
    fn verdict(&mut self, operation: &str, path: &Path, effect: &Effect<'_>) -> Verdict {
        let sync = matches!(effect, Effect::SyncFile(_) | Effect::SyncDir(_));
        if self.faults.stop_at == Some(self.steps) {
            return if self.random.coin() { Verdict::StopsBefore } else { Verdict::StopsAfter };
        }
        if self.faults.one_in > 0 && self.random.below(self.faults.one_in) == 0 {
            let errno = if self.random.coin() { Errno::NOSPC } else { Errno::IO };
            self.injected.push(errno);
            let after = !sync && self.random.coin();
            return if after { Verdict::FailsAfter(errno) } else { Verdict::Fails(errno) };
        }
        if sync && self.faults.defect.is_some_and(|defect| defect(operation, path, &self.renamed)) {
            return Verdict::LeftOut;
        }
        Verdict::Happens
    }

    /// What is left of an operation that did not get through.
    fn break_off(&mut self, effect: &Effect<'_>) -> io::Result<()> {
        match effect {
            Effect::Write(file, offset, bytes) => {
                let mut sector = *offset;
                for part in bytes.chunks(512) {
                    if self.random.coin() {
                        file.write_all_at(part, sector)?;
                        self.model.apply(&Effect::Write(file, sector, part))?;
                    }
                    sector += 512;
                }
                Ok(())
            }
            Effect::SyncFile(file) => self.model.fail_sync(file, &mut self.random),
            _ => Ok(()),
        }
    }

    fn stop<T>(&mut self) -> io::Result<T> {
        self.stopped = true;
        Err(io::Error::other("the machine has stopped"))
    }
}

impl Simulation {
    /// One in which `root`, an empty directory, is on the device already.
    pub(crate) fn new(root: &Path, seed: u64, faults: Faults) -> Self {
        let world = World {
            random: Random::new(seed),
            faults,
            steps: 0,
            stopped: false,
            model: Model::new(std::fs::canonicalize(root).unwrap()),
            injected: Vec::new(),
            log: Vec::new(),
            renamed: Vec::new(),
        };
        Self { world: Mutex::new(world) }
    }

    pub(crate) fn step<T>(
        &self,
        operation: &'static str,
        path: &Path,
        effect: &Effect<'_>,
        run: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let mut world = self.world.lock().unwrap();
        if world.stopped {
            return Err(io::Error::other("the machine has stopped"));
        }
        let verdict = world.verdict(operation, path, effect);
        world.steps += 1;
        let number = world.steps;
        let fate = match verdict {
            Verdict::Happens => "",
            Verdict::LeftOut => " LEFT OUT",
            Verdict::Fails(_) => " FAILS",
            Verdict::FailsAfter(_) => " HAPPENS AND FAILS",
            Verdict::StopsBefore => " STOP BEFORE",
            Verdict::StopsAfter => " STOP AFTER",
        };
        world.log.push(format!("{number:4} {operation} {}{fate}", path.display()));
        if let Effect::Rename(_, to) = effect {
            world.renamed.push(to.to_path_buf());
        }
        match verdict {
            Verdict::Happens => {
                let done = run()?;
                world.model.apply(effect)?;
                Ok(done)
            }
            Verdict::LeftOut => run(),
            Verdict::Fails(errno) => {
                world.break_off(effect)?;
                Err(errno.into())
            }
            Verdict::FailsAfter(errno) => {
                run()?;
                world.model.apply(effect)?;
                Err(errno.into())
            }
            Verdict::StopsBefore => {
                world.break_off(effect)?;
                world.stop()
            }
            Verdict::StopsAfter => {
                run()?;
                world.model.apply(effect)?;
                world.stop()
            }
        }
    }

    /// Forgets the faults so far, before an operation.
    pub(crate) fn watch(&self) {
        self.world.lock().unwrap().injected.clear();
    }

    /// The faults since [`Self::watch`].
    pub(crate) fn injected(&self) -> Vec<Errno> {
        self.world.lock().unwrap().injected.clone()
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.world.lock().unwrap().stopped
    }

    pub(crate) fn steps(&self) -> u64 {
        self.world.lock().unwrap().steps
    }

    /// Whether a rename to a path with this end was tried.
    pub(crate) fn tried_rename_to(&self, end: &str) -> bool {
        self.world.lock().unwrap().renamed.iter().any(|path| path.ends_with(end))
    }

    pub(crate) fn note(&self, text: String) {
        self.world.lock().unwrap().log.push(text);
    }

    pub(crate) fn log(&self) -> String {
        self.world.lock().unwrap().log.join("\n")
    }

    /// Cuts the power, and lays out in `into` what is on the device then.
    pub(crate) fn power_cut(&self, into: &Path) {
        let mut world = self.world.lock().unwrap();
        world.stopped = true;
        let World { model, random, .. } = &mut *world;
        model.lay_out(into, random).unwrap();
    }
}
