//! `mica-lab status` and `mica-lab env`: what a person and a script want to know.
//!
//! Both only look. `status` says by its exit code whether the lab, and its daemon, are up.

use super::channel::Request;
use super::daemon;
use super::state::Home;
use anyhow::{Context as _, Result};
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(5);

/// The lines to print, and whether everything that should run does.
pub fn status(home: &Home) -> Result<(String, bool)> {
    let Some(pid) = home.qemu()? else {
        return Ok((format!("lab {}: down", home.name), false));
    };
    let Some(lab) = home.load()? else {
        let line =
            format!("lab {}: QEMU runs as pid {} without state", home.name, pid.as_raw_nonzero());
        return Ok((line, false));
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
    let host = lab.channel().answers(PATIENCE);
    let daemon = match lab.channel().call(Request::DaemonStatus, PATIENCE) {
        Ok(output) => output.text(),
        Err(_) => "unknown".to_owned(),
    };
    let healthy = daemon::healthy(lab.api_port);
    let text = format!(
        "lab {}: up for {} s, QEMU pid {}\n\
         machine: {} sockets × {} cores, {} MiB, kernel {}\n\
         host: {}\n\
         daemon: {daemon}; GET /health on {} {}\n\
         console: {}",
        home.name,
        now.saturating_sub(lab.started_unix_s),
        pid.as_raw_nonzero(),
        lab.shape.sockets,
        lab.shape.cores_per_socket,
        lab.shape.memory_mib,
        lab.kernel_release,
        if host { "answers" } else { "does not answer" },
        lab.api_url(),
        if healthy { "answers" } else { "does not answer" },
        home.console_log().display(),
    );
    Ok((text, host && (healthy || !lab.daemon)))
}

/// Shell exports for a client of the lab's daemon.
pub fn exports(home: &Home) -> Result<String> {
    let lab = home.running()?;
    let path = home.key_file();
    let key = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let url = lab.api_url();
    Ok(format!(
        "export E2B_API_URL={url}\nexport E2B_SANDBOX_URL={url}\nexport E2B_API_KEY={}",
        key.trim()
    ))
}
