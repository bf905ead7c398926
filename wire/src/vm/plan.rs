//! A plan: what every part of a guest's memory is to be mapped from.
//!
//! Written by a shard into the exchange, carried out by the VM process. A plan for a shell covers all
//! that is not zero; one for a frozen VM (a rollback) covers only what differs. Entries are carried out
//! in order, each laid over those before it: a base image is one entry, and diffs lie on it. Refuses
//! runs outside the guest, and layers that are not there.
//!
//! ```text
//!  0       4       8       12      16
//!  ┌───────┬───────┬───────┬───────┐
//!  │ first │ count │ source│ at    │   u32 little endian, one entry after the other
//!  └───────┴───────┴───────┴───────┘
//!  source  0 … 15: map layer n from its frame `at` on   0x100 + n: copy instead of mapping
//!          0x200: drop what was written there           0x201: zero
//! ```

use mica_units::{FRAMES_MAX, FrameRun};

use super::{EXCHANGE_PART_BYTES_MAX, LAYERS_MAX};

/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 16;

/// Most entries of one plan.
#[expect(clippy::cast_possible_truncation, reason = "131072 fits every usize")]
pub const ENTRIES_MAX: usize = EXCHANGE_PART_BYTES_MAX as usize / ENTRY_BYTES;

const COPY: u32 = 0x100;
const DROP: u32 = 0x200;
const ZERO: u32 = 0x201;

/// Where the content of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a layer; map it, shared with every other guest that maps it.
    Map {
        /// Which descriptor beside the frame.
        layer: u8,
        /// Page of that file at which the run starts.
        page: u32,
    },
    /// In a layer; copy it into memory of its own, because mapping so small a run costs more.
    Copy {
        /// Which descriptor beside the frame.
        layer: u8,
        /// Page of that file at which the run starts.
        page: u32,
    },
    /// In what is mapped there: only what the guest wrote over it goes.
    Drop,
    /// All zeros.
    Zero,
}

/// One entry of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which frames.
    pub run: FrameRun,
    /// From where.
    pub source: Source,
}

/// Why bytes are not a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not a whole number of entries, or more than [`ENTRIES_MAX`].
    #[error("a plan of {0} bytes is not a whole number of entries, or too long")]
    Length(usize),
    /// An entry is out of form.
    #[error("entry {0} of the plan is out of form, or outside the guest")]
    Entry(usize),
}

/// Writes a plan.
///
/// # Errors
/// When it is longer than [`ENTRIES_MAX`].
pub fn encode(entries: &[Entry]) -> Result<Vec<u8>, PlanError> {
    if entries.len() > ENTRIES_MAX {
        return Err(PlanError::Length(entries.len() * ENTRY_BYTES));
    }
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for entry in entries {
        let (source, at) = match entry.source {
            Source::Map { layer, page } => (u32::from(layer), page),
            Source::Copy { layer, page } => (COPY + u32::from(layer), page),
            Source::Drop => (DROP, 0),
            Source::Zero => (ZERO, 0),
        };
        for word in [entry.run.first(), entry.run.count(), source, at] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    Ok(bytes)
}

/// Reads a plan for a guest of `frames` frames, with `layers` layers beside it.
///
/// # Errors
/// See [`PlanError`].
pub fn decode(bytes: &[u8], frames: u32, layers: usize) -> Result<Vec<Entry>, PlanError> {
    if !bytes.len().is_multiple_of(ENTRY_BYTES) || bytes.len() / ENTRY_BYTES > ENTRIES_MAX {
        return Err(PlanError::Length(bytes.len()));
    }
    let inside = |entry: &Entry| entry.run.end() <= frames.min(FRAMES_MAX);
    let entries = bytes.chunks_exact(ENTRY_BYTES).enumerate();
    entries
        .map(|(index, words)| entry(words, layers).filter(inside).ok_or(PlanError::Entry(index)))
        .collect()
}

fn entry(words: &[u8], layers: usize) -> Option<Entry> {
    let word = |at: usize| {
        let bytes = words.get(at..at + 4)?;
        Some(u32::from_le_bytes(<[u8; 4]>::try_from(bytes).ok()?))
    };
    let (run, source, page) = (FrameRun::new(word(0)?, word(4)?)?, word(8)?, word(12)?);
    let layer = |n: u32| u8::try_from(n).ok().filter(|n| usize::from(*n) < layers.min(LAYERS_MAX));
    let source = match source {
        DROP if page == 0 => Source::Drop,
        ZERO if page == 0 => Source::Zero,
        copy if copy >= COPY => Source::Copy { layer: layer(copy - COPY)?, page },
        map => Source::Map { layer: layer(map)?, page },
    };
    // Every page it names must have a number.
    page.checked_add(run.count())?;
    Some(Entry { run, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry_of(first: u32, count: u32, source: Source) -> Entry {
        Entry { run: FrameRun::new(first, count).unwrap(), source }
    }

    #[test]
    fn plans_round_trip_and_have_this_form() {
        let plan = [
            entry_of(0, 2, Source::Map { layer: 1, page: 7 }),
            entry_of(2, 1, Source::Copy { layer: 0, page: 9 }),
            entry_of(5, 3, Source::Drop),
            entry_of(9, 1, Source::Zero),
        ];
        let bytes = encode(&plan).unwrap();
        assert_eq!(decode(&bytes, 10, 2), Ok(plan.to_vec()));
        let golden = [2u32, 1, 0x100, 9].map(u32::to_le_bytes).concat();
        assert_eq!(bytes[16..32], golden);
    }

    #[test]
    fn what_is_out_of_form_is_refused() {
        let good = encode(&[entry_of(4, 2, Source::Map { layer: 1, page: 0 })]).unwrap();
        assert!(decode(&good, 6, 2).is_ok());
        assert_eq!(decode(&good, 5, 2), Err(PlanError::Entry(0)), "outside the guest");
        assert_eq!(decode(&good, 6, 1), Err(PlanError::Entry(0)), "no such layer");
        assert_eq!(decode(&good[1..], 6, 2), Err(PlanError::Length(15)));
        let twice = [good.clone(), good].concat();
        assert_eq!(decode(&twice, 6, 2).map(|plan| plan.len()), Ok(2), "one lies over the other");
        for words in [[0, 0, 0, 0], [u32::MAX, 2, 0, 0], [0, 2, 0, u32::MAX], [0, 1, 0x300, 0]] {
            let bytes = words.map(u32::to_le_bytes).concat();
            assert_eq!(decode(&bytes, 100, 16), Err(PlanError::Entry(0)), "{words:?}");
        }
    }
}
