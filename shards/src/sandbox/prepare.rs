//! Makes what a sandbox needs before its guest can boot, and takes all of it back.
//!
//! Called by the driver, on blocking threads. Making it may fail anywhere: taking back works by the
//! sandbox's id and finds whatever there is. Refuses to leave a process unreaped.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use mica_numa::rt::{self, time};
use mica_storage::{ReadyWhen, Store, Template};
use mica_units::SandboxId;
use mica_wire::vm::{self, BootConfig, ControlSocket, FdRole};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::state::{Cause, Ready};
use crate::HostConfig;
use crate::cgroup::{CgroupError, Cgroups};
use crate::console;

/// How long a killed VM process may take to be reaped before the log says so, again and again.
const REAP_WARNING: Duration = Duration::from_secs(10);

/// Most bytes of a VM process's standard error that an error carries.
const STDERR_BYTES_MAX: usize = 1024;

/// What a shard needs to make sandboxes. Cheap to clone and to send to a blocking thread.
#[derive(Clone, Debug)]
pub(crate) struct Workshop {
    /// The operator's decisions.
    pub(crate) config: std::sync::Arc<HostConfig>,
    /// Templates and disks.
    pub(crate) store: Store,
    /// Limits.
    pub(crate) cgroups: Cgroups,
}

/// A sandbox ready to boot.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// What it was made from.
    pub(crate) template: Template,
    /// Its process.
    pub(crate) process: VmProcess,
    /// The shard's end of the control socket, non-blocking.
    pub(crate) control: ControlSocket,
    /// What its guest will write to.
    pub(crate) console: OwnedFd,
    /// The boot command, and the descriptors beside it.
    pub(crate) boot: Boot,
}

/// The boot command.
#[derive(Debug)]
pub(crate) struct Boot {
    config: BootConfig,
    fds: Vec<OwnedFd>,
}

impl Boot {
    /// The command.
    pub(crate) fn command(&self) -> vm::Command {
        vm::Command::Boot(self.config.clone())
    }

    /// What goes beside it.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd).collect()
    }
}

/// A VM process: alive, or dead and not yet reaped.
#[derive(Debug)]
pub(crate) struct VmProcess {
    child: Child,
    pidfd: OwnedFd,
    stderr: Option<ChildStderr>,
}

/// When a template counts as up, in the words of the state machine.
pub(crate) fn ready_of(template: &Template) -> Ready {
    match template.manifest().ready {
        ReadyWhen::Agent => Ready::Agent,
        ReadyWhen::Console => Ready::Console,
    }
}

impl Workshop {
    /// Makes disk, cgroup, console and process. Blocks.
    pub(crate) fn prepare(
        &self,
        id: &SandboxId,
        template: &str,
        uid: u32,
    ) -> Result<Prepared, Cause> {
        let template = match self.store.find_template(template) {
            Ok(Some(template)) => template,
            Ok(None) => return Err(Cause::NoSuchTemplate),
            Err(error) => return Err(failed("finding the template", &error)),
        };
        let manifest = template.manifest();
        let console = console::create(self.config.console_bytes)
            .map_err(|error| failed("making its console", &error))?;
        let boot = self.boot(id, &template, &console)?;
        self.cgroups
            .create(id, manifest.memory, manifest.vcpus)
            .map_err(|error| failed("making its cgroup", &error))?;
        let (near, far) =
            ControlSocket::pair().map_err(|error| failed("making its control socket", &error))?;
        rustix::io::ioctl_fionbio(&near, true)
            .map_err(|error| failed("making its control socket", &error))?;
        let process = self.spawn(id, far, uid)?;
        Ok(Prepared { template, process, control: near, console, boot })
    }

