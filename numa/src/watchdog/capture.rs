//! The clock of another thread, and its stack, which that thread writes down itself in a signal handler.
//!
//! Called by the watchdog. The handler stores to atomics and walks its own stack, and does nothing else:
//! no allocation, no lock, no formatting. Walking finds unwind tables by `_dl_find_object` of glibc 2.35
//! and newer, which takes no lock. Refuses to answer a signal that nobody sent for a stack.

#![expect(unsafe_code, reason = "a signal handler, and clocks and signals of single threads")]

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Frames of a stack that are kept, the innermost ones.
const FRAMES_MAX: usize = 64;

/// How long a thread may take to see a signal: it may have no processor.
const PATIENCE: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// The thread whose stack is wanted, and for which request. The handler of any other does nothing.
static WANTED: AtomicI32 = AtomicI32::new(0);
static REQUEST: AtomicU64 = AtomicU64::new(0);
/// The request that was answered last.
static ANSWERED: AtomicU64 = AtomicU64::new(0);
static FRAMES: [AtomicUsize; FRAMES_MAX] = [const { AtomicUsize::new(0) }; FRAMES_MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// One stack at a time, in the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// The processor time of one thread.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThreadClock {
    thread: i32,
    clock: libc::clockid_t,
}

impl ThreadClock {
    /// Of the thread that calls.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        let mut clock: libc::clockid_t = 0;
        // SAFETY: it has no precondition, and names the thread that calls.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: `this` is a thread that runs, and `clock` is ours to write.
        let error = unsafe { libc::pthread_getcpuclockid(this, &raw mut clock) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        Ok(Self { thread: rustix::thread::gettid().as_raw_nonzero().get(), clock })
    }

    /// How long it has run; none when it has ended.
    pub(super) fn used(self) -> Option<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: any clock id may be asked for, one of a thread that ended is refused; `time` is ours
        // to write.
        let result = unsafe { libc::clock_gettime(self.clock, &raw mut time) };
        if result != 0 {
            return None;
        }
        Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
    }
}

/// The signal: one of the real-time ones, which nothing else here uses.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// Makes the handler the signal's, once.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: `write_down` is what a signal handler may be: it stores to atomics and walks the stack,
        // see there. It does not panic.
        let registered = unsafe { signal_hook::low_level::register(signal(), write_down) };
        registered.map(drop).map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// The handler.
fn write_down() {
    if WANTED.load(Ordering::Acquire) != rustix::thread::gettid().as_raw_nonzero().get() {
        return;
    }
    let request = REQUEST.load(Ordering::Acquire);
    let mut count = 0;
    // SAFETY: it may race only with another walk that is not synchronised through the crate's lock over
    // the same platform state; on ELF platforms the walk has none, it reads registers, the stack and unwind
    // tables. Symbols are not looked up here.
    unsafe {
        backtrace::trace_unsynchronized(|frame| {
            if let Some(slot) = FRAMES.get(count) {
                slot.store(frame.ip().addr(), Ordering::Relaxed);
                count += 1;
            }
            count < FRAMES_MAX
        });
    }
    COUNT.store(count, Ordering::Relaxed);
    ANSWERED.store(request, Ordering::Release);
}

/// The stack of that thread, the innermost frame first. None where the thread does not see the signal in
/// time.
pub(super) fn stack_of(clock: ThreadClock) -> Option<Vec<usize>> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let request = REQUEST.fetch_add(1, Ordering::AcqRel) + 1;
    WANTED.store(clock.thread, Ordering::Release);
    let asked = Instant::now();
    // SAFETY: a signal to a thread of this process by its number. The handler is installed, so the signal
    // ends nobody; a number that names no thread any more is refused.
    let sent =
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), clock.thread, signal()) };
    let mut frames = None;
    while sent == 0 && asked.elapsed() < PATIENCE {
        if ANSWERED.load(Ordering::Acquire) == request {
            let count = COUNT.load(Ordering::Relaxed).min(FRAMES_MAX);
            let read = |slot: &AtomicUsize| slot.load(Ordering::Relaxed);
            frames = Some(FRAMES[..count].iter().map(read).collect::<Vec<_>>());
            break;
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
    WANTED.store(0, Ordering::Release);
    frames
}

/// Names for addresses: tens of milliseconds, as it reads the program's files. The frames of the handler
/// itself are left out.
pub(super) fn readable(frames: &[usize]) -> String {
    let mut text = String::new();
    let mut inside_handler = true;
    for frame in frames {
        let mut named = false;
        backtrace::resolve(std::ptr::without_provenance_mut(*frame), |symbol| {
            let name = symbol.name().map(|name| format!("{name:#}")).unwrap_or_default();
            let place = symbol.filename().map(|file| file.display().to_string());
            named = true;
            if inside_handler {
                // The kernel's return to the thread comes right behind the last of these.
                return;
            }
            let line = symbol.lineno().unwrap_or(0);
            let place = place.map(|file| format!(" at {file}:{line}")).unwrap_or_default();
            text += &format!("    {name}{place}\n");
        });
        if !named {
            // What has no name right behind the handler is the kernel's trampoline.
            let was_inside = std::mem::replace(&mut inside_handler, false);
            if !was_inside {
                text += &format!("    {frame:#x}\n");
            }
        }
    }
    forget_symbols();
    text
}

/// Gives back what looking up names took: tens of megabytes, and the next stall is far off.
fn forget_symbols() {
    backtrace::clear_symbol_cache();
    // SAFETY: it has no precondition; it takes the allocator's own locks.
    let _released = unsafe { libc::malloc_trim(0) };
}
