//! `mica-lab down`: switches the emulated host off.
//!
//! It asks the host first, so that the store is clean; then QEMU; then it kills. It touches only
//! the process and the files of the lab it was given.

use super::channel::Request;
use super::progress::say;
use super::qmp::Qmp;
use super::state::{self, Home};
use anyhow::{Result, bail};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

/// The daemon may take 30 s to stop; the store's unmount a few more.
const ASK_MAX: Duration = Duration::from_secs(45);
const OFF_MAX: Duration = Duration::from_secs(15);
const QUIT_MAX: Duration = Duration::from_secs(10);

/// Ends the lab; `wipe` also drops the store and the API key.
pub fn down(home: &Home, wipe: bool) -> Result<()> {
    if !home.directory.exists() {
        say("the lab is down");
        return Ok(());
    }
    let _lock = home.lock()?;
    let was_up = home.qemu()?.is_some();
    if was_up {
        stop(home)?;
    }
    home.forget_start()?;
    if wipe {
        state::remove(&home.store_drive())?;
        state::remove(&home.key_file())?;
    }
    say(match (was_up, wipe) {
        (true, false) => "the lab is down; its store is kept",
        (true, true) => "the lab is down; its store is removed",
        (false, false) => "the lab was down",
        (false, true) => "the lab was down; its store is removed",
    });
    Ok(())
}

/// Asks, then insists. An unreadable state only means that asking is skipped.
fn stop(home: &Home) -> Result<()> {
    match home.load() {
        Ok(Some(lab)) => match lab.channel().call(Request::PowerOff, ASK_MAX) {
            Ok(_) if ended(home, OFF_MAX)? => return Ok(()),
            Ok(_) => say("the host did not switch itself off"),
            Err(error) => say(&format!("the host cannot be asked to switch off: {error:#}")),
        },
        Ok(None) => say("there is no state of this lab; ending its QEMU"),
        Err(error) => say(&format!("{error:#}")),
    }
    match Qmp::connect(&home.qmp_socket()).and_then(|mut qmp| qmp.command("quit", json!({}))) {
        Ok(_) => {}
        Err(error) => say(&format!("QEMU cannot be asked to quit: {error:#}")),
    }
    if ended(home, QUIT_MAX)? {
        return Ok(());
    }
    say("killing QEMU");
    home.kill_qemu()?;
    if !ended(home, QUIT_MAX)? {
        bail!("QEMU is still there after SIGKILL; its pid is in {}", home.pid_file().display());
    }
    Ok(())
}

fn ended(home: &Home, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        if home.qemu()?.is_none() {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(50));
    }
}
