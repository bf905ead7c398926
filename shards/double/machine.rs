//! The memory, disk and state of the pretended guest, treated as a VM process treats them.
//!
//! Called by `main` for commands and by `guest` for what the guest does itself. What a plan maps is put
//! into a file that lies under the memory as a private mapping: pages that the guest wrote are its own,
//! all others show the file, exactly as with mapped layers. Refuses a plan or a state out of form, by
//! ending.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use mica_numa::arena::Mapping;
use mica_units::{FrameRun, Mebibytes, PAGE_BYTES, frames_of};
use mica_wire::vm::plan::{self, Entry, Source};
use mica_wire::vm::{BootConfig, Event, FdRole, Phase, RestoreConfig};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

const PAGE: usize = 4096;

/// A saved state: magic, register, times it was frozen, and a tail that makes it longer than a page.
const MAGIC: [u8; 8] = *b"MDOUBLE1";
const STATE_BYTES: usize = 5000;

/// Frames that a kernel is loaded to.
const BOOTED: std::ops::Range<u64> = 2000..2016;

/// Pages that are copied at a time.
const PIECE: usize = 1 << 20;

pub struct Machine {
    inner: Mutex<Inner>,
    moved: Condvar,
    address: u64,
}

pub struct Inner {
    phase: Phase,
    memory: Mapping,
    /// What is mapped.
    under: File,
    frames: u32,
    disk: Option<File>,
    pub register: u64,
    /// What the guest wrote to its disk, and did not sync.
    pub unwritten: Option<Vec<u8>>,
    freezes: u64,
    /// Frames that the guest wrote since the last freeze, a bit each, for a shard that asks for it.
    log: Option<Vec<u8>>,
    /// What the first layer that it was given is called.
    pub base: String,
}

impl Machine {
    pub fn new(size: Mebibytes, log_writes: bool) -> Arc<Self> {
        let under = memfd_create("double", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&under, size.to_bytes()).unwrap();
        let memory = Mapping::private(&under, size.to_bytes()).unwrap();
        let (address, frames) = (memory.address(), frames_of(size));
        let inner = Inner {
            phase: Phase::Idle,
            memory,
            under: under.into(),
            frames,
            disk: None,
            register: 0,
            unwritten: None,
            freezes: 0,
            log: log_writes.then(|| vec![0; frames.div_ceil(8) as usize]),
            base: String::new(),
        };
        Arc::new(Self { inner: Mutex::new(inner), moved: Condvar::new(), address })
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// That a command comes in turn: only a VM that stands still takes it.
    pub fn expect_standing(&self) {
        assert_ne!(self.phase(), Phase::Running, "a command that is not for a VM that runs");
    }

    pub fn go_on(&self) {
        self.lock().phase = Phase::Running;
        self.moved.notify_all();
    }

    /// Does something as the guest, once it runs.
    pub fn as_guest<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        while inner.phase != Phase::Running {
            inner = self.moved.wait(inner).unwrap();
        }
        act(&mut inner)
    }

    pub fn freeze(&self, exchange: &File) -> Event {
        let mut inner = self.lock();
        assert_eq!(inner.phase, Phase::Running, "Freeze");
        inner.phase = Phase::Frozen;
        inner.freezes += 1;
        let state = encode(inner.register, inner.freezes);
        exchange.write_all_at(&state, 0).unwrap();
        let log_bytes = inner.log.as_mut().map_or(0, |log| {
            let at = (state.len() as u64).next_multiple_of(PAGE_BYTES);
            exchange.write_all_at(log, at).unwrap();
            log.fill(0);
            log.len() as u64
        });
        Event::Frozen { state_bytes: state.len() as u64, log_bytes }
    }

    /// A boot: memory is empty, and what is remembered is that there was one.
    pub fn boot(&self, config: &BootConfig, fds: Vec<OwnedFd>) {
        let mut inner = self.lock();
        assert_eq!(inner.phase, Phase::Idle, "Boot");
        assert_eq!(config.fds.len(), fds.len());
        assert!(!config.disk_read_only);
        for (role, fd) in config.fds.iter().zip(fds) {
            match role {
                FdRole::Disk => inner.disk = Some(fd.into()),
                FdRole::Kernel => {
                    let mut start = [0; 8];
                    File::from(fd).read_exact_at(&mut start, 0).unwrap();
                    assert_eq!(&start, b"template", "the kernel of a template");
                }
                FdRole::Initramfs => {}
                other => panic!("Boot brings {other:?}"),
            }
        }
        inner.base = format!("booted with {}", config.cmdline);
        // What a VM process loads is in no log: it is not the guest that writes it.
        for frame in BOOTED {
            inner.memory.write(frame * PAGE_BYTES, &[0xb0; PAGE]).unwrap();
        }
    }

