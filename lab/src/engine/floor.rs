//! The floor: what each operation of the engine costs as bare system calls, in one process, in one loop.
//!
//! Called by the engine benchmark, one round at a time between rounds of the real thing. The same guest, the
//! same bytes and the same promise (what a snapshot wrote is on the device) without processes, jails,
//! sockets, devices and state machines. Copies and writes are as large as they can be, so that the device
//! has as much in flight as it takes. Refuses to run without `/dev/kvm` and a directory on a disk.
//!
//! | operation | is |
//! |---|---|
//! | restore, of a shell made before | map an image over the memory slot, set two vCPUs and the chips, run to the next byte |
//! | restore, of none | the same, and making the shell before it |
//! | snapshot | read the state, find the pages, copy them, write, sync, rename, sync the directory |
//! | snapshot in a chain | the same, where write tracking finds what is new |
//! | rollback | find the pages, drop them, set vCPUs and chips |
//! | resume | run to the next byte |
//! | destroy | close the vCPUs and the machine, give the memory back |

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mica_numa::process::{Pagemap, Process, RemoteMemory, Wanted};
use mica_numa::userfault::Userfault;
use mica_units::{FrameRun, Mebibytes, PAGE_BYTES, VcpuCount};
use mica_vmm::floor::{Guest, Layer, Saved};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags};

use super::dirt;
use crate::tiny_guest::{Then, vmlinux};

/// Bytes of state that go into a snapshot's file with the pages.
const STATE_BYTES: usize = 16 << 10;
/// Most frames that the guest's own code may have written between two looks.
const OWN_FRAMES_MAX: u64 = 16;

/// What to measure with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where snapshots are written: a directory on the disk in question.
    pub directory: PathBuf,
    /// Memory of the guest.
    pub memory: Mebibytes,
    /// Its vCPUs.
    pub vcpus: VcpuCount,
}

/// A saved guest, its memory as an image: what restores start from.
#[derive(Debug)]
pub struct Floor {
    config: Config,
    image: [Layer; 1],
    saved: Saved,
}

/// The times of one life: a guest is restored, goes on, ends.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// The restore, with a shell that was made before.
    pub hit: Duration,
    /// The restore, with the making of the shell.
    pub miss: Duration,
    /// To the guest's next byte.
    pub resume: Duration,
    /// Taking it down.
    pub destroy: Duration,
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

impl Floor {
    /// Boots the guest and takes it and its memory.
    ///
    /// # Errors
    /// Where the guest does not run here.
    pub fn make(config: Config) -> Result<Self> {
        // One byte after the other, for as long as anybody runs it.
        let kernel = memfd("kernel", &vmlinux("", Then::Flood(0)))?;
        let mut guest = shell(&config)?;
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
        Ok(Self { config, image: [Layer::new(image.into())?], saved })
    }

    fn restore(&self, guest: &mut Guest) -> Result<()> {
        guest.map(&self.image)?;
        guest.set(&self.saved)?;
        Ok(guest.run_to_byte()?)
    }

    /// Makes a shell, restores into it, resumes, ends.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn life(&self) -> Result<Life> {
        let begun = Instant::now();
        let mut guest = shell(&self.config)?;
        let made = begun.elapsed();
        let hit = timed(|| self.restore(&mut guest))?;
        let resume = timed(|| Ok(guest.run_to_byte()?))?;
        let destroy = timed(|| Ok(guest.destroy()?))?;
        Ok(Life { hit, miss: made + hit, resume, destroy })
    }

    /// A guest to make snapshots of that write these runs.
    ///
    /// # Errors
    /// When KVM refuses, or the directory cannot be opened.
    pub fn guest(&self, runs: Vec<FrameRun>) -> Result<Dirtied<'_>> {
        let mut guest = shell(&self.config)?;
        self.restore(&mut guest)?;
        let memory = memory_of(&guest)?;
        let target = Target::new(&self.config.directory, frames_in(&runs) + OWN_FRAMES_MAX)?;
        let pagemap = pagemap()?;
        Ok(Dirtied { floor: self, guest, pagemap, memory, target, runs, tracked: None, round: 0 })
    }
}

