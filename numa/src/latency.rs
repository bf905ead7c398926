//! Holds how long a core may take to leave its idle state: always, or while work is handed over densely.
//!
//! Called by the binary's `serve` for all of a daemon's life, and by each shard for as long as its hand-overs
//! are dense. Whatever crosses cores (a request to another shard, a guest's answer, a vCPU that is kicked)
//! waits for a core that sleeps, and some states take longer to leave than the work takes. The kernel's PM
//! QoS keeps the promise for all cores for as long as the file is open, so a daemon that is killed holds
//! nothing. Each shard has a wish of its own, and the kernel keeps the strictest: shards share nothing for
//! it. Refuses to hold for sparse work: what that saves in time is not worth the power.
//!
//! Source: Documentation/power/pm_qos_interface.rst of the kernel, "cpu latency QoS".

use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use crate::idle::IdleStates;
use crate::rt;

/// Where the kernel takes such wishes.
const DEVICE: &str = "/dev/cpu_dma_latency";

/// What says as much as no wish: `PM_QOS_CPU_LATENCY_DEFAULT_VALUE` of linux/pm_qos.h.
const NO_WISH_US: i32 = 2_000_000_000;

/// Over how long hand-overs are counted, and how often who holds looks whether they are still dense.
const WINDOW: Duration = Duration::from_millis(100);

/// Hand-overs of a window from which they are dense: 640 each second. A shard that has fewer saves less than
/// a hundredth of the time, at the price of a machine that does not sleep.
const DENSE: u32 = 64;

/// Hand-overs of a window below which they are not any more. Half, so that a rate near the bound does not
/// write to the kernel every window.
const SPARSE: u32 = DENSE / 2;

/// A wish that holds until it is dropped.
#[derive(Debug)]
pub struct CpuLatency(File);

impl CpuLatency {
    /// From now on no core is in a state that takes longer to leave, in microseconds. With zero, cores do
    /// not sleep at all: they poll.
    ///
    /// # Errors
    /// When the device is not there, or not this user's to write.
    pub fn hold(limit_us: u32) -> io::Result<Self> {
        let wish = Self::open()?;
        wish.say(limit_us)?;
        Ok(wish)
    }

    /// One that wishes nothing yet.
    fn open() -> io::Result<Self> {
        Ok(Self(OpenOptions::new().write(true).open(DEVICE)?))
    }

    fn say(&self, limit_us: u32) -> io::Result<()> {
        // The kernel takes a signed number, of which more than this says nothing.
        let limit_us =
            i32::try_from(limit_us).map_or(NO_WISH_US, |limit_us| limit_us.min(NO_WISH_US));
        self.0.write_all_at(&limit_us.to_ne_bytes(), 0)
    }

    fn say_nothing(&self) -> io::Result<()> {
        self.0.write_all_at(&NO_WISH_US.to_ne_bytes(), 0)
    }
}

/// A shard's wish, which it has while its hand-overs are dense. Cheap to clone, and bound to its executor.
#[derive(Clone, Debug, Default)]
pub struct DenseLatency(Option<Rc<Wish>>);

#[derive(Debug)]
struct Wish {
    latency: CpuLatency,
    limit_us: u32,
    density: RefCell<Density>,
    /// How long it was held, but for the hold that goes on.
    held: Cell<Duration>,
    since: Cell<Option<Instant>>,
}

impl DenseLatency {
    /// Holds `limit_us` while hand-overs are dense.
    ///
    /// # Errors
    /// When the device is not there, or not this user's to write.
    pub fn new(limit_us: u32) -> io::Result<Self> {
        let latency = CpuLatency::open()?;
        let density = RefCell::default();
        let (held, since) = (Cell::default(), Cell::default());
        Ok(Self(Some(Rc::new(Wish { latency, limit_us, density, held, since }))))
    }

    /// Counts one: this executor waits, or soon will, for something that another core does for it.
    pub fn handed_over(&self) {
        let Some(wish) = &self.0 else { return };
        if wish.density.borrow_mut().came(Instant::now()) && wish.begin() {
            rt::spawn(keep(Rc::downgrade(wish))).detach();
        }
    }

