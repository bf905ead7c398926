//! That a program built without the feature `breakout` has nothing of it.
//!
//! Run with the other tests. Refuses nothing: with the feature there is nothing to check here, and
//! `breakout.rs` checks that the word is found where it is.

#![cfg(not(feature = "breakout"))]
#![forbid(unsafe_code)]

#[test]
fn the_word_of_the_break_out_attempts_is_not_in_the_program() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_mica-vm")).unwrap();
    let word = b"MICA_BREAKOUT";
    assert!(!program.windows(word.len()).any(|window| window == word));
    let there = b"mica-vm: standard input is closed";
    assert!(program.windows(there.len()).any(|window| window == there), "the search finds nothing");
}