    /// Opens everything the guest boots from.
    fn boot(&self, id: &SandboxId, template: &Template, console: &OwnedFd) -> Result<Boot, Cause> {
        let manifest = template.manifest();
        let mut roles = vec![FdRole::Kernel, FdRole::Console];
        let kernel = template.open_kernel().map_err(|e| failed("opening the kernel", &e))?;
        let console = console.try_clone().map_err(|e| failed("making its console", &e))?;
        let mut fds = vec![OwnedFd::from(kernel), console];
        let initramfs = template.open_initramfs().map_err(|e| failed("opening initramfs", &e))?;
        if let Some(initramfs) = initramfs {
            roles.push(FdRole::Initramfs);
            fds.push(initramfs.into());
        }
        if manifest.has_disk() {
            let disk = self.store.create_disk(template, id);
            roles.push(FdRole::Disk);
            fds.push(disk.map_err(|e| failed("making its disk", &e))?.into());
        }
        // A machine without KVM has other VM programs; `mica-vm` says so itself.
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(kvm) => {
                roles.push(FdRole::Kvm);
                fds.push(kvm.into());
            }
            Err(error) => tracing::debug!(%error, "no /dev/kvm to give to the VM process"),
        }
        let config = BootConfig {
            vcpus: u32::from(manifest.vcpus.get()),
            memory_mib: manifest.memory.count(),
            cmdline: manifest.cmdline.clone(),
            disk_read_only: false,
            console_bytes: self.config.console_bytes,
            fds: roles,
        };
        Ok(Boot { config, fds })
    }

    /// Starts the VM process and puts it into its cgroup. It waits for commands until then.
    fn spawn(&self, id: &SandboxId, far: ControlSocket, uid: u32) -> Result<VmProcess, Cause> {
        let mut command = Command::new(&self.config.vm_program);
        command
            .args(["--uid", &uid.to_string(), "--gid", &uid.to_string()])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::from(far.into_fd()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            let program = self.config.vm_program.display();
            failed(&format!("starting {program}"), &error)
        })?;
        // Our copy of the other end must go, or its closing would never be seen.
        drop(command);
        match self.adopt(id, &mut child) {
            Ok((pidfd, stderr)) => Ok(VmProcess { child, pidfd, stderr }),
            Err(cause) => {
                // Killed first, so the wait is short.
                if let Err(error) = child.kill().and_then(|()| child.wait()) {
                    tracing::error!(%id, %error, "cannot reap a VM process");
                }
                Err(cause)
            }
        }
    }

    fn adopt(
        &self,
        id: &SandboxId,
        child: &mut Child,
    ) -> Result<(OwnedFd, Option<ChildStderr>), Cause> {
        self.cgroups
            .add(id, child.id())
            .map_err(|error| failed("moving it into its cgroup", &error))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| failed("watching its process", &error))?;
        let stderr = child.stderr.take();
        if let Some(pipe) = &stderr {
            rustix::io::ioctl_fionbio(pipe, true)
                .map_err(|error| failed("watching its process", &error))?;
        }
        Ok((pidfd, stderr))
    }

    /// Removes what is kept by id: cgroup and disk. The process must be dead. Blocks.
    pub(crate) fn take_back(&self, id: &SandboxId) -> Result<(), TakeBackError> {
        let killed = self.cgroups.kill(id);
        let cgroup = killed.and_then(|()| self.cgroups.remove(id));
        let disk = self.store.remove_sandbox(id);
        // Both are tried; the cgroup is told of first, for it may still run something.
        cgroup.map_err(TakeBackError::Cgroup)?;
        disk.map_err(|error| TakeBackError::Disk(Box::new(error)))
    }
}

/// What could not be taken back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeBackError {
    /// Something may still run under its uid.
    #[error("cannot remove the sandbox's cgroup")]
    Cgroup(#[source] CgroupError),
    /// Disk space is lost until the next start.
    #[error("cannot remove the sandbox's disk; the next start of the daemon will")]
    Disk(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl VmProcess {
    /// Kills it, waits for its death without blocking, and reaps it.
    pub(crate) async fn end(mut self, id: &SandboxId) {
        if let Err(errno) = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL)
            && errno != rustix::io::Errno::SRCH
        {
            tracing::error!(%id, %errno, "cannot kill a VM process");
        }
        loop {
            let dead = time::timeout(REAP_WARNING, rt::readable(&self.pidfd)).await;
            match dead {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    tracing::error!(%id, %error, "cannot wait for a VM process; asking again");
                    time::sleep(Duration::from_millis(100)).await;
                    if !matches!(self.child.try_wait(), Ok(None)) {
                        break;
                    }
                }
                Err(time::Elapsed) => tracing::error!(%id, "a killed VM process does not end"),
            }
        }
        // It is dead, so this does not block.
        match self.child.wait() {
            Ok(status) => tracing::debug!(%id, %status, "VM process reaped"),
            Err(error) => tracing::error!(%id, %error, "cannot reap a VM process"),
        }
    }

    /// What it wrote to its standard error, as harmless text; reads once, does not wait.
    pub(crate) fn complaint(&mut self) -> String {
        let mut bytes = [0u8; STDERR_BYTES_MAX];
        let length = match &mut self.stderr {
            Some(pipe) => pipe.read(&mut bytes).unwrap_or(0),
            None => 0,
        };
        console::sanitise(&bytes[..length]).trim().to_owned()
    }
}

/// A step that failed, with every cause of its error.
pub(crate) fn failed(step: &str, error: &dyn std::error::Error) -> Cause {
    Cause::Failed(format!("{step}: {}", chain(error)))
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Checks that the VM program can be run at all, at start and not at the first create.
pub(crate) fn check_program(config: &HostConfig) -> io::Result<()> {
    let metadata = File::open(&config.vm_program)?.metadata()?;
    use std::os::unix::fs::PermissionsExt;
    let runnable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    if runnable { Ok(()) } else { Err(io::Error::other("it is not an executable file")) }
}
