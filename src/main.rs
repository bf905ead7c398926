//! The `mica` command.
#![forbid(unsafe_code)]
fn main() {}
