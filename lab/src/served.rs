//! `mica serve` as a child of a benchmark: started on a free port, waited for, asked to end; and the places it has.
//!
//! Called by everything here that measures a daemon of its own: `engine::standin`, `engine::http`, `bench::side`, and
//! `bench-http`. Needs root, as the daemon does. Refuses to leave anything: process, control groups and files go with
//! the values.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::bench::daemon::Daemon;
use crate::engine::client::Client;
use crate::engine::place::{cgroup_mount, end_what_is_left};

/// Longest wait for a daemon to begin or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Serve<'a> {
    /// Its program.
    pub mica: &'a Path,
    /// Its store.
    pub store: &'a Path,
    /// Its keys, which it makes.
    pub keys: &'a Path,
    /// Its control groups.
    pub cgroup: &'a Path,
    /// What it runs for each sandbox.
    pub vm_program: &'a Path,
}

/// A daemon that listens.
#[derive(Debug)]
pub struct Served {
    child: Child,
    /// Where.
    pub address: SocketAddr,
    /// One of its keys.
    pub key: String,
}

impl Served {
    /// Starts one, with these options more of `mica serve`.
    ///
    /// # Errors
    /// When it does not come to listen.
    pub fn start(
        serve: &Serve<'_>,
        options: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let Serve { mica, store, keys, cgroup, vm_program } = serve;
        let child = Command::new(mica)
            .args(["serve", "--listen", &address.to_string()])
            .args([OsStr::new("--store"), store.as_ref(), "--key-file".as_ref(), keys.as_ref()])
            .args([OsStr::new("--cgroup-root"), cgroup.as_ref()])
            .args([OsStr::new("--vm-program"), vm_program.as_ref()])
            .args(options)
            .env("MICA_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("run {}", mica.display()))?;
        // From here on whatever fails ends the child.
        let mut served = Self { child, address, key: String::new() };
        let deadline = Instant::now() + PATIENCE;
        while !served.is_up(keys) {
            if let Some(status) = served.child.try_wait()? {
                bail!("mica serve ended with {status}; what it said is above");
            }
            ensure!(Instant::now() < deadline, "mica serve does not listen");
            thread::sleep(LOOK);
        }
        Ok(served)
    }

    /// Whether it has its keys, of which the first is taken, and listens.
    fn is_up(&mut self, keys: &Path) -> bool {
        let text = fs::read_to_string(keys).unwrap_or_default();
        let is_key = |line: &&str| !line.is_empty() && !line.starts_with('#');
        let Some(key) = text.lines().map(str::trim).find(is_key) else { return false };
        key.clone_into(&mut self.key);
        TcpStream::connect(self.address).is_ok()
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> Daemon {
        Daemon { pid: self.child.id() }
    }

    /// A connection to its API, with its key and these headers.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn client(&self, headers: &[(&str, &str)]) -> Result<Client> {
        Client::open(self.address, &[&[("X-API-Key", self.key.as_str())], headers].concat())
    }

    /// Asks it to end, and waits for a bounded time.
    fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("no number")?, Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("mica serve did not end in time and was killed");
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("the daemon of a benchmark: {error:#}");
        }
    }
}

/// A directory, and the control groups of a daemon that has its files there. Whoever has both a [`Served`] and this
/// drops the daemon first.
#[derive(Debug)]
pub struct Places {
    /// The directory.
    pub directory: PathBuf,
    /// The daemon's control group.
    pub cgroup: PathBuf,
}

impl Places {
    /// Makes the directory, which must not be there. The control group goes by its name; the daemon makes it.
    ///
    /// # Errors
    /// When it cannot be made, or there are no control groups.
    pub fn make(directory: PathBuf) -> Result<Self> {
        let name = directory.file_name().context("a directory without a name")?;
        let cgroup = cgroup_mount()?.join(name);
        fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Self { directory, cgroup })
    }

    /// The control group of a template that is warmed.
    #[must_use]
    pub fn warm_cgroup(&self) -> PathBuf {
        self.cgroup.with_extension("warm")
    }

    /// A daemon's places in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        for group in [self.cgroup.clone(), self.warm_cgroup()] {
            let removed = end_what_is_left(&group).and_then(|()| match fs::remove_dir(&group) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            });
            if let Err(error) = removed {
                eprintln!("{} stays: {error:#}", group.display());
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays: {error}", self.directory.display());
        }
    }
}

/// The option that this machine's control groups make `mica serve` and `mica template add` need, if they do.
///
/// # Errors
/// When there are no control groups.
pub fn without_limits() -> Result<Option<&'static str>> {
    let controllers = fs::read_to_string(cgroup_mount()?.join("cgroup.controllers"))?;
    let has = |wanted| controllers.split_whitespace().any(|name| name == wanted);
    Ok(if has("memory") && has("pids") { None } else { Some("--without-cgroup-limits") })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Places, and a program there that is called as the daemon would be.
    fn places(name: &str, program: &str) -> (Places, PathBuf) {
        let name = format!("mica-served-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        // Nothing runs in it, so that it need not be one.
        let places = Places { cgroup: directory.join("cgroup"), directory };
        let mica = places.path("mica");
        fs::write(&mica, format!("#!/bin/sh\n{program}\n")).unwrap();
        fs::set_permissions(&mica, fs::Permissions::from_mode(0o755)).unwrap();
        (places, mica)
    }

    fn start(places: &Places, mica: &Path) -> Result<Served> {
        let (store, keys) = (places.path("store"), places.path("keys"));
        let cgroup = &places.cgroup;
        let serve = Serve { mica, store: &store, keys: &keys, cgroup, vm_program: mica };
        Served::start(&serve, ["--shards", "7"])
    }

    #[test]
    fn a_daemon_that_ends_is_told_with_its_status_and_what_it_was_started_with() {
        let (places, mica) = places("ends", "echo \"$@\" > \"$(dirname \"$0\")/words\"; exit 3");
        let error = start(&places, &mica).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        let words = fs::read_to_string(places.path("words")).unwrap();
        let directory = places.directory.clone();
        assert!(words.starts_with("serve --listen 127.0.0.1:"), "{words}");
        let keys = format!("--key-file {}/keys --cgroup-root", directory.display());
        assert!(words.contains(&keys) && words.ends_with(" --shards 7\n"), "{words}");
        drop(places);
        assert!(!directory.exists());
    }

    #[test]
    fn one_that_cannot_be_run_is_named_and_a_directory_that_is_there_is_not_taken() {
        let (places, _) = places("named", "");
        let error = start(&places, Path::new("/no/such/mica")).unwrap_err().to_string();
        assert_eq!(error, "run /no/such/mica");
        assert!(Places::make(places.directory.clone()).is_err());
        assert!(places.directory.exists());
    }
}
