//! What a VM process says was written to its guest's memory: the way of kernels that do not show it from
//! outside.
//!
//! Called by the driver at each freeze. The process is hostile: what it says decides what is captured of
//! its own guest, and of no other. Refuses a log of any other length than the memory has frames.

use std::os::fd::AsFd;

use mica_units::{FrameRun, PAGE_BYTES};
use mica_wire::vm::EXCHANGE_PART_BYTES_MAX;

/// Bytes of the log of so many frames: a bit each, in words.
pub(crate) fn log_bytes(frames: u32) -> u64 {
    u64::from(frames.div_ceil(u64::BITS)) * 8
}

/// Takes the log out of the exchange, behind a state of this length. `None` when there is none that can be
/// believed to be complete.
pub(crate) fn read_log(
    exchange: &impl AsFd,
    state_bytes: u64,
    bytes: u64,
    frames: u32,
) -> Option<Vec<FrameRun>> {
    if bytes != log_bytes(frames) || bytes > EXCHANGE_PART_BYTES_MAX {
        return None;
    }
    let mut log = vec![0; usize::try_from(bytes).ok()?];
    let at = state_bytes.checked_next_multiple_of(PAGE_BYTES)?;
    let mut done = 0;
    while done < log.len() {
        match rustix::io::pread(exchange, &mut log[done..], at + done as u64) {
            Ok(0) => return None,
            Ok(more) => done += more,
            Err(errno) => {
                tracing::warn!(%errno, "a log of writes cannot be read");
                return None;
            }
        }
    }
    Some(runs_of(&log, frames))
}

/// The frames whose bits are set, joined where they touch.
fn runs_of(log: &[u8], frames: u32) -> Vec<FrameRun> {
    let mut runs = Vec::new();
    let mut start = None;
    let mut frame = 0;
    for byte in log {
        // Most of a log is zero.
        if *byte == 0 && start.is_none() {
            frame += 8;
            continue;
        }
        for bit in 0..8 {
            let is_set = byte >> bit & 1 == 1 && frame < frames;
            match (is_set, start) {
                (true, None) => start = Some(frame),
                (false, Some(first)) => {
                    runs.extend(FrameRun::new(first, frame - first));
                    start = None;
                }
                _ => {}
            }
            frame += 1;
        }
    }
    if let Some(first) = start {
        runs.extend(FrameRun::new(first, frame.min(frames) - first));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flags(runs: &[FrameRun], frames: u32) -> Vec<bool> {
        let is_in = |frame| runs.iter().any(|run| (run.first()..run.end()).contains(&frame));
        (0..frames).map(is_in).collect()
    }

    proptest! {
        #[test]
        fn every_bit_is_a_frame(set in prop::collection::vec(any::<bool>(), 1..300)) {
            let frames = u32::try_from(set.len()).unwrap();
            let mut log = vec![0u8; usize::try_from(log_bytes(frames)).unwrap()];
            for (frame, _) in set.iter().enumerate().filter(|(_, is_set)| **is_set) {
                log[frame / 8] |= 1 << (frame % 8);
            }
            let runs = runs_of(&log, frames);
            prop_assert_eq!(flags(&runs, frames), set);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first()));
        }
    }

    #[test]
    fn bits_beyond_the_memory_are_nothing() {
        assert_eq!(runs_of(&[0xff; 16], 70), [FrameRun::new(0, 70).unwrap()]);
    }

    #[test]
    fn a_log_of_another_length_is_none() {
        let exchange =
            rustix::fs::memfd_create("exchange", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&exchange, 3 * PAGE_BYTES).unwrap();
        rustix::io::pwrite(&exchange, &[0b110; 1], PAGE_BYTES).unwrap();
        let two = [FrameRun::new(1, 2).unwrap()];
        assert_eq!(read_log(&exchange, 100, 8, 64).as_deref(), Some(&two[..]));
        assert_eq!(read_log(&exchange, 100, 0, 64), None);
        assert_eq!(read_log(&exchange, 100, 16, 64), None);
        assert_eq!(read_log(&exchange, 3 * PAGE_BYTES, 8, 64), None, "behind the end");
        assert_eq!(read_log(&exchange, u64::MAX, 8, 64), None);
    }
}
