//! The thread that runs every device of a VM: one epoll, bounded turns.
//!
//! Called by `mica-vm`, which makes the thread and installs its seccomp filter between
//! [`DeviceLoop::new`] and [`DeviceLoop::run`]. Refuses to block anywhere but in epoll.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;

use super::gate::Wanted;
use super::{DeviceError, Gate, MmioDevice, Progress, Ready};

/// Token of the gate's event; no device has this index.
const GATE: u64 = u64::MAX;
/// Low byte of a token: the device's own descriptor rather than a queue.
const WAKE: u64 = 0xff;
/// Events taken from the kernel in one go. More than four devices can have.
const EVENTS_PER_TURN: usize = 32;
/// Longest time that what is in flight may take to end when the thread is asked to park.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// Longest wait for a device to say that something has ended, before it is asked.
const DRAIN_STEP: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// All devices of one VM and what wakes them.
#[derive(Debug)]
pub struct DeviceLoop {
    epoll: OwnedFd,
    devices: Vec<Arc<MmioDevice>>,
    /// Duplicates of the devices' own descriptors, to wait on without their locks.
    wakes: Vec<Option<OwnedFd>>,
    gate: Arc<Gate>,
    drain_max: Duration,
}

impl DeviceLoop {
    /// Registers every queue event, every device's own descriptor and the gate. All descriptors that
    /// [`DeviceLoop::run`] uses are open when this returns, but for sockets that are handed to
    /// vsock later.
    ///
    /// # Errors
    /// When epoll refuses, which means that the process is out of descriptors or memory.
    pub fn new(devices: Vec<Arc<MmioDevice>>, gate: Arc<Gate>) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        add(gate.event().as_fd(), GATE)?;
        let mut wakes = Vec::with_capacity(devices.len());
        for (device, mmio) in (0u64..).zip(&devices) {
            for (queue, fd) in (0u64..).zip(mmio.queue_events()) {
                add(fd.as_fd(), device << 8 | queue)?;
            }
            mmio.with_wake_fd(|fd| add(fd, device << 8 | WAKE)).transpose()?;
            wakes.push(mmio.with_wake_fd(|fd| fd.try_clone_to_owned()).transpose()?);
        }
        Ok(Self { epoll, devices, wakes, gate, drain_max: DRAIN_MAX })
    }

    /// One that waits for what is in flight for this long only.
    #[cfg(test)]
    pub(super) fn with_drain_max(self, drain_max: Duration) -> Self {
        Self { drain_max, ..self }
    }

    /// Runs the devices whenever the gate is open, until it says stop or one of them fails. Starts
    /// parked.
    ///
    /// System calls made here, for the thread's filter (x86-64 names; whatever the allocator and
    /// the runtime need for themselves, such as `mmap`, `munmap`, `brk`, `madvise`, `mremap`,
    /// `futex`, `sched_yield`, `sigaltstack`, `exit` and `rt_sigprocmask`, comes on top):
    ///
    /// | call | by | for |
    /// |---|---|---|
    /// | `epoll_pwait` | loop, vsock | waiting |
    /// | `epoll_ctl` | vsock | adding and removing sockets |
    /// | `ppoll` | loop | waiting for what is in flight, when it is to park |
    /// | `read`, `write` | all | event descriptors |
    /// | `io_uring_enter` | blk | the disk, restricted to read, write and fsync of one file |
    /// | `madvise` | blk, balloon | giving memory back: idle bounce memory, free pages |
    /// | `recvfrom`, `sendto`, `shutdown`, `close` | vsock | the sockets |
    /// | `getrandom` | rng | randomness |
    /// | `futex` | all | the device locks |
    ///
    /// # Errors
    /// [`DeviceError::Guest`] when the guest broke a rule, [`DeviceError::Host`] when the host failed.
    /// No device runs after that.
    pub fn run(self) -> Result<(), DeviceError> {
        let mut ready = vec![Ready::default(); self.devices.len()];
        let mut again = vec![false; self.devices.len()];
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS_PER_TURN];
        if !self.pass_gate()? {
            return Ok(());
        }
        #[cfg(feature = "breakout")]
        crate::breakout::attempt(crate::jail::seccomp::ThreadKind::Devices);
        loop {
            // A device that stopped for fairness goes on after the others had their turn.
            let poll = Timespec { tv_sec: 0, tv_nsec: 0 };
            let timeout = again.contains(&true).then_some(&poll);
            let arrived = match epoll::wait(&self.epoll, &mut events, timeout) {
                Ok((arrived, _)) => &*arrived,
                Err(Errno::INTR) => &[],
                Err(errno) => return Err(self.host("wait for events", errno.into())),
            };
            let mut gate = false;
            for event in arrived {
                match event.data.u64() {
                    GATE => gate = true,
                    token => self.note(token, &mut ready)?,
                }
            }
            // What arrived beside it waits in `ready` while this thread is parked.
            if gate && !self.pass_gate()? {
                return Ok(());
            }
            for ((mmio, ready), again) in self.devices.iter().zip(&mut ready).zip(&mut again) {
                let ready = std::mem::take(ready);
                if ready != Ready::default() || *again {
                    *again = mmio.process(ready)? == Progress::More;
                }
            }
        }
    }

    /// Does what the gate asks for. `false` when that is to stop.
    fn pass_gate(&self) -> Result<bool, DeviceError> {
        let wanted = self.gate.wanted().map_err(|error| self.host("read the gate", error))?;
        let wanted = match wanted {
            Wanted::Park => {
                self.drain()?;
                self.gate.stay()
            }
            other => other,
        };
        Ok(wanted == Wanted::Run)
    }

    /// Brings what is in flight to its end.
    fn drain(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + self.drain_max;
        for (mmio, wake) in self.devices.iter().zip(&self.wakes) {
            while !mmio.drain()? {
                if Instant::now() >= deadline {
                    let late = std::io::ErrorKind::TimedOut.into();
                    return Err(mmio.host("finish what is in flight")(late));
                }
                let mut fds: Vec<_> =
                    wake.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
                match poll(&mut fds, Some(&DRAIN_STEP)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => {
                        return Err(mmio.host("wait for what is in flight")(errno.into()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds one event to what its device will be told, and takes a kick off its event.
    fn note(&self, token: u64, ready: &mut [Ready]) -> Result<(), DeviceError> {
        let index = usize::try_from(token >> 8).unwrap_or(usize::MAX);
        let (Some(mmio), Some(ready)) = (self.devices.get(index), ready.get_mut(index)) else {
            return Ok(());
        };
        let source = token & 0xff;
        let Some(event) = usize::try_from(source).ok().and_then(|q| mmio.queue_events().get(q))
        else {
            ready.wake = true;
            return Ok(());
        };
        ready.queues |= 1 << source;
        event.clear().map_err(mmio.host("read a queue event"))?;
        Ok(())
    }

    fn host(&self, operation: &'static str, source: std::io::Error) -> DeviceError {
        let device = self.devices.first().map_or(super::DeviceKind::Blk, |mmio| mmio.kind());
        DeviceError::Host { device, operation, source }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use super::*;
    use crate::jail::seccomp::{self, ThreadKind};
    use crate::virtio::driver::{BUFFERS, Driver};
    use crate::virtio::{Balloon, Blk, GateError, GuestFault, Rng, Rule, Vsock};

    /// Long enough for any machine; a test that waits for it has failed.
    const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

    fn start(drivers: &[&Driver]) -> (Arc<Gate>, JoinHandle<Result<(), DeviceError>>) {
        let gate = Arc::new(Gate::new().unwrap());
        let devices = drivers.iter().map(|driver| Arc::clone(&driver.device)).collect();
        let device_loop = DeviceLoop::new(devices, Arc::clone(&gate)).unwrap();
        gate.open().unwrap();
        let own = Arc::clone(&gate);
        let body = move || {
            let _gone = own.on_end();
            device_loop.run()
        };
        (gate, std::thread::spawn(body))
    }

    fn wait_for_interrupt(driver: &Driver) {
        let mut fds = [PollFd::new(&driver.line, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)).unwrap(), 1, "no interrupt came");
        driver.line.clear().unwrap();
    }

    #[test]
    fn kicks_are_served_until_it_is_stopped() {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(4096).unwrap();
        let mut rng = Driver::new(Box::new(Rng::new()));
        let mut blk = Driver::new(Box::new(Blk::of_file(file, false).unwrap()));
        let (gate, thread) = start(&[&rng, &blk]);
        // The drivers come up while the loop runs, as a guest's do.
        rng.start(u64::MAX);
        blk.start(u64::MAX);
        for _ in 0..3 {
            rng.add(0, &[], &[(BUFFERS, 64)]);
            rng.kick(0);
            wait_for_interrupt(&rng);
            assert_eq!(rng.take_used(0).unwrap().1, 64);
            blk.put(BUFFERS, 4u32);
            blk.put(BUFFERS + 16, 9u8);
            blk.add(0, &[(BUFFERS, 16)], &[(BUFFERS + 16, 1)]);
            blk.kick(0);
            wait_for_interrupt(&blk);
            assert_eq!(blk.take_used(0).unwrap().1, 1);
            assert_eq!(blk.bytes(BUFFERS + 16, 1), [0]);
        }
        gate.stop().unwrap();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_parked_thread_leaves_kicks_alone_and_serves_them_afterwards() {
        let mut rng = Driver::new(Box::new(Rng::new()));
        let (gate, thread) = start(&[&rng]);
        rng.start(u64::MAX);
        for _ in 0..50 {
            gate.park().unwrap();
            gate.wait_parked(Duration::from_secs(30)).unwrap();
            rng.add(0, &[], &[(BUFFERS, 64)]);
            rng.kick(0);
            assert!(rng.take_used(0).is_none());
            gate.open().unwrap();
            wait_for_interrupt(&rng);
            assert_eq!(rng.take_used(0).unwrap().1, 64);
        }
        gate.stop().unwrap();
        thread.join().unwrap().unwrap();
        assert_eq!(gate.wait_parked(Duration::ZERO), Err(GateError::Gone));
    }

    /// Writes that are under way when the thread is asked to park have all been answered when it is.
    #[test]
    fn parking_drains_the_disk() {
        const REQUESTS: u64 = 20;
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(8 << 20).unwrap();
        let mut blk = Driver::new(Box::new(Blk::of_file(file, false).unwrap()));
        let (gate, thread) = start(&[&blk]);
        blk.start(u64::MAX);
        for round in 0..20 {
            for request in 0..REQUESTS {
                let header = BUFFERS + request * 32;
                blk.put(header, 1u32);
                blk.put(header + 8, request * 256);
                blk.add(0, &[(header, 16), (BUFFERS + 0x1000, 128 * 1024)], &[(header + 16, 1)]);
            }
            blk.kick(0);
            gate.park().unwrap();
            gate.wait_parked(Duration::from_secs(30)).unwrap();
            let answered = std::iter::from_fn(|| blk.take_used(0)).count() as u64;
            assert!(blk.device.drain().unwrap(), "round {round}: something is still in flight");
            gate.open().unwrap();
            let mut left = REQUESTS - answered;
            while left > 0 {
                wait_for_interrupt(&blk);
                left -= std::iter::from_fn(|| blk.take_used(0)).count() as u64;
            }
            blk.line.clear().unwrap();
        }
        gate.stop().unwrap();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_fault_of_the_guest_ends_it_and_names_the_rule() {
        let mut rng = Driver::new(Box::new(Rng::new()));
        let (_gate, thread) = start(&[&rng]);
        rng.start(u64::MAX);
        rng.offer(0, 64);
        rng.kick(0);
        match thread.join().unwrap() {
            Err(DeviceError::Guest(GuestFault { queue: 0, rule: Rule::ChainBroken, .. })) => {}
            other => panic!("{other:?}"),
        }
    }

    /// The list of system calls in [`DeviceLoop::run`] against the filter that the thread has: one
    /// that is missing kills the test.
    #[test]
    fn all_devices_work_under_the_filter_of_their_thread() {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(1 << 20).unwrap();
        let (vsock, connector) = Vsock::new(3, Box::new(|| {})).unwrap();
        let mut rng = Driver::new(Box::new(Rng::new()));
        let mut blk = Driver::new(Box::new(Blk::of_file(file, false).unwrap()));
        let mut vsock = Driver::new(Box::new(vsock));
        let mut balloon = Driver::new(Box::new(Balloon::new()));
        let gate = Arc::new(Gate::new().unwrap());
        let devices =
            [&rng, &blk, &vsock, &balloon].map(|driver| Arc::clone(&driver.device)).to_vec();
        let device_loop = DeviceLoop::new(devices, Arc::clone(&gate)).unwrap();
        gate.open().unwrap();
        let thread = std::thread::spawn(move || {
            seccomp::install(ThreadKind::Devices).unwrap();
            device_loop.run()
        });
        for driver in [&mut rng, &mut blk, &mut vsock, &mut balloon] {
            driver.start(u64::MAX);
        }
        rng.add(0, &[], &[(BUFFERS, 64)]);
        rng.kick(0);
        wait_for_interrupt(&rng);
        balloon.add(2, &[], &[(BUFFERS, 4096)]);
        balloon.kick(2);
        wait_for_interrupt(&balloon);
        assert!(balloon.take_used(2).is_some());
        // A long read, a write and a flush; the header of each at its own place.
        for (operation, bytes) in [(0u32, 300 * 1024), (1, 4096), (4, 0)] {
            blk.put(BUFFERS, operation);
            let (data, status) = ((BUFFERS + 0x1000, bytes), (BUFFERS + 16, 1));
            match operation {
                1 => blk.add(0, &[(BUFFERS, 16), data], &[status]),
                _ => blk.add(0, &[(BUFFERS, 16)], &[data, status]),
            };
            blk.kick(0);
            wait_for_interrupt(&blk);
            assert!(blk.take_used(0).is_some());
            assert_eq!(blk.bytes(BUFFERS + 16, 1), [0]);
        }
        // A connection that the guest resets: the socket is added, read, shut down and closed.
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        connector.connect(far.into(), 7).unwrap();
        vsock.add(0, &[], &[(BUFFERS, 4096)]);
        vsock.kick(0);
        wait_for_interrupt(&vsock);
        let request = vsock.bytes(BUFFERS, 44);
        let mut reset = request.clone();
        for (to, from) in [(0..8, 8..16), (8..16, 0..8), (16..20, 20..24), (20..24, 16..20)] {
            reset[to].copy_from_slice(&request[from]);
        }
        reset[30] = 3;
        vsock.put_bytes(BUFFERS + 0x1000, &reset);
        vsock.add(1, &[(BUFFERS + 0x1000, 44)], &[]);
        vsock.kick(1);
        let mut fds = [PollFd::new(&near, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)).unwrap(), 1, "the socket was not closed");
        gate.stop().unwrap();
        thread.join().unwrap().unwrap();
    }

    /// Every check must hold on the copy that is used, not on what lies in guest memory a moment
    /// later: here the rings and buffers change all the time while the devices run.
    #[test]
    fn a_guest_that_scribbles_while_the_devices_run_gets_a_fault_at_most() {
        let mut state = 1u64;
        let mut random = move |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % bound
        };
        let (mut ended, mut stopped) = (0, 0);
        for _ in 0..60 {
            let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let file = std::fs::File::from(fd);
            file.set_len(1 << 20).unwrap();
            let (vsock, connector) = Vsock::new(3, Box::new(|| {})).unwrap();
            let mut blk = Driver::new(Box::new(Blk::of_file(file, false).unwrap()));
            let mut vsock = Driver::new(Box::new(vsock));
            let (gate, thread) = start(&[&blk, &vsock]);
            blk.start(u64::MAX);
            vsock.start(u64::MAX);
            let (_near, far) = std::os::unix::net::UnixStream::pair().unwrap();
            connector.connect(far.into(), 1).unwrap();
            for driver in [&mut blk, &mut vsock] {
                for ring in 0..driver.rings.len() {
                    for chain in 0..16 {
                        let at = BUFFERS + chain * 0x1000;
                        driver.add(ring, &[(at, 44)], &[(at + 64, 512), (at + 1024, 1)]);
                    }
                }
            }
            for _ in 0..2000 {
                let driver = if random(2) == 0 { &blk } else { &vsock };
                let ring = &driver.rings[usize::try_from(random(2)).unwrap() % driver.rings.len()];
                let word = u16::try_from(random(0x1_0000)).unwrap();
                match random(4) {
                    // The descriptors in use, a buffer, the index by a little.
                    0 => driver.put(ring.descriptors() + 2 * random(16 * 8), word % 8),
                    1 => driver.put(ring.driver_area() + 4 + 2 * random(16), word % 64),
                    2 => driver.put(BUFFERS + 2 * random(0x4000), word),
                    _ => driver.put(ring.driver_area() + 2, u16::try_from(random(96)).unwrap()),
                }
                driver.kick(u32::try_from(random(3)).unwrap());
            }
            gate.stop().unwrap();
            match thread.join().unwrap() {
                Ok(()) => stopped += 1,
                Err(DeviceError::Guest(_)) => ended += 1,
                Err(error) => panic!("the host was blamed: {error:?}"),
            }
        }
        assert!(ended > 0, "no lie was noticed in {stopped} rounds");
    }
}
