//! Sandbox ids as clients write them, and UUIDs for what has no id of its own.
//!
//! Called by the API and the proxy, so that both take and refuse the same ones. Refuses nothing by
//! itself: what is no id of ours is still told apart from what cannot be an id at all.

/// Old clients append `-CLIENT` to an id; that part is dropped.
#[must_use]
pub fn without_client(text: &str) -> &str {
    text.split_once('-').map_or(text, |(id, _)| id)
}

/// Whether E2B would take the text for an id: 0-9 and a-z, not empty.
#[must_use]
pub fn is_e2b_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// A UUID, as clients demand it: the same for the same bytes (version 8 of RFC 9562).
#[must_use]
pub fn uuid_of(bytes: impl IntoIterator<Item = u8>) -> String {
    /// FNV-1a, 128 bits.
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash =
        bytes.into_iter().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let digits = format!("{hash:032x}");
    let variant = "89ab".chars().nth(usize::try_from(hash & 3).unwrap_or(0)).unwrap_or('8');
    let (a, b, c, d, e) =
        (&digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..]);
    format!("{a}-{b}-8{c}-{variant}{d}-{e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_uuids_that_differ_and_stay() {
        let id = uuid_of(*b"a");
        assert_eq!(id, uuid_of(*b"a"));
        assert_ne!(id, uuid_of(*b"b"));
        let lengths: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12], "{id}");
        assert!(id.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()), "{id}");
        assert_eq!(&id[14..15], "8", "{id}");
        assert!("89ab".contains(&id[19..20]), "{id}");
    }

    #[test]
    fn forms() {
        assert_eq!(without_client("iabc-6532622b"), "iabc");
        assert_eq!(without_client("iabc"), "iabc");
        assert!(is_e2b_id("nonexistingsandbox"));
        for bad in ["", "A", "a/..", "..", "a b", "a\u{e9}"] {
            assert!(!is_e2b_id(bad), "{bad:?}");
        }
    }
}
