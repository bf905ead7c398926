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
use std::path::PathBuf;

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
    rustix::system::sethostname(b"mica").map_err(InitError::at("set the host name"))?;
    let program = copy_self()?;
    supervise::run(&program)
}

/// The program outlives the initramfs it came in, so that it can start itself again.
fn copy_self() -> Result<PathBuf, InitError> {
    let directory = PathBuf::from("/run/mica");
    std::fs::create_dir_all(&directory).map_err(InitError::at("make /run/mica"))?;
    let program = directory.join("mica-guest");
    // `/proc/self/exe` works although the path it names is gone with the initramfs.
    std::fs::copy("/proc/self/exe", &program).map_err(InitError::at("copy itself to /run/mica"))?;
    let mode = rustix::fs::Mode::from_raw_mode(0o755);
    rustix::fs::chmod(&program, mode).map_err(InitError::at("make its copy executable"))?;
    Ok(program)
}

/// Text of ours as the kernel takes it. None of it has a zero byte in it.
fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}
