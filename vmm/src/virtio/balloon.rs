//! virtio-balloon (virtio 1.2, 5.5): free page reporting and nothing else.
//!
//! Called through the transport. Refuses to inflate: it never asks for a page, and gives those that a
//! driver offers all the same back at once. What it takes is the guest's word that a run of pages is
//! free: the host drops their content, so that a guest costs what it uses and a snapshot holds no
//! free page.
//!
//! A report is a hint that may be ignored. So a run is cut where it is no whole page, and of one
//! report no more than [`REPORT_BYTES_MAX`] bytes are dropped, whatever a guest claims.
//!
//! `PAGE_POISON` is not offered. A guest that relies on the content of its free pages (`page_poison`,
//! `init_on_free`) then does not report, by the driver's own rule; all others, Debian's among them,
//! write a page before they read it.

use std::os::fd::BorrowedFd;

use crate::discard::{DiscardError, discard};
use crate::state::{DeviceState, Unfit};

use super::{
    Chain, DeviceError, DeviceKind, GuestRam, Progress, Ready, Rule, VirtQueue, VirtioDevice,
    read_config_bytes,
};

/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u32 = 5;
/// Position of the reporting queue: the queues between it and the first two come with features
/// that are not offered, and leave no gap.
const REPORTING: usize = 2;
/// Inflate, deflate, reports. Linux reports up to 32 runs at a time and wants room for them.
const QUEUE_SIZES: &[u16] = &[16, 16, 32];
/// Bytes of the configuration space: pages wanted and pages held, both 0.
const CONFIG_BYTES: usize = 8;
/// Most bytes dropped for one report: what Linux reports at most, 32 runs of 4 MiB.
const REPORT_BYTES_MAX: u32 = 128 << 20;
/// Chains of the other two queues given back in one turn.
const CHAINS_PER_TURN: usize = 16;

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    chain: Chain,
}

impl Balloon {
    /// A balloon that stays empty.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives chains of a queue back unused. `true` when there may be more.
    fn give_back(&mut self, queue: &mut VirtQueue, memory: &GuestRam) -> Result<bool, DeviceError> {
        for _ in 0..CHAINS_PER_TURN {
            if !queue.pop(memory, &mut self.chain)? {
                return Ok(queue.enable_kicks(memory)?);
            }
            queue.push_used(memory, self.chain.head(), 0)?;
        }
        Ok(true)
    }

