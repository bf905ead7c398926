//! What the processors of this machine do for sandboxes: the daemon's threads, and its VM processes.
//!
//! Called by the tables of load and of creates. VM processes are counted by the control group that the daemon has them in
//! and holds open: its `cpu.stat` has also those that have ended, which no look at `/proc` would find. Refuses to guess
//! where daemon or group is not to be seen; what is seen is told, and a sum only of both.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::daemon::Daemon;
use super::host::Host;
use super::row::Row;
use super::table::Table;

/// Between two looks whether VM processes are at rest.
const LOOK: Duration = Duration::from_millis(100);
/// Looks one after the other that must find them so: between an end and what follows from it is a moment of rest.
const LOOKS: u32 = 3;
/// What they may take of a processor in one look and are at rest.
const STILL: Duration = Duration::from_millis(1);
/// Longest wait for that: on a host that others use it never comes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the daemon's threads.
    pub daemon: Duration,
    /// Of its VM processes, and of what runs in their guests; nothing where it is not to be seen.
    pub vms: Option<Duration>,
}

impl Usage {
    /// What was used since then.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let vms = self.vms.zip(before.vms).map(|(now, before)| now.saturating_sub(before));
        Self { daemon: self.daemon.saturating_sub(before.daemon), vms }
    }

    /// Sets a field for the daemon, one for its VM processes, and one for both.
    pub fn fields(self, row: &mut Row, name: &str, figure: impl Fn(Duration) -> f64) {
        row.set(&format!("daemon_{name}"), figure(self.daemon));
        if let Some(vms) = self.vms {
            row.set(&format!("vms_{name}"), figure(vms));
            row.set(name, figure(self.daemon + vms));
        }
    }
}

/// A daemon whose processor time is looked at.
#[derive(Clone, Debug)]
pub struct Watch {
    daemon: Daemon,
    /// The group that has its VM processes' groups in it.
    group: Option<PathBuf>,
}

impl Watch {
    /// The daemon of this number, or the one that the host is; what is not to be seen of it is noted in the table.
    pub fn of(host: &Host, pid: Option<u32>, table: &mut Table) -> Option<Self> {
        let found = pid.map_or_else(|| Daemon::find(host.socket), |pid| Ok(Daemon { pid }));
        let daemon = found.inspect_err(|error| {
            table.note(format!("the daemon's processor time is not to be seen from here: {error}"));
        });
        let daemon = daemon.ok()?;
        let group = group_of(daemon.pid).inspect_err(|error| {
            table.note(format!(
                "the processor time of VM processes is not to be seen from here, and is in no figure: {error:#}"
            ));
        });
        Some(Self { daemon, group: group.ok() })
    }

    /// Whether both are to be seen.
    #[must_use]
    pub fn sees_all(&self) -> bool {
        self.group.is_some()
    }

    /// What they have used since they began.
    ///
    /// # Errors
    /// When the daemon is gone.
    pub fn now(&self) -> Result<Usage> {
        let read = |group: &PathBuf| {
            let path = group.join("cpu.stat");
            let text = fs::read_to_string(&path)
                .with_context(|| format!("the daemon is gone: {}", path.display()))?;
            used(&text).with_context(|| format!("{} says no usage_usec", path.display()))
        };
        let vms = self.group.as_ref().map(read).transpose()?;
        Ok(Usage { daemon: self.daemon.cpu()?, vms })
    }

    /// The same, once VM processes have nothing to do: those that end are gone, and as many are made for the next.
    ///
    /// # Errors
    /// When the daemon is gone, or the run is to end.
    pub fn at_rest(&self, host: &Host) -> Result<Usage> {
        let deadline = Instant::now() + PATIENCE;
        let (mut before, mut calm) = (self.now()?, 0);
        while calm < LOOKS && Instant::now() < deadline {
            host.rest(LOOK);
            host.go_on()?;
            let now = self.now()?;
            let is_calm = now.since(before).vms.is_none_or(|moved| moved < STILL);
            calm = if is_calm { calm + 1 } else { 0 };
            before = now;
        }
        Ok(before)
    }
}

/// The control group that a daemon holds open, which is how it keeps others from it.
fn group_of(pid: u32) -> Result<PathBuf> {
    let open = format!("/proc/{pid}/fd");
    let links = fs::read_dir(&open).with_context(|| format!("look at {open}"))?;
    // By way of the descriptor: the daemon may see other mounts than this program.
    let is_group =
        |path: &PathBuf| ["cgroup.procs", "cpu.stat"].iter().all(|file| path.join(file).exists());
    let groups = links.flatten().map(|link| link.path()).filter(is_group);
    // A VM process's own group may be open for a moment; it is below.
    let length = |path: &PathBuf| fs::read_link(path).map_or(usize::MAX, |to| to.as_os_str().len());
    groups.min_by_key(length).context("the daemon has no control group open")
}

/// What a group's `cpu.stat` says was used.
fn used(text: &str) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    line.trim().parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_a_group_used_is_read_whatever_else_it_says() {
        let text = "usage_usec 7655\nuser_usec 0\nsystem_usec 7655\n";
        assert_eq!(used(text), Some(Duration::from_micros(7655)));
        assert_eq!(
            (used("user_usec 1\n"), used("usage_usec many\n"), used("")),
            (None, None, None)
        );
    }

    #[test]
    fn the_group_is_the_uppermost_that_the_daemon_holds_open() {
        let root = std::env::temp_dir().join(format!("mica-usage-{}", std::process::id()));
        let below = root.join("of-one-vm");
        fs::create_dir_all(&below).unwrap();
        for group in [&root, &below] {
            fs::write(group.join("cgroup.procs"), "").unwrap();
            fs::write(group.join("cpu.stat"), "usage_usec 5000\n").unwrap();
        }
        let this = std::process::id();
        assert!(group_of(this).unwrap_err().to_string().contains("no control group open"));
        let open = (File::open(&below).unwrap(), File::open(&root).unwrap());
        let watch = Watch { daemon: Daemon { pid: this }, group: group_of(this).ok() };
        assert_eq!(fs::read_link(watch.group.as_ref().unwrap()).unwrap(), root);
        fs::write(root.join("cpu.stat"), "usage_usec 9000\n").unwrap();
        let now = watch.now().unwrap();
        assert!(watch.sees_all() && now.daemon > Duration::ZERO, "{now:?}");
        assert_eq!(now.vms, Some(Duration::from_millis(9)));
        drop(open);
        assert!(watch.now().is_err(), "what is no longer held open is not taken for nothing used");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_sum_is_said_of_both_alone() {
        let ms = Duration::from_millis;
        let before = Usage { daemon: ms(10), vms: Some(ms(100)) };
        let used = Usage { daemon: ms(13), vms: Some(ms(107)) }.since(before);
        let mut row = Row::default();
        used.fields(&mut row, "cpu_ms", |time| time.as_secs_f64() * 1e3);
        let fields = ["daemon_cpu_ms", "vms_cpu_ms", "cpu_ms"].map(|name| row.more[name].as_f64());
        assert_eq!(fields, [Some(3.0), Some(7.0), Some(10.0)]);
        let mut alone = Row::default();
        Usage { vms: None, ..used }.fields(&mut alone, "cpu_ms", |time| time.as_secs_f64());
        assert_eq!(alone.more.keys().collect::<Vec<_>>(), ["daemon_cpu_ms"]);
    }
}
