//! The form of the store's ids: 20 characters of base 36, drawn at random.
//!
//! Called wherever a template, a snapshot or a layer gets its name, or a name is about to be joined
//! to a path. Refuses everything else, so that an id is safe as one component of a path.

use std::io;

/// Characters of an id: 103 bits.
pub(crate) const CHARS: usize = 20;

/// Whether `text` has the form of an id.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == CHARS && text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
}

/// A random id. The modulo bias (256 mod 36) does not matter for a name.
pub(crate) fn random() -> io::Result<[u8; CHARS]> {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut random = [0u8; CHARS];
    #[cfg(test)]
    if seeded::fill(&mut random) {
        return Ok(random.map(|byte| DIGITS[usize::from(byte) % DIGITS.len()]));
    }
    let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    if got != random.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(random.map(|byte| DIGITS[usize::from(byte) % DIGITS.len()]))
}

/// A random id, as text.
pub(crate) fn random_text() -> io::Result<String> {
    Ok(random()?.iter().map(|byte| char::from(*byte)).collect())
}

/// Ids from a seed, for the histories that a seed decides.
#[cfg(test)]
pub(crate) mod seeded {
    use std::cell::RefCell;

    use crate::simulation::Random;

    thread_local! {
        static RANDOM: RefCell<Option<Random>> = const { RefCell::new(None) };
    }

    /// Draws all ids of this thread from a seed; from the kernel again with `None`.
    pub(crate) fn set(seed: Option<u64>) {
        RANDOM.set(seed.map(Random::new));
    }

    pub(super) fn fill(bytes: &mut [u8]) -> bool {
        RANDOM.with_borrow_mut(|random| {
            let Some(random) = random else { return false };
            bytes.fill_with(|| random.next().to_le_bytes()[0]);
            true
        })
    }
}