    /// How long cores were kept awake for it.
    #[must_use]
    pub fn held(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |wish| {
            let now = wish.since.get().map_or(Duration::ZERO, |since| since.elapsed());
            wish.held.get() + now
        })
    }
}

impl Wish {
    /// Whether it is held. One that the kernel does not take is not asked for again: a density without an
    /// end begins no second time.
    fn begin(&self) -> bool {
        if let Err(error) = self.latency.say(self.limit_us) {
            tracing::error!(%error, "the kernel does not hold the latency of cores any more");
            return false;
        }
        self.since.set(Some(Instant::now()));
        true
    }

    /// Lets go of it.
    fn end(&self) {
        if let Some(since) = self.since.take() {
            self.held.set(self.held.get() + since.elapsed());
        }
        if let Err(error) = self.latency.say_nothing() {
            tracing::error!(%error, "the kernel does not let go of the latency of cores; cores stay awake");
        }
    }
}

/// Ends a wish when it is not worth it any more. One that is dropped meanwhile holds nothing.
async fn keep(wish: Weak<Wish>) {
    loop {
        rt::time::sleep(WINDOW).await;
        let Some(wish) = wish.upgrade() else { return };
        if !wish.density.borrow_mut().goes_on() {
            return wish.end();
        }
    }
}

/// How densely hand-overs come.
#[derive(Debug, Default)]
struct Density {
    began: Option<Instant>,
    count: u32,
    is_dense: bool,
}

impl Density {
    /// Counts one; whether it is the one that makes them dense.
    fn came(&mut self, now: Instant) -> bool {
        if !self.is_dense && self.began.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            (self.began, self.count) = (Some(now), 0);
        }
        self.count = self.count.saturating_add(1);
        let becomes = !self.is_dense && self.count >= DENSE;
        self.is_dense |= becomes;
        becomes
    }

    /// At the end of each window while they are dense: whether they still are.
    fn goes_on(&mut self) -> bool {
        self.is_dense = self.count >= SPARSE;
        (self.began, self.count) = (None, 0);
        self.is_dense
    }
}

/// Whether wishes make a difference on this machine.
#[must_use]
pub fn takes_effect() -> bool {
    IdleStates::read(Path::new("/")).has_driver()
}

/// What a shard should hold while its hand-overs are dense; `None` where that would change nothing.
#[must_use]
pub fn limit_when_dense() -> Option<u32> {
    let states = IdleStates::read(Path::new("/"));
    states.limit_us().filter(|_| states.has_driver())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// The least of what anybody holds now, in microseconds.
    fn held_us() -> i32 {
        let mut bytes = [0; 4];
        let mut file = File::open(DEVICE).expect("CONFIG_CPU_IDLE, and root");
        file.read_exact(&mut bytes).expect("a number");
        i32::from_ne_bytes(bytes)
    }

    #[test]
    fn the_kernel_holds_it_until_it_is_dropped() {
        assert!(held_us() > 7, "somebody holds less already");
        let held = CpuLatency::hold(7).expect("root");
        assert!(held_us() <= 7);
        drop(held);
        assert!(held_us() > 7);
    }

    #[test]
    fn a_window_with_fewer_is_forgotten() {
        let (mut density, start) = (Density::default(), Instant::now());
        for _ in 1..DENSE {
            assert!(!density.came(start));
        }
        // A window later the first of them do not count any more.
        for _ in 1..DENSE {
            assert!(!density.came(start + WINDOW));
        }
        assert!(density.came(start + WINDOW));
        assert!(!density.came(start + WINDOW), "it is dense already");
    }

    #[test]
    fn density_ends_below_half_of_what_began_it() {
        let mut density = Density::default();
        let now = Instant::now();
        let come = |density: &mut Density, count| (0..count).any(|_| density.came(now));
        assert!(come(&mut density, DENSE));
        assert!(density.goes_on(), "those that began it are of its first window");
        assert!(!come(&mut density, SPARSE));
        assert!(density.goes_on());
        assert!(!come(&mut density, SPARSE - 1));
        assert!(!density.goes_on());
        assert!(come(&mut density, DENSE), "and it may begin again");
    }
}
