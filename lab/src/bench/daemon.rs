//! The daemon, where it runs on this machine: which process it is, and how much of the processors it takes.
//!
//! Called by the tables of load and by `ab`. A host elsewhere, or behind a forwarded port, has none that could be
//! seen, and whoever asks says so. Refuses to take another program for the daemon.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How the daemon's program is called.
const NAME: &str = "mica";
/// `LISTEN`, as `/proc/net/tcp` writes it.
const LISTEN: &str = "0A";

/// A process of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Its number.
    pub pid: u32,
}

/// Whether an address is one of this machine.
#[must_use]
pub fn is_local(address: IpAddr) -> bool {
    // Only one's own addresses can be bound.
    TcpListener::bind(SocketAddr::new(address, 0)).is_ok()
}

impl Daemon {
    /// Finds the daemon that listens there.
    ///
    /// # Errors
    /// When it is not to be seen from here, with the reason.
    pub fn find(address: SocketAddr) -> Result<Self> {
        if !is_local(address.ip()) {
            bail!("{} is another machine", address.ip());
        }
        let mut sockets = Vec::new();
        for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
            if let Ok(text) = fs::read_to_string(file) {
                sockets.extend(listeners(&text, address.port()));
            }
        }
        let holds = |pid: u32| {
            let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            links.filter_map(|link| fs::read_link(link.path()).ok()).any(|link| {
                sockets.iter().any(|socket| link == Path::new(&format!("socket:[{socket}]")))
            })
        };
        let all = fs::read_dir("/proc").context("list /proc")?.flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        // A VM process may hold a duplicate: the name decides.
        let mut others = Vec::new();
        for pid in pids.filter(|pid| holds(*pid)) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.trim() == NAME || name.starts_with("mica-main") {
                return Ok(Self { pid });
            }
            others.push(name.trim().to_owned());
        }
        if others.is_empty() {
            bail!("no process is to be seen that listens on port {}", address.port());
        }
        bail!("what listens on port {} is {}, not the daemon", address.port(), others.join(", "))
    }

    /// How much time its threads have had on processors.
    ///
    /// # Errors
    /// When it is gone.
    pub fn cpu(self) -> Result<Duration> {
        let tasks = format!("/proc/{}/task", self.pid);
        let tasks = fs::read_dir(&tasks).with_context(|| format!("the daemon is gone: {tasks}"))?;
        let mut sum = Duration::ZERO;
        for task in tasks.flatten() {
            // A thread may end while it is looked at.
            if let Ok(text) = fs::read_to_string(task.path().join("schedstat")) {
                let first = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
                sum += Duration::from_nanos(first.context("a schedstat without its time")?);
            }
        }
        Ok(sum)
    }

    /// Memory of its own, in bytes: anonymous pages.
    #[must_use]
    pub fn memory_bytes(self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    }
}

/// Inodes of the sockets that listen on a port.
fn listeners(text: &str, port: u16) -> Vec<u64> {
    let wanted = format!(":{port:04X}");
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let listens = fields.get(1)?.ends_with(&wanted) && *fields.get(3)? == LISTEN;
        listens.then(|| fields.get(9)?.parse().ok())?
    };
    text.lines().skip(1).filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_listen_on_the_port_are_found() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1 0 100 0 0 10 0\n\
            1: 0100007F:0BB8 0100007F:9999 01 00000000:00000000 00:00000000 00000000 0 0 4712 1 0 100 0 0 10 0\n\
            2: 0100007F:0BB9 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4713 1 0 100 0 0 10 0\n";
        assert_eq!(listeners(text, 3000), [4711]);
        assert!(listeners(text, 1).is_empty());
    }

    #[test]
    fn another_program_is_not_taken_for_the_daemon() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = Daemon::find(socket.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("not the daemon"), "{error}");
        let far = Daemon::find("192.0.2.1:3000".parse().unwrap()).unwrap_err().to_string();
        assert!(far.contains("another machine"), "{far}");
    }

    #[test]
    fn time_on_processors_grows_with_work() {
        let this = Daemon { pid: std::process::id() };
        let before = this.cpu().unwrap();
        let mut sum = 0u64;
        while this.cpu().unwrap() == before {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(this.cpu().unwrap() > before && this.memory_bytes() > Some(0));
    }
}
