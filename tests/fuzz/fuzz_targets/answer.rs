//! Answers of servers in sandboxes: the same however they are cut, and nothing but what was said.
//!
//! Run by libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mica_http::fuzzing::answer;

fuzz_target!(|bytes: &[u8]| {
    for to_head in [false, true] {
        let whole = answer(bytes, usize::MAX, to_head);
        for step in [1, 2, 7, 64] {
            assert_eq!(answer(bytes, step, to_head), whole, "in pieces of {step}");
        }
        let Some((status, fields)) = &whole.head else { continue };
        assert!(*status >= 200 || *status == 101);
        assert!(whole.content.len() <= bytes.len());
        // Whoever reads the fields alone finds the same end.
        let ends_by_itself = !to_head && !matches!(status, 101 | 204 | 304);
        let is_chunked = fields.contains_key("transfer-encoding");
        if let (Some(length), false, true) =
            (fields.get("content-length"), is_chunked, ends_by_itself)
            && whole.behind.is_some()
        {
            let first = length.to_str().ok().and_then(|text| text.split(',').next());
            let length = first.and_then(|text| text.trim().parse::<usize>().ok());
            assert_eq!(length, Some(whole.content.len()));
        }
        assert!(!whole.may_go_on || is_chunked || fields.contains_key("content-length"));
    }
    // What is written as chunks comes out as it went in, and what stands behind stays there.
    let mut written = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for piece in bytes.chunks(61) {
        written.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        written.extend_from_slice(piece);
        written.extend_from_slice(b"\r\n");
    }
    written.extend_from_slice(b"0\r\nx-end: 1\r\n\r\nbehind");
    let read = answer(&written, 13, false);
    assert_eq!((read.content.as_slice(), read.behind), (bytes, Some(6)));
    assert!(read.may_go_on && read.trailers.is_some_and(|fields| fields["x-end"] == "1"));
    // Cut short, it is refused.
    assert!(answer(&written[..written.len() - 7], 13, false).is_refused);
});
