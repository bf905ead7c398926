//! One rule for tests that need what a machine may not have: they say so and check nothing, unless
//! `REQUIRE_…=1` names it, which makes that a failure.
//!
//! Called by tests, those of the daemon too. Refuses to decide what is required: `make unit` and `.ci/run`
//! do.

/// Says that a test ends early, and why; where `REQUIRE_` and `what` is 1, that is a failure.
#[track_caller]
pub fn skip(what: &str, missing: &str) {
    let name = format!("REQUIRE_{what}");
    let required = std::env::var_os(&name).is_some_and(|value| value == "1");
    assert!(!required, "{name}=1, and {missing}");
    eprintln!("skipped: {missing}");
}
