//! The daemon inside the host, as seen from outside: start it, ask its health, replace its programs.
//!
//! `up` and `status` call it. It speaks to the daemon itself only by `GET /health`.

use super::channel::Request;
use super::channel::client::Channel;
use super::channel::supervisor::DAEMON_LOG;
use super::drives::{Programs, TOOLS};
use super::qemu::API_PORT_INSIDE;
use anyhow::{Context as _, Result, bail};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Emulation is slow; a daemon that needs longer is stuck.
const HEALTH_MAX: Duration = Duration::from_secs(60);
const PROBE_MAX: Duration = Duration::from_secs(2);
const PROBE_PAUSE: Duration = Duration::from_millis(200);
/// The supervisor may have to wait for a drain and a kill.
const STOP_MAX: Duration = Duration::from_secs(45);

/// How long a sandbox may take to become ready: nested and emulated, a cold boot takes minutes when
/// the machine is busy.
const BOOT_DEADLINE_S: u32 = 300;

/// VM processes that each of its shards holds ready for each size: making one takes part of a second
/// here. As many at every time, so that who counts processes knows what to expect.
const POOL: &str = "2";

const LISTEN: &str = "--listen";

/// The daemon's command line inside the host.
pub fn command_line() -> Vec<String> {
    [
        &format!("{TOOLS}/bin/mica"),
        "serve",
        LISTEN,
        &format!("0.0.0.0:{API_PORT_INSIDE}"),
        "--store",
        "/var/lib/mica",
        "--key-file",
        &format!("{TOOLS}/api-key"),
        "--boot-deadline",
        &BOOT_DEADLINE_S.to_string(),
        "--pool-min",
        POOL,
        "--pool-max",
        POOL,
    ]
    .map(ToString::to_string)
    .to_vec()
}

/// The command line with more options. One that says where to listen takes the place of the usual.
fn with_options(options: &[String]) -> Vec<String> {
    let mut line = command_line();
    if options.iter().any(|option| option == LISTEN || option.starts_with("--listen=")) {
        let at = line.iter().position(|word| word == LISTEN).unwrap_or(line.len());
        line.drain(at..(at + 2).min(line.len()));
    }
    line.extend_from_slice(options);
    line
}

/// Starts or restarts the daemon, with more `options` than the usual ones, and waits until it answers on
/// `api_port`.
pub fn start(channel: &Channel, api_port: u16, options: &[String]) -> Result<()> {
    let argv = with_options(options);
    let started = channel.call(Request::DaemonStart { argv }, STOP_MAX);
    if let Err(error) = started {
        return Err(error.context(log_tail(channel)).context("start the daemon in the host"));
    }
    let deadline = Instant::now() + HEALTH_MAX;
    loop {
        if healthy(api_port) {
            return Ok(());
        }
        let state = channel.call(Request::DaemonStatus, PROBE_MAX);
        if let Ok(output) = &state
            && output.code != 0
            && output.text().contains("stopped")
        {
            bail!("the daemon ended at its start: {}\n{}", output.text(), log_tail(channel));
        }
        if Instant::now() > deadline {
            bail!("the daemon did not answer GET /health in {HEALTH_MAX:?}\n{}", log_tail(channel));
        }
        thread::sleep(PROBE_PAUSE);
    }
}

/// The end of the daemon's log, for an error message.
fn log_tail(channel: &Channel) -> String {
    let request = super::channel::client::exec_request(&["tail", "-n", "20", DAEMON_LOG]);
    match channel.call(request, PROBE_MAX) {
        Ok(output) => format!("its log ({DAEMON_LOG} in the host) ends:\n{}", output.text()),
        Err(error) => format!("its log could not be read: {error:#}"),
    }
}

/// True when `GET /health` answers 2xx on loopback.
pub fn healthy(port: u16) -> bool {
    health_status(port).is_ok_and(|status| (200..300).contains(&status))
}

fn health_status(port: u16) -> Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PROBE_MAX).context("connect")?;
    stream.set_read_timeout(Some(PROBE_MAX)).context("set the read timeout")?;
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .context("send GET /health")?;
    let mut head = [0_u8; 12];
    stream.read_exact(&mut head).context("read the status line")?;
    parse_status(&head).context("the answer is not HTTP/1.1")
}

fn parse_status(head: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(head).ok()?;
    text.strip_prefix("HTTP/1.1 ")?.parse().ok()
}

/// Replaces programs in the host. A running program keeps its old file until it ends.
pub fn push_programs(channel: &Channel, programs: &Programs, names: &[&str]) -> Result<()> {
    for name in names {
        let Some((path, _)) = programs.0.get(*name) else { continue };
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let script = "cat > \"$1.new\" && chmod 755 \"$1.new\" && mv \"$1.new\" \"$1\"";
        let target = format!("{TOOLS}/bin/{name}");
        let output = channel.exec_with_input(&["sh", "-c", script, "sh", &target], file)?;
        if output.code != 0 {
            bail!("put {name} into the host: {}", output.text());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_http_status_line_counts() {
        assert_eq!(parse_status(b"HTTP/1.1 204"), Some(204));
        assert_eq!(parse_status(b"HTTP/1.1 20x"), None);
        assert_eq!(parse_status(b"SSH-2.0-abcd"), None);
    }

    #[test]
    fn nothing_on_the_port_is_not_healthy() {
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        assert!(!healthy(port));
    }

    #[test]
    fn the_daemon_gets_its_store_and_key() {
        let line = command_line().join(" ");
        assert!(line.starts_with("/opt/mica/bin/mica serve --listen 0.0.0.0:3000 "), "{line}");
        assert!(line.contains("--store /var/lib/mica --key-file /opt/mica/api-key"), "{line}");
    }

    #[test]
    fn it_listens_where_an_option_says() {
        let line = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(ToString::to_string).collect();
            with_options(&options).join(" ")
        };
        assert!(line(&["--metrics", "off"]).ends_with("--metrics off"));
        for options in [["--listen", "127.0.0.1:3000"].as_slice(), &["--listen=127.0.0.1:3000"]] {
            let line = line(options);
            assert_eq!(line.matches("--listen").count(), 1, "{line}");
            assert!(line.starts_with("/opt/mica/bin/mica serve --store "), "{line}");
            assert!(line.ends_with("127.0.0.1:3000"), "{line}");
        }
    }
}
