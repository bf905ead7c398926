//! `mica-lab serve`: a lab that lives as long as the command in front of it.
//!
//! `mica serve` becomes it where KVM cannot run Linux, so that the same command gives a host on any
//! machine. Follows the daemon's log until a signal, then switches the host off. Refuses to leave the
//! host running behind its caller's back.

use super::channel::supervisor::DAEMON_LOG;
use super::progress::say;
use super::state::Home;
use super::{down, status};
use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::thread;

/// Shows the daemon's log until SIGINT or SIGTERM, then takes the lab down.
pub fn follow(home: &Home) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("listen for signals")?;
    let channel = home.running()?.channel();
    println!("{}", status::exports(home)?);
    say("following the daemon's log; Ctrl-C switches the host off");
    // Ends with the process: it only prints.
    thread::spawn(move || {
        let argv = ["tail", "-n", "+1", "-F", DAEMON_LOG].map(str::to_owned).to_vec();
        if let Err(error) = channel.exec_attached(argv) {
            say(&format!("the daemon's log ended: {error:#}"));
        }
    });
    if signals.forever().next().is_some() {
        say("switching the host off");
    }
    down::down(home, false)
}
