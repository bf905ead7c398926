//! The floor: what each operation of the engine costs as bare system calls, in one process, in one loop.
//!
//! Called by the engine benchmark, to be printed beside the real thing. The same guest, the same bytes
//! and the same promise (what a snapshot wrote is on the device) without processes, jails, sockets,
//! devices and state machines. Copies and writes are as large as they can be, so that the device has as
//! much in flight as it takes. Refuses to run without `/dev/kvm` and a directory on a disk.
//!
//! | operation | is |
//! |---|---|
//! | `restore_pool_hit` | map an image over the memory slot, set two vCPUs and the chips, run to the next byte |
//! | `restore_pool_miss` | the same, and making the shell before it |
//! | `snapshot_*` | read the state, find the pages, copy them, write, sync, rename, sync the directory |
//! | `snapshot_next_1mb` | the same in a chain, where write tracking finds what is new |
//! | `rollback_7mb` | find the pages, drop them, set vCPUs and chips |
//! | `pause` | a snapshot of what the guest itself wrote, which is next to nothing |
//! | `resume` | run to the next byte |
//! | `destroy` | close the vCPUs and the machine, give the memory back |

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mica_numa::process::{Pagemap, Process, RemoteMemory, Wanted};
use mica_numa::userfault::Userfault;
use mica_units::{FrameRun, Mebibytes, PAGE_BYTES, VcpuCount, frames_of};
use mica_vmm::floor::{Guest, Layer, Saved};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags};

use crate::tiny_guest::{Then, vmlinux};

/// Frames of one piece of scattered dirt: 28 KiB, about what a guest writes together.
const PIECE_FRAMES: u32 = 7;
/// Bytes of state that go into a snapshot's file with the pages.
const STATE_BYTES: usize = 16 << 10;

/// What to measure with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where snapshots are written: a directory on the disk in question.
    pub directory: PathBuf,
    /// How often each operation is measured; once more before warms up.
    pub rounds: u32,
    /// Memory of the guest.
    pub memory: Mebibytes,
    /// Its vCPUs.
    pub vcpus: VcpuCount,
}

/// One operation, with each time it took, shortest first.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its name, as in the benchmark's results.
    pub op: &'static str,
    /// How long.
    pub times: Vec<Duration>,
}

impl Measured {
    fn new(op: &'static str, mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self { op, times }
    }

    /// The time that this many of a hundred stay at or below. Zero when there are none.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.times.len() * percent).div_ceil(100).max(1) - 1;
        self.times.get(rank).copied().unwrap_or_default()
    }
}

/// How dirty pages lie.
#[derive(Clone, Copy, Debug)]
enum Dirt {
    /// In pieces, all over memory.
    Scattered,
    /// In one piece.
    Dense,
}

/// Measures every operation.
///
/// # Errors
/// Where the guest does not run here, or the directory cannot be written to.
pub fn measure(config: &Config) -> Result<Vec<Measured>> {
    let base = Base::make(config)?;
    let mut all = base.restores(config)?;
    for (op, mebibytes, dirt) in [
        ("pause", 0, Dirt::Dense),
        ("snapshot_7mb", 7, Dirt::Scattered),
        ("snapshot_7mb_dense", 7, Dirt::Dense),
        ("snapshot_64mb", 64, Dirt::Scattered),
        ("snapshot_256mb", 256, Dirt::Scattered),
    ] {
        let [snapshot, rollback] = base.snapshots(config, op, mebibytes, dirt)?;
        all.push(snapshot);
        if op == "snapshot_7mb" {
            all.push(rollback);
        }
    }
    all.push(base.chain(config)?);
    Ok(all)
}

/// A saved guest: its memory as an image, and the rest.
struct Base {
    image: [Layer; 1],
    saved: Saved,
}

fn shell(config: &Config) -> Result<Guest> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("open /dev/kvm")?;
    Ok(Guest::shell(kvm.into(), config.memory, config.vcpus)?)
}

fn memory_of(guest: &Guest) -> Result<RemoteMemory> {
    let (address, frames) = guest.place();
    RemoteMemory::new(address, frames).context("guest memory lies nowhere")
}

fn pagemap() -> Result<Pagemap> {
    Ok(Process::open(rustix::process::getpid())?.pagemap()?)
}

fn dirty(pagemap: &Pagemap, memory: RemoteMemory, wanted: Wanted) -> Result<Vec<FrameRun>> {
    let all = memory.all().context("no memory")?;
    Ok(pagemap.scan(memory, all, wanted, u32::MAX)?.runs)
}

