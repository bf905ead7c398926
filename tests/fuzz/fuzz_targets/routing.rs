//! Hosts and paths: what names a sandbox goes there, and internal routes of the agent never do.
//!
//! Run by libFuzzer. The routes are found a second time, the slow way.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use mica_http::fuzzing;

const INTERNAL: [&str; 7] =
    ["init", "freeze", "unfreeze", "fsfreeze", "fsthaw", "collapse", "upgrade"];

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Joined into a path; some name an internal route.
    segments: Vec<Segment<'a>>,
    raw: &'a str,
}

#[derive(Arbitrary, Debug)]
enum Segment<'a> {
    Text(&'a str),
    Internal(u8),
    Up,
    Here,
    Nothing,
}

fuzz_target!(|input: Input<'_>| {
    // Anything at all is an answer.
    fuzzing::is_internal(input.raw);
    for method in [http::Method::GET, http::Method::POST, http::Method::DELETE] {
        fuzzing::route(&method, input.raw);
    }
    let mut stack: Vec<String> = Vec::new();
    let mut path = String::new();
    for segment in &input.segments {
        let text = match segment {
            Segment::Text(text) => (*text).to_owned(),
            Segment::Internal(n) => INTERNAL[usize::from(*n) % INTERNAL.len()].to_owned(),
            Segment::Up => "..".to_owned(),
            Segment::Here => ".".to_owned(),
            Segment::Nothing => String::new(),
        };
        path.push('/');
        path.extend(text.bytes().map(|byte| format!("%{byte:02X}")));
        for part in text.split(['/', '\\']) {
            match part {
                "" | "." => {}
                ".." => drop(stack.pop()),
                part => stack.push(part.to_ascii_lowercase()),
            }
        }
    }
    let internal = stack.len() == 1 && INTERNAL.contains(&stack[0].as_str());
    assert_eq!(fuzzing::is_internal(&path), internal, "{path}");
});
