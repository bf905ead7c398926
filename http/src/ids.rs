//! Sandbox ids as clients write them.
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

#[cfg(test)]
mod tests {
    use super::*;

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
