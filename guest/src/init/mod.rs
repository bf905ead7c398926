//! Process 1 of the guest: sets it up, starts the agent, buries the dead.
//!
//! Called by `main` when the kernel starts the program. Refuses to go on with a guest that is half
//! set up: the step that failed is on the console, and the machine resets, which the host sees.

mod loopback;
mod modules;
mod mounts;
mod supervise;

use std::convert::Infallible;
use std::ffi::CString;

use crate::agent::NOBODY;
use crate::http::error::chain;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("init cannot {step}")]
pub struct InitError {
    /// What it was about to do.
    step: String,
    /// Why it could not.
    #[source]
    source: std::io::Error,
}

impl InitError {
    /// For `map_err`: names the step.
    fn at<E: Into<std::io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self { step: step.into(), source: source.into() }
    }
}

/// Sets the guest up and never comes back.
pub fn run() -> ! {
    let Err(error) = set_up_and_supervise();
    eprintln!("mica-guest: {}", chain(&error));
    supervise::reset()
}

fn set_up_and_supervise() -> Result<Infallible, InitError> {
    mounts::early()?;
    modules::load_all()?;
    mounts::switch_to_disk()?;
    mounts::late()?;
    loopback::up()?;
    // Until the host says which sandbox this is.
    rustix::system::sethostname(NOBODY.as_bytes()).map_err(InitError::at("set the host name"))?;
    supervise::run()
}

/// Text of ours as the kernel takes it. None of it has a zero byte in it.
fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}
