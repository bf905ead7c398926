//! The thread that runs every device of a VM: one epoll, bounded turns.
//!
//! Called by `mica-vm`, which makes the thread and installs its seccomp filter between
//! [`DeviceLoop::new`] and [`DeviceLoop::run`]. Refuses to block anywhere but in epoll.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::io::Errno;

use super::{DeviceError, Event, MmioDevice, Progress, Ready};

/// Token of the stop event; no device has this index.
const STOP: u64 = u64::MAX;
/// Low byte of a token: the device's own descriptor rather than a queue.
const WAKE: u64 = 0xff;
/// Events taken from the kernel in one go. More than three devices can have.
const EVENTS_PER_TURN: usize = 32;

/// All devices of one VM and what wakes them.
#[derive(Debug)]
pub struct DeviceLoop {
    epoll: OwnedFd,
    devices: Vec<Arc<MmioDevice>>,
    // Only kept open: epoll forgets a descriptor that is closed.
    _stop: Event,
}

impl DeviceLoop {
    /// Registers every queue event, every device's own descriptor and `stop`. All descriptors that
    /// [`DeviceLoop::run`] uses are open when this returns, but for sockets that are handed to
    /// vsock later.
    ///
    /// # Errors
    /// When epoll refuses, which means that the process is out of descriptors or memory.
    pub fn new(devices: Vec<Arc<MmioDevice>>, stop: Event) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add = |fd: std::os::fd::BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        add(stop.as_fd(), STOP)?;
        for (device, mmio) in (0u64..).zip(&devices) {
            for (queue, fd) in (0u64..).zip(mmio.queue_events()) {
                add(fd.as_fd(), device << 8 | queue)?;
            }
            mmio.with_wake_fd(|fd| add(fd, device << 8 | WAKE)).transpose()?;
        }
        Ok(Self { epoll, devices, _stop: stop })
    }

    /// Runs the devices until `stop` is signalled or one of them fails.
    ///
    /// System calls made here, for the thread's filter (x86-64 names; whatever the allocator and
    /// the runtime need for themselves, such as `mmap`, `munmap`, `brk`, `madvise`, `mremap`,
    /// `futex`, `sched_yield`, `sigaltstack`, `exit` and `rt_sigprocmask`, comes on top):
    ///
    /// | call | by | for |
    /// |---|---|---|
    /// | `epoll_pwait` | loop, vsock | waiting |
    /// | `epoll_ctl` | vsock | adding and removing sockets |
    /// | `read`, `write` | all | event descriptors |
    /// | `io_uring_enter` | blk | the disk, restricted to read, write and fsync of one file |
    /// | `madvise` | blk | giving idle bounce memory back |
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
        loop {
            // A device that stopped for fairness goes on after the others had their turn.
            let poll = Timespec { tv_sec: 0, tv_nsec: 0 };
            let timeout = again.contains(&true).then_some(&poll);
            let arrived = match epoll::wait(&self.epoll, &mut events, timeout) {
                Ok((arrived, _)) => &*arrived,
                Err(Errno::INTR) => &[],
                Err(errno) => return Err(self.host(errno.into())),
            };
            for event in arrived {
                let token = event.data.u64();
                if token == STOP {
                    return Ok(());
                }
                self.note(token, &mut ready)?;
            }
            for ((mmio, ready), again) in self.devices.iter().zip(&mut ready).zip(&mut again) {
                let ready = std::mem::take(ready);
                if ready != Ready::default() || *again {
                    *again = mmio.process(ready)? == Progress::More;
                }
            }
        }
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

    fn host(&self, source: std::io::Error) -> DeviceError {
        let device = self.devices.first().map_or(super::DeviceKind::Blk, |mmio| mmio.kind());
        DeviceError::Host { device, operation: "wait for events", source }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::JoinHandle;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::virtio::driver::{BUFFERS, Driver};
    use crate::virtio::{Blk, GuestFault, Rng, Rule};

    /// Long enough for any machine; a test that waits for it has failed.
    const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

    fn start(drivers: &[&Driver]) -> (Event, JoinHandle<Result<(), DeviceError>>) {
        let stop = Event::new().unwrap();
        let devices = drivers.iter().map(|driver| Arc::clone(&driver.device)).collect();
        let device_loop = DeviceLoop::new(devices, stop.try_clone().unwrap()).unwrap();
        (stop, std::thread::spawn(move || device_loop.run()))
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
        let mut blk = Driver::new(Box::new(Blk::new(file, false).unwrap()));
        let (stop, thread) = start(&[&rng, &blk]);
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
        stop.signal().unwrap();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_fault_of_the_guest_ends_it_and_names_the_rule() {
        let mut rng = Driver::new(Box::new(Rng::new()));
        let (_stop, thread) = start(&[&rng]);
        rng.start(u64::MAX);
        rng.offer(0, 64);
        rng.kick(0);
        match thread.join().unwrap() {
            Err(DeviceError::Guest(GuestFault { queue: 0, rule: Rule::ChainBroken, .. })) => {}
            other => panic!("{other:?}"),
        }
    }
}
