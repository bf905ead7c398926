//! Query strings and paths: what is decoded is what was encoded, and a list filter is refused or kept.
//!
//! Run by libFuzzer.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use mica_http::fuzzing;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// As a stranger writes it.
    raw: &'a str,
    /// As our own client would have to write it.
    pairs: Vec<(&'a str, &'a str)>,
    segment: &'a str,
}

fuzz_target!(|input: Input<'_>| {
    // Whatever it is, it is an answer and no panic, in every reading there is.
    fuzzing::list_query(input.raw);
    fuzzing::snapshot_query(input.raw);
    if let Some(pairs) = fuzzing::query_pairs(input.raw) {
        assert!(pairs.len() <= input.raw.split('&').count());
    }
    let written: Vec<_> =
        input.pairs.iter().map(|(k, v)| format!("{}={}", percent(k), percent(v))).collect();
    let read = fuzzing::query_pairs(&written.join("&")).expect("it is in form");
    let pairs: Vec<_> = input.pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    assert_eq!(read, pairs);
    assert_eq!(fuzzing::decode_segment(&percent(input.segment)).as_deref(), Some(input.segment));
    let guest = mica_guest::http::query::decode(&percent(input.segment), false);
    assert_eq!(guest.as_deref(), Some(input.segment));
});

/// Every byte encoded: whatever it is, it comes out as it was.
fn percent(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