fn frames_in(runs: &[FrameRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.count())).sum()
}

impl Base {
    /// Boots the guest and takes it and its memory.
    fn make(config: &Config) -> Result<Self> {
        // One byte after the other, for as long as anybody runs it.
        let kernel = memfd("kernel", &vmlinux("", Then::Flood(0)))?;
        let mut guest = shell(config)?;
        guest.boot(kernel)?;
        let saved = guest.save()?;
        let image = memfd("image", &[])?;
        image.set_len(config.memory.to_bytes())?;
        for run in dirty(&pagemap()?, memory_of(&guest)?, Wanted::Anonymous)? {
            let mut bytes = vec![0; usize::try_from(run.bytes())?];
            guest.read(run, &mut bytes)?;
            image.write_all_at(&bytes, run.offset_bytes())?;
        }
        guest.destroy()?;
        Ok(Self { image: [Layer::new(image.into())?], saved })
    }

    fn restore(&self, guest: &mut Guest) -> Result<()> {
        guest.map(&self.image)?;
        guest.set(&self.saved)?;
        Ok(guest.run_to_byte()?)
    }

    /// Restores with and without a shell made before, resumes, ends.
    fn restores(&self, config: &Config) -> Result<Vec<Measured>> {
        let (mut hit, mut miss, mut resume, mut destroy) = (vec![], vec![], vec![], vec![]);
        for round in 0..=config.rounds {
            let begun = Instant::now();
            let mut guest = shell(config)?;
            let made = begun.elapsed();
            let restored = timed(|| self.restore(&mut guest))?;
            let resumed = timed(|| Ok(guest.run_to_byte()?))?;
            let destroyed = timed(|| Ok(guest.destroy()?))?;
            if round > 0 {
                hit.push(restored);
                miss.push(made + restored);
                resume.push(resumed);
                destroy.push(destroyed);
            }
        }
        Ok(vec![
            Measured::new("restore_pool_hit", hit),
            Measured::new("restore_pool_miss", miss),
            Measured::new("resume", resume),
            Measured::new("destroy", destroy),
        ])
    }

    /// Snapshots of a guest that has this much dirt, each rolled back after.
    fn snapshots(
        &self,
        config: &Config,
        op: &'static str,
        mebibytes: u32,
        dirt: Dirt,
    ) -> Result<[Measured; 2]> {
        let mut guest = shell(config)?;
        self.restore(&mut guest)?;
        let (pagemap, memory) = (pagemap()?, memory_of(&guest)?);
        let mut target = Target::new(config, mebibytes)?;
        let (mut snapshots, mut rollbacks) = (vec![], vec![]);
        let mut seed = 0;
        for round in 0..=config.rounds {
            seed += 1;
            let made = make_dirty(&guest, config, mebibytes, dirt, seed)?;
            let mut found = 0;
            let snapshot = timed(|| {
                guest.save()?;
                let runs = dirty(&pagemap, memory, Wanted::Anonymous)?;
                found = frames_in(&runs);
                target.write(&guest, &runs)
            })?;
            // The guest's own few pages come to it.
            target.remove();
            ensure!((made..made + 16).contains(&found), "{found} dirty frames, not {made}");
            let rollback = timed(|| {
                guest.forget(&dirty(&pagemap, memory, Wanted::Anonymous)?)?;
                Ok(guest.set(&self.saved)?)
            })?;
            let left = dirty(&pagemap, memory, Wanted::Anonymous)?;
            ensure!(left.is_empty(), "{} dirty frames after a rollback", frames_in(&left));
            guest.run_to_byte()?;
            if round > 0 {
                snapshots.push(snapshot);
                rollbacks.push(rollback);
            }
        }
        guest.destroy()?;
        Ok([Measured::new(op, snapshots), Measured::new("rollback_7mb", rollbacks)])
    }

