//! What a guest wrote, made from outside: where it lies, and bytes that differ from round to round.
//!
//! Called by the engine benchmark and by the floor, so that both have the same to do. Refuses to write
//! where the tiny guest has its code.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use mica_numa::process::Process;
use mica_units::{FrameRun, Mebibytes, PAGE_BYTES, frames_of};
use rustix::process::Pid;

/// Frames of one piece of scattered dirt: 28 KiB, about what a guest writes together.
const PIECE_FRAMES: u32 = 7;
/// Where dirt begins: 16 MiB, far above what the guest uses.
const FIRST_FRAME: u32 = 4096;
/// So much later begins what lies beside, and apart.
const BESIDE_FRAMES: u32 = 100;
const APART_FRAMES: u32 = 1000;

/// How dirty pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirt {
    /// In pieces, all over memory.
    Scattered,
    /// The same, elsewhere: what is written after a first 7 MiB of scattered dirt.
    Beside,
    /// The same, in a third place.
    Apart,
    /// In one piece.
    Dense,
}

/// The runs of frames that `amount` of dirt covers in a guest of `memory`.
///
/// # Errors
/// When the guest is too small for it.
pub fn runs(memory: Mebibytes, amount: Mebibytes, dirt: Dirt) -> Result<Vec<FrameRun>> {
    let frames = frames_of(amount);
    let room = frames_of(memory).saturating_sub(FIRST_FRAME);
    ensure!(room / 2 >= frames, "a guest of {memory} is too small for {amount} of dirt");
    let pieces = match dirt {
        Dirt::Dense => frames.min(1),
        Dirt::Scattered | Dirt::Beside | Dirt::Apart => frames.div_ceil(PIECE_FRAMES),
    };
    let apart = room / pieces.max(1);
    let first = FIRST_FRAME
        + match dirt {
            Dirt::Scattered | Dirt::Dense => 0,
            Dirt::Beside => BESIDE_FRAMES,
            Dirt::Apart => APART_FRAMES,
        };
    let run = |piece: u32| {
        let count = match dirt {
            Dirt::Dense => frames,
            Dirt::Scattered | Dirt::Beside | Dirt::Apart => {
                PIECE_FRAMES.min(frames - piece * PIECE_FRAMES)
            }
        };
        FrameRun::new(first + piece * apart, count).context("a run without frames")
    };
    (0..pieces).map(run).collect()
}

/// The bytes of a run in this round: every page and every round has others.
#[must_use]
pub fn bytes(run: FrameRun, round: u32) -> Vec<u8> {
    let length = usize::try_from(run.bytes()).unwrap_or(0);
    let mut bytes = vec![0; length];
    // Knuth's multiplier spreads neighbouring numbers over all bits.
    let first = run.first().wrapping_add(round.wrapping_mul(0x0100_0193));
    let first = first.wrapping_mul(2_654_435_761);
    for (word, n) in bytes.chunks_exact_mut(4).zip(0u32..) {
        word.copy_from_slice(&first.wrapping_add(n).to_le_bytes());
    }
    bytes
}

/// The memory of a guest in another process.
#[derive(Debug)]
pub struct Outside {
    process: Process,
    file: File,
    address: u64,
}

impl Outside {
    /// Of the process with this number, where memory starts at `address`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn new(pid: u32, address: u64) -> Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).context("no such number")?;
        let process = Process::open(number)?;
        let file = File::open(format!("/proc/{pid}/mem")).context("open the memory of a VM")?;
        Ok(Self { process, file, address })
    }

    /// Writes this round's bytes into every run, as a guest would.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn write(&self, runs: &[FrameRun], round: u32) -> Result<()> {
        for run in runs {
            self.process.write(self.address + run.offset_bytes(), &bytes(*run, round))?;
        }
        Ok(())
    }

    /// Checks that every run holds the bytes of this round; of none, that nothing was ever written.
    ///
    /// # Errors
    /// When one does not.
    pub fn check(&self, runs: &[FrameRun], round: Option<u32>) -> Result<()> {
        let mut found = vec![0; usize::try_from(PAGE_BYTES)?];
        for run in runs {
            // The first page of each: the others were written and moved with it.
            self.file.read_exact_at(&mut found, self.address + run.offset_bytes())?;
            let same = match round {
                Some(round) => bytes(*run, round).get(..found.len()) == Some(&found[..]),
                None => found.iter().all(|byte| *byte == 0),
            };
            ensure!(same, "{run:?} does not hold what was written in round {round:?}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirt_is_as_much_as_was_asked_for_and_inside() {
        let memory = Mebibytes::new(2048);
        for (mib, dirt, pieces) in
            [(7, Dirt::Scattered, 256), (7, Dirt::Dense, 1), (256, Dirt::Scattered, 9363)]
        {
            let runs = runs(memory, Mebibytes::new(mib), dirt).unwrap();
            assert_eq!(runs.len(), pieces);
            assert_eq!(runs.iter().map(|run| run.count()).sum::<u32>(), mib * 256);
            assert!(runs.windows(2).all(|pair| pair[0].end() + 16 < pair[1].first()));
            assert!(runs.last().unwrap().end() <= frames_of(memory));
        }
        assert!(runs(memory, Mebibytes::new(1500), Dirt::Dense).is_err());
        assert_eq!(runs(memory, Mebibytes::new(0), Dirt::Scattered).unwrap(), []);
    }

    #[test]
    fn what_lies_beside_lies_nowhere_else() {
        let memory = Mebibytes::new(2048);
        let first = runs(memory, Mebibytes::new(7), Dirt::Scattered).unwrap();
        let more = runs(memory, Mebibytes::new(1), Dirt::Beside).unwrap();
        let third = runs(memory, Mebibytes::new(7), Dirt::Apart).unwrap();
        let apart = |a: &FrameRun, b: &FrameRun| a.end() <= b.first() || b.end() <= a.first();
        assert!(more.iter().all(|a| first.iter().chain(&third).all(|b| apart(a, b))));
        assert!(third.iter().all(|a| first.iter().all(|b| apart(a, b))));
        assert!(third.last().unwrap().end() <= frames_of(memory));
    }

    #[test]
    fn rounds_and_runs_have_bytes_of_their_own() {
        let run = |first| FrameRun::new(first, 2).unwrap();
        assert_eq!(bytes(run(5), 1).len(), 8192);
        assert_ne!(bytes(run(5), 1), bytes(run(5), 2));
        assert_ne!(bytes(run(5), 1), bytes(run(6), 1));
        assert_ne!(bytes(run(5), 1)[..4096], bytes(run(5), 1)[4096..]);
    }
}
