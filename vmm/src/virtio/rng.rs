//! virtio-rng (virtio 1.2, 5.4): the kernel's randomness, on request.
//!
//! Called through the transport. Refuses to fill more than [`REQUEST_BYTES_MAX`] of one request
//! and more than [`REQUESTS_PER_TURN`] requests before other devices have had their turn.

use std::os::fd::BorrowedFd;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::Bytes;

use crate::state::{DeviceState, Unfit};

use super::{
    Chain, DeviceError, DeviceKind, GuestRam, Progress, Ready, Rule, VirtQueue, VirtioDevice,
};

/// Bytes given for one request. A driver must take short answers; Linux asks for 64 at a time.
const REQUEST_BYTES_MAX: usize = 256;
/// Requests answered in one turn.
const REQUESTS_PER_TURN: usize = 16;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    chain: Chain,
}

impl Rng {
    /// A source of randomness.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the chain just taken; the count of bytes written.
    fn fill(&self, queue: &VirtQueue, memory: &GuestRam) -> Result<u32, DeviceError> {
        let mut random = [0u8; REQUEST_BYTES_MAX];
        let mut written = 0;
        for segment in self.chain.writable() {
            let wanted = usize::try_from(segment.bytes).unwrap_or(usize::MAX);
            let length = wanted.min(random.len() - written);
            let part = &mut random[written..written + length];
            // Never short below 256 bytes once the pool is up, by getrandom(2).
            let got = getrandom(&mut *part, GetRandomFlags::empty()).map_err(|errno| {
                let operation = "read randomness";
                DeviceError::Host { device: DeviceKind::Rng, operation, source: errno.into() }
            })?;
            memory
                .write_slice(&part[..got], segment.address)
                .map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
            written += got;
            if got < wanted {
                break;
            }
        }
        Ok(u32::try_from(written).unwrap_or(0))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn process(
        &mut self,
        queues: &mut [VirtQueue],
        memory: &GuestRam,
        _ready: Ready,
    ) -> Result<Progress, DeviceError> {
        let Some(queue) = queues.first_mut() else { return Ok(Progress::Idle) };
        for _ in 0..REQUESTS_PER_TURN {
            if !queue.pop(memory, &mut self.chain)? {
                return Ok(match queue.enable_kicks(memory)? {
                    true => Progress::More,
                    false => Progress::Idle,
                });
            }
            let bytes = self.fill(queue, memory)?;
            queue.push_used(memory, self.chain.head(), bytes)?;
        }
        Ok(Progress::More)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Unfit> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(Unfit("the state of another device is where that of rng belongs")),
        }
    }
}
