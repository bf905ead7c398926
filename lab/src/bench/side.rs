//! One side of an A/B run: a `mica` of its own, with a store, keys, a port and control groups of its own.
//!
//! Called by `mica bench ab`. Needs root, as the daemon does. Refuses to leave anything: the daemon, its VM processes and
//! its files go with the value.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::daemon::Daemon;
use super::host::Address;
use crate::engine::place::{cgroup_mount, end_what_is_left};

/// What sandboxes are made of, on both sides.
const TEMPLATE: &str = "bench";
/// Longest wait for a daemon to begin or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// What the sandboxes of both sides are.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The stand-in, which isolates nothing: the daemon alone is measured.
    StandIn {
        /// Its program.
        program: PathBuf,
        /// The agent that it runs; without one it is its own.
        agent: Option<PathBuf>,
    },
    /// A VM.
    Vm {
        /// Its program.
        program: PathBuf,
        /// What `mica template add` is told besides names and places.
        template_args: Vec<String>,
    },
}

/// A daemon under measurement.
#[derive(Debug)]
pub struct Side {
    child: Option<Child>,
    directory: PathBuf,
    cgroup: PathBuf,
    /// Where it is.
    pub address: Address,
    /// Its process.
    pub daemon: Daemon,
}

impl Side {
    /// Starts it in `directory`, which must not be there.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(
        mica: &Path,
        serve_args: &[String],
        guest: &Guest,
        directory: &Path,
    ) -> Result<Self> {
        fs::create_dir(directory).with_context(|| format!("make {}", directory.display()))?;
        let mount = cgroup_mount()?;
        let name = directory.file_name().context("a directory without a name")?;
        let listen = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let address = Address {
            url: format!("http://{listen}"),
            api_key: String::new(),
            template: TEMPLATE.to_owned(),
        };
        let (cgroup, directory) = (mount.join(name), directory.to_owned());
        let daemon = Daemon { pid: 0 };
        // From here on whatever fails takes back what was made.
        let mut side = Self { child: None, directory, cgroup, address, daemon };
        let controllers = fs::read_to_string(mount.join("cgroup.controllers"))?;
        let limits =
            ["memory", "pids"].iter().all(|one| controllers.split_whitespace().any(|c| c == *one));
        let without: &[&str] = if limits { &[] } else { &["--without-cgroup-limits"] };
        let vm_program = side.vm_program(guest)?;
        side.add_template(mica, guest, &vm_program, without)?;
        let mut command = Command::new(mica);
        command
            .args(["serve", "--listen", &listen.to_string(), "--accept-unusable-kvm"])
            .args(without)
            .arg("--store")
            .arg(side.directory.join("store"))
            .arg("--key-file")
            .arg(side.directory.join("keys"))
            .arg("--cgroup-root")
            .arg(&side.cgroup)
            .arg("--vm-program")
            .arg(&vm_program)
            .args(serve_args)
            .env("MICA_LOG", "error")
            .stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("run {}", mica.display()))?;
        side.daemon = Daemon { pid: child.id() };
        side.child = Some(child);
        side.wait_until_up(listen)?;
        Ok(side)
    }

    /// The daemon passes a VM program no options of ours, so a script adds them.
    fn vm_program(&self, guest: &Guest) -> Result<PathBuf> {
        let (program, options) = match guest {
            Guest::Vm { program, .. } => return Ok(program.clone()),
            Guest::StandIn { program, agent: None } => (program, "--builtin-agent".to_owned()),
            Guest::StandIn { program, agent: Some(agent) } => {
                (program, format!("--guest '{}'", agent.display()))
            }
        };
        let script = self.directory.join("vm");
        let text = format!("#!/bin/sh\nexec '{}' {options} \"$@\"\n", program.display());
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(script)
    }

    fn add_template(
        &self,
        mica: &Path,
        guest: &Guest,
        vm_program: &Path,
        without: &[&str],
    ) -> Result<()> {
        let mut command = Command::new(mica);
        command
            .args(["template", "add", "--name", TEMPLATE, "--accept-unusable-kvm"])
            .args(without)
            .arg("--store")
            .arg(self.directory.join("store"))
            .arg("--vm-program")
            .arg(vm_program)
            .arg("--cgroup-root")
            .arg(self.warm_cgroup());
        match guest {
            Guest::Vm { template_args, .. } => command.args(template_args),
            Guest::StandIn { .. } => {
                // The stand-in looks at neither.
                let (kernel, disk) = (self.directory.join("kernel"), self.directory.join("disk"));
                fs::write(&kernel, "not a kernel")?;
                fs::write(&disk, vec![0x5a; 1 << 20])?;
                command.args(["--ready", "agent", "--memory", "16", "--kernel"]).arg(kernel);
                command.arg("--disk").arg(disk)
            }
        };
        let done = command.output().with_context(|| format!("run {}", mica.display()))?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "mica template add: {}", said.trim());
        Ok(())
    }

    fn warm_cgroup(&self) -> PathBuf {
        self.cgroup.with_extension("warm")
    }

    fn wait_until_up(&mut self, listen: SocketAddr) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let keys = self.directory.join("keys");
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("mica serve ended with {status}; what it said is above");
            }
            let key = fs::read_to_string(&keys).unwrap_or_default();
            if let Some(key) = key.lines().find(|line| !line.is_empty() && !line.starts_with('#'))
                && TcpStream::connect(listen).is_ok()
            {
                key.trim().clone_into(&mut self.address.api_key);
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "mica serve does not listen");
            thread::sleep(LOOK);
        }
    }

    /// Asks it to stop, and waits for a bounded time.
    fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("no number")?, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("mica serve did not end in time and was killed");
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let complain = |error: &anyhow::Error| eprintln!("mica-bench: {error:#}");
        if let Err(error) = self.stop() {
            complain(&error);
        }
        for group in [self.cgroup.clone(), self.warm_cgroup()] {
            let ended = end_what_is_left(&group);
            let removed = ended.and_then(|()| match fs::remove_dir(&group) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            });
            if let Err(error) = removed {
                complain(&error.context(format!("{} stays", group.display())));
            }
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("mica-bench: {} stays: {error}", self.directory.display());
        }
    }
}