    pub fn restore(&self, config: &RestoreConfig, fds: Vec<OwnedFd>, exchange: &File) {
        let mut inner = self.lock();
        assert_eq!(config.fds.len(), fds.len());
        assert_ne!(config.generation, [0; 16]);
        let mut layers = Vec::new();
        for (role, fd) in config.fds.iter().zip(fds) {
            match role {
                FdRole::Disk => {
                    assert_eq!(inner.phase, Phase::Idle, "a frozen VM keeps its disk");
                    inner.disk = Some(fd.into());
                }
                FdRole::Layer => layers.push(File::from(fd)),
                other => panic!("Restore brings {other:?}"),
            }
        }
        if let Some(base) = layers.first() {
            let link = format!("/proc/self/fd/{}", base.as_raw_fd());
            inner.base = std::fs::read_link(link).unwrap().to_string_lossy().into_owned();
        }
        let plan = read_part(exchange, 0, config.plan_bytes);
        let state_at = config.plan_bytes.next_multiple_of(PAGE_BYTES);
        let state = read_part(exchange, state_at, config.state_bytes);
        for entry in plan::decode(&plan, inner.frames, layers.len()).unwrap() {
            inner.carry_out(entry, &layers);
        }
        (inner.register, inner.freezes) = decode(&state);
    }
}

impl Inner {
    fn carry_out(&mut self, entry: Entry, layers: &[File]) {
        let Entry { run, source } = entry;
        let (at, bytes) = (run.offset_bytes(), run.bytes());
        match source {
            Source::Map { layer, page } => {
                self.punch(run);
                let put = |offset, piece: &[u8]| self.under.write_all_at(piece, offset).unwrap();
                copy(&layers[usize::from(layer)], page, at, bytes, put);
                self.memory.discard(at, bytes).unwrap();
            }
            Source::Copy { layer, page } => {
                let put = |offset, piece: &[u8]| self.memory.write(offset, piece).unwrap();
                // Zeros count too: something else may lie there.
                self.memory.write(at, &vec![0; usize::try_from(bytes).unwrap()]).unwrap();
                copy(&layers[usize::from(layer)], page, at, bytes, put);
            }
            Source::Drop => self.memory.discard(at, bytes).unwrap(),
            Source::Zero => {
                self.punch(run);
                self.memory.discard(at, bytes).unwrap();
            }
        }
    }

    fn punch(&self, run: FrameRun) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.under, flags, run.offset_bytes(), run.bytes()).unwrap();
    }

    /// Fills pages with a byte.
    pub fn fill(&mut self, run: FrameRun, byte: u8) {
        for frame in run.first()..run.end() {
            self.memory.write(u64::from(frame) * PAGE_BYTES, &[byte; PAGE]).unwrap();
            if let Some(log) = &mut self.log {
                log[frame as usize / 8] |= 1 << (frame % 8);
            }
        }
    }

    /// The byte that each page is full of; `None` for a page of several.
    pub fn look(&self, run: FrameRun) -> Vec<Option<u8>> {
        let mut page = [0; PAGE];
        let mut look = |frame: u32| {
            self.memory.read(u64::from(frame) * PAGE_BYTES, &mut page).unwrap();
            page.iter().all(|byte| *byte == page[0]).then_some(page[0])
        };
        (run.first()..run.end()).map(&mut look).collect()
    }

    /// What a balloon does with pages that the guest reports free.
    pub fn forget(&mut self, run: FrameRun) {
        self.memory.discard(run.offset_bytes(), run.bytes()).unwrap();
    }

    pub fn frames(&self) -> u32 {
        self.frames
    }

    pub fn disk(&self) -> &File {
        self.disk.as_ref().unwrap()
    }
}

/// Copies pages of a layer, but for pieces that are all zero.
fn copy(layer: &File, page: u32, at: u64, bytes: u64, mut put: impl FnMut(u64, &[u8])) {
    let from = u64::from(page) * PAGE_BYTES;
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    while done < bytes {
        let length = PIECE.min(usize::try_from(bytes - done).unwrap());
        layer.read_exact_at(&mut piece[..length], from + done).unwrap();
        if piece[..length].iter().any(|byte| *byte != 0) {
            put(at + done, &piece[..length]);
        }
        done += length as u64;
    }
}

fn encode(register: u64, freezes: u64) -> Vec<u8> {
    let mut state = MAGIC.to_vec();
    state.extend_from_slice(&register.to_le_bytes());
    state.extend_from_slice(&freezes.to_le_bytes());
    let tail = register.to_le_bytes()[0];
    state.resize(STATE_BYTES, tail);
    state
}

fn decode(state: &[u8]) -> (u64, u64) {
    let word = |at: usize| u64::from_le_bytes(state[at..at + 8].try_into().unwrap());
    let (register, freezes) = (word(8), word(16));
    assert_eq!(state, encode(register, freezes), "a state that nobody saved");
    (register, freezes)
}

fn read_part(exchange: &File, at: u64, bytes: u64) -> Vec<u8> {
    let mut part = vec![0; usize::try_from(bytes).unwrap()];
    exchange.read_exact_at(&mut part, at).unwrap();
    part
}

/// Writes rising numbers over pages, one page at a time in their order, as long as the guest runs.
pub fn churn(machine: &Arc<Machine>, run: FrameRun) {
    let machine = Arc::clone(machine);
    std::thread::spawn(move || {
        for number in (1..=250).cycle() {
            for frame in run.first()..run.end() {
                let page = FrameRun::new(frame, 1).unwrap();
                machine.as_guest(|guest| guest.fill(page, number));
                std::thread::sleep(Duration::from_micros(1));
            }
        }
    });
}
