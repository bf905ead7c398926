//! The code interpreter against real kernels, over real HTTP.
//!
//! Needs a Python with what `tests/python/requirements.txt` names, named by `MICA_TEST_PYTHON`. Without
//! it every test here says so and checks nothing, unless `REQUIRE_TEST_PYTHON=1`, which makes that a
//! failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod aborts;
mod kernels;
mod optional;
mod python;
#[path = "../required/mod.rs"]
mod required;
mod support;
