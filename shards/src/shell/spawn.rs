//! Starts VM processes, on blocking threads, and takes back what they had.
//!
//! Called by the pool. What is made for a process is found again by its name, so taking back works
//! from any half-way point. Refuses to leave a process outside its control group.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mica_numa::Placement;
use mica_units::SandboxId;
use mica_wire::vm::{self, ControlSocket, EXCHANGE_BYTES, Event, FdRole, ShellConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, ftruncate, memfd_create};
use rustix::process::Pid;

use super::process::last_words;
use super::{Pins, Size, VmProcess};
use crate::HostConfig;
use crate::cgroup::{CgroupError, Cgroups};
use crate::console;

/// How long a process may take from its start to saying its number.
const SPAWN_DEADLINE: Duration = Duration::from_secs(20);

/// A step of making a VM process that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}{said}")]
pub(crate) struct SpawnError {
    step: String,
    /// What the process wrote about it, if anything.
    said: String,
    /// Whether something may still run under its uid.
    pub(crate) leaves_process: bool,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn step<E>(step: impl Into<String>) -> impl FnOnce(E) -> SpawnError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let step = step.into();
    move |source| SpawnError {
        step,
        said: String::new(),
        leaves_process: false,
        source: source.into(),
    }
}

/// A VM process on its way to being a shell.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) name: SandboxId,
    pub(crate) uid: u32,
    pub(crate) process: VmProcess,
    pub(crate) control: ControlSocket,
    pub(crate) console: OwnedFd,
    pub(crate) exchange: OwnedFd,
    build: ShellConfig,
    build_fds: Vec<OwnedFd>,
}

impl Launched {
    /// The command that makes it a shell.
    pub(crate) fn command(&self) -> vm::Command {
        vm::Command::Build(self.build.clone())
    }

    /// What goes beside it.
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.build_fds.iter().map(AsFd::as_fd).collect()
    }
}

/// What starts VM processes. Cheap to clone and to send to a blocking thread.
#[derive(Clone, Debug)]
pub(crate) struct Launcher {
    pub(crate) config: Arc<HostConfig>,
    pub(crate) cgroups: Cgroups,
    /// The network namespace without anything in it that all VM processes share.
    pub(crate) netns: Arc<OwnedFd>,
    /// Where they belong.
    pub(crate) placement: Arc<Placement>,
    /// Who has which hardware thread.
    pub(crate) pins: Pins,
}

impl Launcher {
    /// Starts a process and puts it into its control group. Blocks. Where that fails, nothing is left, or
    /// the error says so.
    pub(crate) fn launch(
        &self,
        name: SandboxId,
        uid: u32,
        size: Size,
    ) -> Result<Launched, SpawnError> {
        self.try_launch(name, uid, size).map_err(|error| {
            let taken_back = self.take_back(&name).inspect_err(|error| {
                tracing::error!(%name, %error, "a VM process that did not start left its cgroup");
            });
            SpawnError { leaves_process: taken_back.is_err(), ..error }
        })
    }