    /// Takes one report. `true` when there may be more.
    fn take_report(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<bool, DeviceError> {
        if !queue.pop(memory, &mut self.chain)? {
            return Ok(queue.enable_kicks(memory)?);
        }
        let mut left = REPORT_BYTES_MAX;
        for run in self.chain.writable() {
            let bytes = run.bytes.min(left);
            left -= bytes;
            discard(memory, run.address, bytes).map_err(|error| match error {
                DiscardError::Outside => queue.fault(Rule::BufferOutsideMemory).into(),
                DiscardError::Os(source) => {
                    let operation = "give memory back";
                    DeviceError::Host { device: DeviceKind::Balloon, operation, source }
                }
            })?;
        }
        queue.push_used(memory, self.chain.head(), 0)?;
        Ok(true)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        1 << F_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&[0; CONFIG_BYTES], offset, data);
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
        let mut more = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            more |= match index {
                REPORTING => self.take_report(queue, memory)?,
                _ => self.give_back(queue, memory)?,
            };
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Unfit> {
        match state {
            DeviceState::Balloon => Ok(()),
            _ => Err(Unfit("the state of another device is where that of the balloon belongs")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::GuestFault;
    use crate::virtio::driver::{BUFFERS, Driver, MEMORY_BYTES, VERSION_1};

    const PAGE: u64 = 4096;
    const PAGE_BYTES: u32 = 4096;

    /// A driver whose memory from [`BUFFERS`] on is full of `9`s.
    fn started() -> Driver {
        let driver = Driver::started(Box::new(Balloon::new()));
        driver.put_bytes(BUFFERS, &vec![9; MEMORY_BYTES - usize::try_from(BUFFERS).unwrap()]);
        driver
    }

    /// The first byte of each page from [`BUFFERS`] on.
    fn pages(driver: &Driver, count: u64) -> Vec<u8> {
        (0..count).map(|page| driver.bytes(BUFFERS + page * PAGE, 1)[0]).collect()
    }

    fn fault(result: Result<(), DeviceError>) -> (u16, Rule) {
        match result {
            Err(DeviceError::Guest(GuestFault { device: DeviceKind::Balloon, queue, rule })) => {
                (queue, rule)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_offers_reports_and_asks_for_no_page() {
        let driver = Driver::new(Box::new(Balloon::new()));
        assert_eq!(driver.read(0x8), 5);
        // The low bits are the device's own: neither statistics, nor hints, nor poison.
        assert_eq!(driver.offered() & 0xff_ffff, 1 << 5);
        assert_ne!(driver.offered() & VERSION_1, 0);
        assert_eq!([driver.read(0x100), driver.read(0x104)], [0, 0]);
    }

    #[test]
    fn reported_pages_are_dropped_and_no_others() {
        let mut driver = started();
        driver.add(2, &[], &[(BUFFERS + PAGE, PAGE_BYTES), (BUFFERS + 4 * PAGE, 2 * PAGE_BYTES)]);
        driver.add(2, &[], &[(BUFFERS + 7 * PAGE + 1, PAGE_BYTES)]);
        driver.kick(2);
        driver.run().unwrap();
        assert_eq!(driver.take_used(2), Some((0, 0)));
        assert_eq!(driver.take_used(2), Some((2, 0)));
        assert_eq!(pages(&driver, 9), [9, 0, 9, 9, 0, 0, 9, 9, 9]);
        assert!(driver.line.clear().unwrap(), "the driver waits for an interrupt");
    }

    #[test]
    fn offered_pages_come_back_untouched() {
        let mut driver = started();
        driver.put(BUFFERS, 0x200u32);
        for queue in [0, 1] {
            let head = driver.add(queue, &[(BUFFERS, 4)], &[]);
            driver.run().unwrap();
            assert_eq!(driver.take_used(queue), Some((head, 0)), "queue {queue}");
        }
        assert_eq!(driver.bytes(0x20_0000, 4096), [9; 4096]);
    }

    #[test]
    fn one_turn_takes_one_report_and_a_bounded_part_of_it() {
        let mut driver = started();
        // As much as is looked at, and one page more.
        const RUN_BYTES: u32 = 4 << 20;
        let (count, table) = (REPORT_BYTES_MAX / RUN_BYTES, 0x5_0000);
        for index in 0..u16::try_from(count).unwrap() {
            driver.descriptor(table, index, (BUFFERS, RUN_BYTES), 3, index + 1);
        }
        let beyond = BUFFERS + u64::from(RUN_BYTES);
        driver.descriptor(table, u16::try_from(count).unwrap(), (beyond, PAGE_BYTES), 2, 0);
        driver.descriptor(driver.rings[2].base, 0, (table, (count + 1) * 16), 4, 0);
        driver.offer(2, 0);
        driver.offer(2, 0);
        let ready = Ready { queues: 1 << 2, wake: false };
        assert_eq!(driver.device.process(ready).unwrap(), Progress::More);
        assert!(driver.take_used(2).is_some());
        assert_eq!(driver.take_used(2), None, "the second waits for its turn");
        assert_eq!([BUFFERS, beyond].map(|at| driver.bytes(at, 1)[0]), [0, 9]);
        driver.run().unwrap();
        assert!(driver.take_used(2).is_some());
    }

    #[test]
    fn a_guest_that_reports_its_own_rings_harms_itself() {
        let mut driver = started();
        driver.add(2, &[], &[(0, u32::try_from(MEMORY_BYTES).unwrap())]);
        // The available index has gone back to 0.
        assert_eq!(fault(driver.run()), (2, Rule::AvailIndex));
        driver.write(0x70, 0);
        assert_eq!(driver.read(0x70), 0);
    }

    #[test]
    fn what_is_out_of_form_is_a_fault() {
        let outside = MEMORY_BYTES as u64;
        for run in [(outside, PAGE_BYTES), (outside - PAGE, 2 * PAGE_BYTES), (u64::MAX, 2)] {
            let mut driver = started();
            driver.add(2, &[], &[run]);
            assert_eq!(fault(driver.run()), (2, Rule::BufferOutsideMemory), "{run:x?}");
        }
        for queue in [0, 1, 2] {
            let mut driver = started();
            driver.offer(usize::from(queue), 64);
            assert_eq!(fault(driver.run()), (queue, Rule::ChainBroken));
            let mut driver = started();
            let table = driver.rings[usize::from(queue)].base;
            driver.descriptor(table, 0, (BUFFERS, 16), 1, 0);
            driver.offer(usize::from(queue), 0);
            assert_eq!(fault(driver.run()), (queue, Rule::ChainBroken), "a loop");
        }
    }

    #[test]
    fn nothing_is_dropped_before_the_driver_is_ready_or_after_a_reset() {
        let mut driver = started();
        driver.add(2, &[], &[(BUFFERS, PAGE_BYTES)]);
        driver.write(0x70, 0);
        driver.run().unwrap();
        assert_eq!(pages(&driver, 1), [9]);
    }

    proptest! {
        /// Whatever is reported, only whole pages within it are dropped, and a fault is the worst.
        #[test]
        fn reports_of_all_kinds(
            runs in prop::collection::vec((0..0x9_0000u64, 0..0x4000u32), 1..8),
            readable in 0..8usize,
        ) {
            let mut driver = started();
            let runs: Vec<_> = runs.iter().map(|(at, bytes)| (BUFFERS + at * 16, *bytes)).collect();
            let (read, write) = runs.split_at(readable.min(runs.len()));
            driver.add(2, read, write);
            let in_memory = |run: &&(u64, u32)| run.0 + u64::from(run.1) <= MEMORY_BYTES as u64;
            if runs.iter().filter(in_memory).count() < runs.len() {
                prop_assert_eq!(fault(driver.run()), (2, Rule::BufferOutsideMemory));
                return Ok(());
            }
            driver.run().unwrap();
            let count = (MEMORY_BYTES as u64 - BUFFERS) / PAGE;
            for page in 0..count {
                let at = BUFFERS + page * PAGE;
                let whole = |run: &(u64, u32)| run.0 <= at && at + PAGE <= run.0 + u64::from(run.1);
                let expected = if write.iter().any(whole) { 0 } else { 9 };
                prop_assert_eq!(driver.bytes(at, 1)[0], expected, "page {}", page);
                prop_assert_eq!(driver.bytes(at + 4095, 1)[0], expected, "page {}", page);
            }
        }
    }
}
