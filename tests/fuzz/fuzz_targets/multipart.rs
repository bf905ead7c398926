//! `multipart/form-data`: however a body is cut on its way, its parts are the same.
//!
//! Run by libFuzzer. Holds that no input makes the splitter loop, hold more than it says, or give a
//! piece out of order.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use mica_guest::filesystem::multipart::{MultipartError, Piece, Splitter};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    content_type: &'a str,
    /// Where the body is cut, in turn.
    cuts: Vec<u8>,
    body: &'a [u8],
}

/// A part: its head, and all of its data.
type Parts = Vec<(String, Vec<u8>)>;

fn split(input: &Input<'_>, cuts: &[u8]) -> Result<Parts, MultipartError> {
    let mut splitter = Splitter::new(input.content_type)?;
    let (mut parts, mut open, mut rest) = (Parts::new(), false, input.body);
    let mut cuts = cuts.iter().cycle();
    loop {
        while let Some(piece) = splitter.next_piece()? {
            match piece {
                Piece::Begin(head) => {
                    assert!(!open, "a part begins in another");
                    open = true;
                    parts.push((format!("{head:?}"), Vec::new()));
                }
                Piece::Data(data) => {
                    assert!(open && !data.is_empty(), "data of no part, or none");
                    parts.last_mut().expect("a part").1.extend_from_slice(&data);
                }
                Piece::End => {
                    assert!(open, "the end of no part");
                    open = false;
                }
                Piece::Done => assert!(!open, "done inside a part"),
            }
        }
        if rest.is_empty() {
            return splitter.finish().map(|()| parts);
        }
        let length = cuts.next().map_or(rest.len(), |cut| usize::from(*cut) + 1).min(rest.len());
        let (now, later) = rest.split_at(length);
        splitter.push(now);
        rest = later;
    }
}

fuzz_target!(|input: Input<'_>| {
    let whole = split(&input, &[]);
    let cut = split(&input, &input.cuts);
    assert_eq!(whole, cut, "it matters how the body was cut");
    if let Ok(parts) = whole {
        let data: usize = parts.iter().map(|(_, data)| data.len()).sum();
        assert!(data <= input.body.len(), "more came out than went in");
    }
});
