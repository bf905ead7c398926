//! The `Range` header of a download.
//!
//! Called by [`super::download`]. Pure. Ignores what it does not understand and requests for
//! several ranges, as HTTP allows: the whole file is then the answer.

/// Which bytes to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// From `first` to `last`, both included.
    Range {
        first: u64,
        last: u64,
    },
    /// Nothing of the file is in the range.
    Unsatisfiable,
}

/// Reads `bytes=first-last`, `bytes=first-` or `bytes=-count` for a file of `size` bytes.
pub fn parse(header: &str, size: u64) -> Part {
    let Some(range) = header.trim().strip_prefix("bytes=") else { return Part::Whole };
    let Some((first, last)) = range.trim().split_once('-') else { return Part::Whole };
    let end = size.checked_sub(1);
    match (number(first), number(last), end) {
        (Ok(Some(first)), Ok(Some(last)), _) if last < first => Part::Whole,
        (Ok(Some(first)), Ok(last), Some(end)) if first <= end => {
            Part::Range { first, last: last.unwrap_or(end).min(end) }
        }
        (Ok(None), Ok(Some(count)), Some(end)) if count > 0 => {
            Part::Range { first: size.saturating_sub(count), last: end }
        }
        (Ok(Some(_)), Ok(_), _) | (Ok(None), Ok(Some(_)), _) => Part::Unsatisfiable,
        _ => Part::Whole,
    }
}

/// `Ok(None)` for nothing at all. A number beyond 64 bits is beyond every file.
fn number(text: &str) -> Result<Option<u64>, ()> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    Ok(Some(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = |first, last| Part::Range { first, last };
        for (header, size, wanted) in [
            ("bytes=0-3", 10, range(0, 3)),
            ("bytes=4-", 10, range(4, 9)),
            ("bytes=-3", 10, range(7, 9)),
            ("bytes=-30", 10, range(0, 9)),
            ("bytes=5-500", 10, range(5, 9)),
            ("bytes=5-99999999999999999999999", 10, range(5, 9)),
            ("bytes=10-", 10, Part::Unsatisfiable),
            ("bytes=-0", 10, Part::Unsatisfiable),
            ("bytes=0-", 0, Part::Unsatisfiable),
            ("bytes=3-2", 10, Part::Whole),
            ("bytes=0-1,4-5", 10, Part::Whole),
            ("bytes=-", 10, Part::Whole),
            ("bytes=a-b", 10, Part::Whole),
            ("bytes=+1-2", 10, Part::Whole),
            ("lines=0-1", 10, Part::Whole),
        ] {
            assert_eq!(parse(header, size), wanted, "{header} of {size}");
        }
    }
}