    fn try_launch(&self, name: SandboxId, uid: u32, size: Size) -> Result<Launched, SpawnError> {
        self.cgroups.create(&name, size.memory, size.vcpus).map_err(step("making its cgroup"))?;
        let console_bytes = self.config.console_bytes;
        let console = console::create(console_bytes).map_err(step("making its console"))?;
        let exchange = make_exchange().map_err(step("making its exchange"))?;
        let (near, far) = ControlSocket::pair().map_err(step("making its control socket"))?;
        let (spare, twin) = duplicate(&near, &console).map_err(step("making its descriptors"))?;
        let process = self.start(&name, uid, far, &near)?;
        rustix::io::ioctl_fionbio(&near, true).map_err(step("making its control socket"))?;
        let mut roles = vec![FdRole::Spare, FdRole::Console, FdRole::Exchange];
        let exchange_twin = exchange.try_clone().map_err(step("making its descriptors"))?;
        let mut build_fds = vec![spare, twin, exchange_twin];
        // A machine without KVM has other VM programs; `mica-vm` says so itself.
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(kvm) => {
                roles.push(FdRole::Kvm);
                build_fds.push(kvm.into());
            }
            Err(error) => tracing::debug!(%error, "no /dev/kvm to give to the VM process"),
        }
        let build = ShellConfig {
            vcpus: u32::from(size.vcpus.get()),
            memory_mib: size.memory.count(),
            disk: size.disk,
            console_bytes,
            exchange_bytes: EXCHANGE_BYTES,
            log_writes: self.config.log_writes || !process.pagemap().can_track_writes(),
            fds: roles,
        };
        Ok(Launched { name, uid, process, control: near, console, exchange, build, build_fds })
    }

    fn start(
        &self,
        name: &SandboxId,
        uid: u32,
        far: ControlSocket,
        near: &ControlSocket,
    ) -> Result<VmProcess, SpawnError> {
        let netns = self.netns.try_clone().map_err(step("making its descriptors"))?;
        let mut command = Command::new(&self.config.vm_program);
        command
            // Descriptor 1 is the network namespace: see `mica-vm --help`.
            .args(["--uid", &uid.to_string(), "--gid", &uid.to_string(), "--netns", "1"])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::from(far.into_fd()))
            .stdout(Stdio::from(netns))
            .stderr(Stdio::piped());
        let program = self.config.vm_program.display();
        let started = self.placement.start(|| command.spawn()).map_err(step("placing it"))?;
        let mut child = started.map_err(step(format!("starting {program}")))?;
        // Our copy of the other end must go, or its closing would never be seen.
        drop(command);
        self.adopt(name, &mut child, near).map_err(|error| {
            let words = give_up(name, &mut child);
            let said = if words.is_empty() { words } else { format!(" (it wrote: {words})") };
            SpawnError { said, ..error }
        })
    }

    /// The first process puts its child into a pid namespace, says the child's number, and ends.
    /// Both are moved into the control group; what the child did before is a few pages.
    fn adopt(
        &self,
        name: &SandboxId,
        child: &mut Child,
        near: &ControlSocket,
    ) -> Result<VmProcess, SpawnError> {
        let moving = || step("moving it into its cgroup");
        self.cgroups.add(name, child.id()).map_err(moving())?;
        let patience = SPAWN_DEADLINE.min(self.config.boot_deadline);
        let number = spawned_pid(near, patience).map_err(step("waiting for its first word"))?;
        if number != child.id() {
            self.cgroups.add(name, number).map_err(moving())?;
        }
        let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(rustix::io::Errno::SRCH).map_err(step("watching its process"))?;
        let process = VmProcess::open(pid, &mut child.stderr);
        let process = process.map_err(step("watching its process"))?;
        if number != child.id() {
            child.wait().map_err(step("reaping the process that started it"))?;
        }
        Ok(process)
    }

    /// Kills what is left in the control group, and removes it. Blocks.
    pub(crate) fn take_back(&self, name: &SandboxId) -> Result<(), CgroupError> {
        self.cgroups.kill(name)?;
        self.cgroups.remove(name)
    }
}

/// Ends what did not start. What it wrote to its standard error.
fn give_up(name: &SandboxId, child: &mut Child) -> String {
    // Killed first, so the wait is short.
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::error!(%name, %error, "cannot reap a VM process");
    }
    // Without waiting: something that it started may hold the other end.
    let quiet = |pipe: &ChildStderr| rustix::io::ioctl_fionbio(pipe, true).is_ok();
    child.stderr.take().filter(quiet).as_mut().map(last_words).unwrap_or_default()
}

fn spawned_pid(near: &ControlSocket, patience: Duration) -> io::Result<u32> {
    let mut fds = [PollFd::new(near, PollFlags::IN)];
    let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
    if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&patience)))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match near.receive_event().map_err(io::Error::other)? {
        Event::Spawned { pid } => Ok(pid),
        Event::Ended(ending) => Err(io::Error::other(format!("it ended: {ending:?}"))),
        other => Err(io::Error::other(format!("it said {other:?}"))),
    }
}

fn duplicate(near: &ControlSocket, console: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok((near.as_fd().try_clone_to_owned()?, console.try_clone()?))
}

fn make_exchange() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("mica-exchange", flags)?;
    ftruncate(&fd, EXCHANGE_BYTES)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Makes the network namespace that VM processes share: nothing is in it, not even loopback is up.
pub(crate) fn empty_network() -> io::Result<OwnedFd> {
    // A thread of its own makes it, because leaving a namespace is for ever.
    let made = std::thread::Builder::new().name("netns".to_owned()).spawn(|| {
        #[expect(
            deprecated,
            reason = "its successor is unsafe for CLONE_FILES, not asked for here"
        )]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)?;
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    })?;
    made.join().map_err(|_| io::Error::other("the thread panicked"))?
}