/// A guest that is dirtied, snapshot and rolled back, again and again.
#[derive(Debug)]
pub struct Dirtied<'a> {
    floor: &'a Floor,
    guest: Guest,
    pagemap: Pagemap,
    memory: RemoteMemory,
    target: Target,
    runs: Vec<FrameRun>,
    /// Whether writes are tracked, so that only what is new is found.
    tracked: Option<Userfault>,
    round: u32,
}

impl Dirtied<'_> {
    /// From now on finds only what was written since the snapshot before.
    ///
    /// # Errors
    /// When the kernel does not track writes.
    pub fn track(&mut self) -> Result<()> {
        let userfault = Userfault::new(Userfault::create()?, self.memory)?;
        userfault.track(self.memory.all().context("no memory")?)?;
        self.tracked = Some(userfault);
        self.find().map(drop)
    }

    fn find(&self) -> Result<Vec<FrameRun>> {
        let wanted = match self.tracked {
            Some(_) => Wanted::AnonymousWritten { rearm: true },
            None => Wanted::Anonymous,
        };
        dirty(&self.pagemap, self.memory, wanted)
    }

    /// Dirties the runs with bytes that no round had before, and makes a snapshot.
    ///
    /// # Errors
    /// When KVM or the disk refuses, or the wrong pages were found.
    pub fn snapshot(&mut self) -> Result<Duration> {
        self.round += 1;
        for run in &self.runs {
            self.guest.write(run.offset_bytes(), &dirt::bytes(*run, self.round))?;
        }
        let made = frames_in(&self.runs);
        let begun = Instant::now();
        self.guest.save()?;
        let runs = self.find()?;
        self.target.write(&self.guest, &runs)?;
        let took = begun.elapsed();
        let found = frames_in(&runs);
        // The guest's own few pages come to it.
        ensure!(
            (made..=made + OWN_FRAMES_MAX).contains(&found),
            "{found} dirty frames, not {made}"
        );
        self.guest.run_to_byte()?;
        Ok(took)
    }

    /// Puts the guest back to what it was restored from.
    ///
    /// # Errors
    /// When KVM refuses, or something dirty is left.
    pub fn rollback(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.guest.forget(&dirty(&self.pagemap, self.memory, Wanted::Anonymous)?)?;
        self.guest.set(&self.floor.saved)?;
        let took = begun.elapsed();
        let left = frames_in(&dirty(&self.pagemap, self.memory, Wanted::Anonymous)?);
        ensure!(left == 0, "{left} dirty frames after a rollback");
        self.guest.run_to_byte()?;
        Ok(took)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When its memory cannot be given back.
    pub fn end(self) -> Result<()> {
        Ok(self.guest.destroy()?)
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

/// Where snapshots go, with a buffer that holds a whole one.
#[derive(Debug)]
struct Target {
    directory: PathBuf,
    handle: File,
    buffer: Vec<u8>,
    /// Direct I/O starts at a page.
    skip: usize,
}

impl Target {
    fn new(directory: &Path, frames: u64) -> Result<Self> {
        let page = usize::try_from(PAGE_BYTES)?;
        let pages = usize::try_from(frames * PAGE_BYTES)?;
        // Every page is touched: a server has its buffers.
        let buffer = vec![1; pages + STATE_BYTES + page];
        let skip = buffer.as_ptr().align_offset(page);
        let handle = File::open(directory).context("open the directory")?;
        Ok(Self { directory: directory.to_owned(), handle, buffer, skip })
    }

    /// Copies runs and writes them, for good.
    fn write(&mut self, guest: &Guest, runs: &[FrameRun]) -> Result<()> {
        let bytes = self.buffer.get_mut(self.skip..).context("no buffer")?;
        let mut length = 0;
        for run in runs {
            let end = length + usize::try_from(run.bytes())?;
            guest.read(*run, bytes.get_mut(length..end).context("more dirt than made")?)?;
            length = end;
        }
        let bytes = bytes.get(..length + STATE_BYTES).context("no room for the state")?;
        let (new, name) = (self.directory.join("floor.new"), self.directory.join("floor"));
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
}

impl Drop for Target {
    fn drop(&mut self) {
        for name in ["floor.new", "floor"] {
            remove(&self.directory.join(name));
        }
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => eprintln!("{} stays: {error}", path.display()),
    }
}