    /// Snapshots in a chain: each holds the mebibyte that was written since the one before.
    fn chain(&self, config: &Config) -> Result<Measured> {
        let mut guest = shell(config)?;
        self.restore(&mut guest)?;
        let (pagemap, memory) = (pagemap()?, memory_of(&guest)?);
        let userfault = Userfault::new(Userfault::create()?, memory)?;
        userfault.track(memory.all().context("no memory")?)?;
        let wanted = Wanted::AnonymousWritten { rearm: true };
        make_dirty(&guest, config, 7, Dirt::Scattered, 0)?;
        dirty(&pagemap, memory, wanted)?;
        let mut target = Target::new(config, 1)?;
        let mut times = vec![];
        for round in 0..=config.rounds {
            let made = make_dirty(&guest, config, 1, Dirt::Scattered, round)?;
            let mut found = 0;
            let time = timed(|| {
                guest.save()?;
                let runs = dirty(&pagemap, memory, wanted)?;
                found = frames_in(&runs);
                target.write(&guest, &runs)
            })?;
            target.remove();
            ensure!((made..made + 16).contains(&found), "{found} new frames, not {made}");
            guest.run_to_byte()?;
            if round > 0 {
                times.push(time);
            }
        }
        guest.destroy()?;
        Ok(Measured::new("snapshot_next_1mb", times))
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

fn memfd(name: &str, contents: &[u8]) -> Result<File> {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all_at(contents, 0)?;
    Ok(file)
}

/// Writes bytes that differ from round to round into whole frames, above what the guest uses. How many.
fn make_dirty(
    guest: &Guest,
    config: &Config,
    mebibytes: u32,
    dirt: Dirt,
    seed: u32,
) -> Result<u64> {
    const FIRST: u32 = 4096;
    let frames = frames_of(Mebibytes::new(mebibytes));
    let room = frames_of(config.memory).saturating_sub(FIRST);
    ensure!(room / 2 >= frames, "the guest is too small for {mebibytes} MiB of dirt");
    let pieces = match dirt {
        Dirt::Scattered => frames / PIECE_FRAMES,
        Dirt::Dense => frames.min(1),
    };
    let (each, apart) = match dirt {
        Dirt::Scattered => (PIECE_FRAMES, room / pieces.max(1)),
        Dirt::Dense => (frames, 0),
    };
    let mut page = vec![0u8; usize::try_from(PAGE_BYTES)?];
    for piece in 0..pieces {
        for frame in 0..each {
            let frame = FIRST + piece * apart + frame;
            page.chunks_exact_mut(4)
                .zip(seed.wrapping_mul(frame)..)
                .for_each(|(word, value)| word.copy_from_slice(&value.to_le_bytes()));
            guest.write(u64::from(frame) * PAGE_BYTES, &page)?;
        }
    }
    Ok(u64::from(pieces * each))
}

/// Where snapshots go, with a buffer that holds a whole one.
struct Target {
    directory: PathBuf,
    handle: File,
    buffer: Vec<u8>,
    /// Direct I/O starts at a page.
    skip: usize,
}

impl Target {
    fn new(config: &Config, mebibytes: u32) -> Result<Self> {
        const PAGE: usize = 4096;
        let pages = usize::try_from(Mebibytes::new(mebibytes).to_bytes())? + 16 * PAGE;
        // Every page is touched: a server has its buffers.
        let buffer = vec![1; pages + STATE_BYTES + PAGE];
        let skip = buffer.as_ptr().align_offset(PAGE);
        let directory = config.directory.clone();
        let handle = File::open(&directory).context("open the directory")?;
        Ok(Self { directory, handle, buffer, skip })
    }

    /// Copies runs and writes them, for good.
    fn write(&mut self, guest: &Guest, runs: &[FrameRun]) -> Result<()> {
        let (new, name) = self.names();
        let bytes = self.buffer.get_mut(self.skip..).context("no buffer")?;
        let mut length = 0;
        for run in runs {
            let end = length + usize::try_from(run.bytes())?;
            guest.read(*run, bytes.get_mut(length..end).context("more dirt than made")?)?;
            length = end;
        }
        let bytes = bytes.get(..length + STATE_BYTES).context("no room for the state")?;
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::DIRECT;
        let file = rustix::fs::open(&new, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
        let file = File::from(file);
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes.len() as u64)?;
        file.write_all_at(bytes, 0)?;
        file.sync_data()?;
        rustix::fs::rename(&new, &name)?;
        rustix::fs::fsync(self.handle.as_fd())?;
        Ok(())
    }

    fn names(&self) -> (PathBuf, PathBuf) {
        let name = |end| self.directory.join(format!("floor-{}{end}", std::process::id()));
        (name(".new"), name(""))
    }

    /// Removes what was written: a snapshot replaces no file, so the next one must not either.
    fn remove(&self) {
        let (new, name) = self.names();
        for path in [new, name] {
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => eprintln!("{} stays: {error}", path.display()),
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.remove();
    }
}
