//! Connect's envelopes: what is wrapped comes out, and a stream's bytes are taken apart in bounds.
//!
//! Run by libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mica_guest::connect::envelope;
use mica_guest::untrusted;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = envelope::single(bytes) {
        // Only what was wrapped comes out, so wrapping it again gives the same front.
        let again = envelope::message(&message);
        assert!(bytes[1..].starts_with(&again[1..]));
    }
    // A stream is the same however it is cut on its way.
    let cut = |step: u8| untrusted::connect_frames(&[&[step], bytes].concat());
    assert_eq!(cut(1), cut(255));
    assert_eq!(cut(7), cut(255));
    std::hint::black_box(untrusted::connect_messages(bytes));
    let wrapped = envelope::message(bytes);
    assert_eq!(envelope::single(&wrapped).ok().as_deref(), Some(bytes));
    let mut ended = wrapped.to_vec();
    ended.extend_from_slice(&envelope::end(None));
    assert_eq!(envelope::single(&ended).ok().as_deref(), Some(bytes));
    // Cut anywhere, it is refused.
    for at in [0, 1, 4, 5, wrapped.len() / 2, wrapped.len().saturating_sub(1)] {
        if at < wrapped.len() {
            assert!(envelope::single(&wrapped[..at]).is_err());
        }
    }
});
