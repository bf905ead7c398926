//! One `mica-vm` process, driven as a shard drives it, but plainly and with blocking calls.
//!
//! Called by the native KVM tests, `boot-vm` and `bench-boot`. Refuses to wait without a deadline.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mica_units::PAGE_BYTES;
use mica_wire::vm::{
    BootConfig, Command, ControlSocket, EXCHANGE_BYTES, Event, FdRole, RestoreConfig, Shell,
    ShellConfig, console,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, pidfd_getfd, pidfd_open,
    pidfd_send_signal, set_child_subreaper, waitpid,
};

/// What a shell is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Whether there is a root disk.
    pub disk: bool,
    /// Length of the console memfd.
    pub console_bytes: u64,
    /// Whether the VM process tells what was written to memory.
    pub log_writes: bool,
}

/// What to boot.
#[derive(Debug)]
pub struct Boot {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// Kernel command line.
    pub cmdline: String,
    /// Length of the console memfd.
    pub console_bytes: u64,
    /// Kernel image.
    pub kernel: OwnedFd,
    /// Initial RAM file system.
    pub initramfs: Option<OwnedFd>,
    /// Root disk.
    pub disk: Option<OwnedFd>,
}

impl Boot {
    /// A kernel of these bytes, one vCPU, 64 MiB.
    ///
    /// # Errors
    /// When the machine has no descriptor or memory to give.
    pub fn of_image(kernel: &[u8]) -> Result<Self> {
        Ok(Self {
            vcpus: 1,
            memory_mib: 64,
            cmdline: String::new(),
            console_bytes: 64 * 1024,
            kernel: memfd_of("kernel", kernel)?,
            initramfs: None,
            disk: None,
        })
    }

    /// The shell it needs.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            disk: self.disk.is_some(),
            console_bytes: self.console_bytes,
            log_writes: false,
        }
    }
}

/// What to go on from.
#[derive(Debug, Default)]
pub struct Restore<'a> {
    /// What memory is mapped from.
    pub plan: Vec<u8>,
    /// The saved state.
    pub state: Vec<u8>,
    /// The new generation id.
    pub generation: [u8; 16],
    /// The root disk; never for a rollback.
    pub disk: Option<BorrowedFd<'a>>,
    /// The layers that the plan names.
    pub layers: Vec<BorrowedFd<'a>>,
}

/// A memfd with these contents.
///
/// # Errors
/// When the machine has no descriptor or memory to give.
pub fn memfd_of(name: &str, contents: &[u8]) -> Result<OwnedFd> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all_at(contents, 0)?;
    Ok(file.into())
}

/// A VM process.
#[derive(Debug)]
pub struct OneVm {
    pid: Pid,
    pidfd: OwnedFd,
    socket: ControlSocket,
    console: Option<File>,
    exchange: Option<File>,
    shell: Option<Shell>,
}

impl OneVm {
    /// Starts the process as this user and group. It says [`Event::Jailed`] when it is ready.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(program: &Path, id: u32) -> Result<Self> {
        Self::spawn_in(program, id, None)
    }

    /// As [`OneVm::spawn`], in this network namespace instead of one of its own.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn_in(program: &Path, id: u32, network: Option<BorrowedFd<'_>>) -> Result<Self> {
        // The VM's process is a child of the one started here, which ends: it comes to us then.
        set_child_subreaper(Some(Pid::INIT))?;
        let (near, far) = ControlSocket::pair()?;
        let mut process = Process::new(program);
        process.args(["--uid", &id.to_string(), "--gid", &id.to_string()]);
        if let Some(network) = network {
            process.args(["--netns", "1"]).stdout(Stdio::from(network.try_clone_to_owned()?));
        }
        process.stdin(Stdio::from(far.into_fd()));
        let mut first =
            process.spawn().with_context(|| format!("starting {}", program.display()))?;
        // It holds the far end, whose closing would never be seen.
        drop(process);
        let spawned = near.receive_event();
        let status = first.wait()?;
        let pid = match spawned {
            Ok(Event::Spawned { pid }) => i32::try_from(pid).ok().and_then(Pid::from_raw),
            other => bail!("the first process ended with {status} and said {other:?}"),
        };
        let pid = pid.context("a process has no such number")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd, socket: near, console: None, exchange: None, shell: None })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a command without waiting for anything.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn send(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<()> {
        Ok(self.socket.send_command(command, fds)?)
    }

    /// Sends the build command with all descriptors, without waiting for anything.
    ///
    /// # Errors
    /// When `/dev/kvm` cannot be opened, or the process is gone.
    pub fn send_build(&mut self, shape: &Shape) -> Result<()> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
        let console = sealed_memfd("console", shape.console_bytes)?;
        let exchange = sealed_memfd("exchange", EXCHANGE_BYTES)?;
        let config = ShellConfig {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
            disk: shape.disk,
            console_bytes: shape.console_bytes,
            exchange_bytes: EXCHANGE_BYTES,
            log_writes: shape.log_writes,
            fds: vec![FdRole::Kvm, FdRole::Console, FdRole::Exchange, FdRole::Spare],
        };
        let fds = [kvm.as_fd(), console.as_fd(), exchange.as_fd(), self.socket.as_fd()];
        self.send(&Command::Build(config), &fds)?;
        self.console = Some(console);
        self.exchange = Some(exchange);
        Ok(())
    }

    /// Has the shell built, and waits until it is.
    ///
    /// # Errors
    /// When anything else came than [`Event::Built`], or nothing for `patience`.
    pub fn build(&mut self, shape: &Shape, patience: Duration) -> Result<Shell> {
        self.send_build(shape)?;
        match self.next_event(patience)? {
            Some(Event::Built(shell)) => {
                self.shell = Some(shell);
                Ok(shell)
            }
            other => bail!("expected a shell, got {other:?}"),
        }
    }

    /// Sends the boot command to a shell, without waiting for anything.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn send_boot(&self, boot: &Boot) -> Result<()> {
        let mut roles = vec![FdRole::Kernel];
        let mut fds = vec![boot.kernel.as_fd()];
        for (role, fd) in [(FdRole::Initramfs, &boot.initramfs), (FdRole::Disk, &boot.disk)] {
            if let Some(fd) = fd {
                roles.push(role);
                fds.push(fd.as_fd());
            }
        }
        let cmdline = boot.cmdline.clone();
        let config = BootConfig { cmdline, disk_read_only: false, fds: roles };
        self.send(&Command::Boot(config), &fds)
    }

    /// Has a fitting shell built, and boots it. [`Event::Started`] follows.
    ///
    /// # Errors
    /// See [`OneVm::build`].
    pub fn boot(&mut self, boot: &Boot, patience: Duration) -> Result<()> {
        self.build(&boot.shape(), patience)?;
        self.send_boot(boot)
    }

    /// Sends the restore command to a shell or a frozen VM. [`Event::Started`] follows.
    ///
    /// # Errors
    /// When there is no shell, or the process is gone.
    pub fn send_restore(&self, restore: &Restore<'_>) -> Result<()> {
        let exchange = self.exchange.as_ref().context("nothing was built")?;
        let plan_bytes = restore.plan.len() as u64;
        exchange.write_all_at(&restore.plan, 0)?;
        exchange.write_all_at(&restore.state, plan_bytes.next_multiple_of(PAGE_BYTES))?;
        let mut roles = Vec::new();
        let mut fds = Vec::new();
        if let Some(disk) = restore.disk {
            roles.push(FdRole::Disk);
            fds.push(disk);
        }
        roles.extend(restore.layers.iter().map(|_| FdRole::Layer));
        fds.extend(&restore.layers);
        let config = RestoreConfig {
            plan_bytes,
            state_bytes: restore.state.len() as u64,
            generation: restore.generation,
            fds: roles,
        };
        self.send(&Command::Restore(config), &fds)
    }

    /// Freezes the VM, and takes its state out of the exchange.
    ///
    /// # Errors
    /// When the VM ended instead, or nothing came for `patience`.
    pub fn freeze(&self, patience: Duration) -> Result<Vec<u8>> {
        Ok(self.freeze_with_log(patience)?.0)
    }

    /// The same, with the log of what was written to memory.
    ///
    /// # Errors
    /// See [`OneVm::freeze`].
    pub fn freeze_with_log(&self, patience: Duration) -> Result<(Vec<u8>, Vec<u8>)> {
        self.send(&Command::Freeze, &[])?;
        loop {
            match self.next_event(patience)? {
                Some(Event::Frozen { state_bytes, log_bytes }) => {
                    let exchange = self.exchange.as_ref().context("nothing was built")?;
                    let part = |bytes: u64, at: u64| -> Result<Vec<u8>> {
                        let mut part = vec![0; usize::try_from(bytes)?];
                        exchange.read_exact_at(&mut part, at)?;
                        Ok(part)
                    };
                    let log_at = state_bytes.next_multiple_of(PAGE_BYTES);
                    return Ok((part(state_bytes, 0)?, part(log_bytes, log_at)?));
                }
                // What the guest did just before.
                Some(Event::ConsoleStarted | Event::Doorbell) => {}
                other => bail!("expected a frozen VM, got {other:?}"),
            }
        }
    }

    /// Lets a frozen VM go on, and waits until it does.
    ///
    /// # Errors
    /// When anything else came than [`Event::Thawed`], or nothing for `patience`.
    pub fn thaw(&self, patience: Duration) -> Result<()> {
        self.send(&Command::Thaw, &[])?;
        self.expect(&Event::Thawed, patience)
    }

    /// The shell, as it reported itself.
    ///
    /// # Errors
    /// When none was built.
    pub fn shell(&self) -> Result<Shell> {
        self.shell.context("nothing was built")
    }

    /// Guest memory, seen from outside: frame `n` at `n` pages from [`Shell::memory_address`].
    ///
    /// # Errors
    /// When this process may not look into that one.
    pub fn memory(&self) -> Result<File> {
        let path = format!("/proc/{}/mem", self.pid());
        File::options().read(true).write(true).open(&path).context(path)
    }

    /// The bytes of so many frames from `first` on.
    ///
    /// # Errors
    /// When this process may not look into that one, or there are no such frames.
    pub fn frames(&self, first: u32, count: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(u64::from(count) * PAGE_BYTES)?];
        let at = self.shell()?.memory_address + u64::from(first) * PAGE_BYTES;
        self.memory()?.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// A descriptor of that process, by its number there.
    ///
    /// # Errors
    /// When there is none, or this process may not take it.
    pub fn descriptor(&self, number: i32) -> Result<OwnedFd> {
        let flags = PidfdGetfdFlags::empty();
        Ok(pidfd_getfd(&self.pidfd, number, flags)?)
    }

    /// Closes this end of the control socket, as a daemon that is killed does, and goes on with
    /// another one.
    pub fn change_socket(&mut self, socket: OwnedFd) {
        self.socket = ControlSocket::from_fd(socket);
    }

    /// The next event, or `None` when the process closed the socket.
    ///
    /// # Errors
    /// When nothing came for `patience`.
    pub fn next_event(&self, patience: Duration) -> Result<Option<Event>> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = Timespec::try_from(patience)?;
        ensure!(poll(&mut fds, Some(&timeout))? > 0, "no event for {patience:?}");
        match self.socket.receive_event() {
            Ok(event) => Ok(Some(event)),
            Err(mica_wire::vm::SocketError::Closed) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for exactly this event, refusing another.
    ///
    /// # Errors
    /// When another event or the end came, or nothing for `patience`.
    pub fn expect(&self, wanted: &Event, patience: Duration) -> Result<()> {
        match self.next_event(patience)? {
            Some(event) if event == *wanted => Ok(()),
            other => {
                let text = self.console_text();
                let tail = text.get(text.len().saturating_sub(400)..).unwrap_or_default();
                bail!("expected {wanted:?}, got {other:?}; console ends with {tail:?}")
            }
        }
    }

    /// All bytes the guest wrote so far that are still in the ring, oldest first, and how many it
    /// wrote in all.
    ///
    /// # Errors
    /// When nothing was booted.
    pub fn console(&self) -> Result<(Vec<u8>, u64)> {
        let file = self.console.as_ref().context("nothing was booted")?;
        let mut header = [0; 8];
        file.read_exact_at(&mut header, 0)?;
        let total = u64::from_le_bytes(header);
        let capacity = file.metadata()?.len() - console::HEADER_BYTES;
        let mut ring = vec![0; usize::try_from(capacity)?];
        file.read_exact_at(&mut ring, console::HEADER_BYTES)?;
        if total <= capacity {
            ring.truncate(usize::try_from(total)?);
        } else {
            ring.rotate_left(usize::try_from(total % capacity)?);
        }
        Ok((ring, total))
    }

    /// The console as text, for messages.
    #[must_use]
    pub fn console_text(&self) -> String {
        self.console().map_or_else(
            |error| format!("(no console: {error})"),
            |(bytes, _)| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it does not end within `patience`; it is killed then.
    pub fn wait(self, patience: Duration) -> Result<ExitStatus> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let start = Instant::now();
        if poll(&mut fds, Some(&Timespec::try_from(patience)?))? == 0 {
            // Dropping it kills it.
            bail!("mica-vm still ran after {:?}", start.elapsed());
        }
        self.reap().context("somebody else has waited for mica-vm")
    }

    /// Waits for it. `None` when that was done already.
    fn reap(&self) -> Option<ExitStatus> {
        match retry_on_intr(|| waitpid(Some(self.pid), WaitOptions::empty())) {
            Ok(Some((_, status))) => Some(ExitStatus::from_raw(status.as_raw())),
            Ok(None) | Err(_) => None,
        }
    }
}

impl Drop for OneVm {
    fn drop(&mut self) {
        // A test that failed half-way leaves a process behind otherwise. A process that was waited
        // for has no number any more, and the descriptor never means another one.
        if pidfd_send_signal(&self.pidfd, Signal::KILL).is_ok() && self.reap().is_none() {
            eprintln!("could not reap mica-vm {}", self.pid());
        }
    }
}

/// A memfd of this length that stays so.
fn sealed_memfd(name: &str, bytes: u64) -> Result<File> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(fd.into())
}

/// A network namespace with nothing in it, for VM processes to share.
///
/// # Errors
/// When the kernel refuses; it takes root.
pub fn empty_network() -> Result<OwnedFd> {
    // A thread of its own makes it, because a thread that leaves a namespace does not come back.
    let made = std::thread::spawn(|| -> std::io::Result<OwnedFd> {
        #[expect(deprecated, reason = "its successor is unsafe for CLONE_FILES, not asked for")]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    });
    Ok(made.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??)
}

/// The `mica-vm` to drive: `MICA_VM`, or the one beside this program, or one directory up (where
/// cargo puts binaries relative to tests).
///
/// # Errors
/// When there is none.
pub fn find_mica_vm() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MICA_VM") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let candidates = own.ancestors().skip(1).take(2).map(|folder| folder.join("mica-vm"));
    candidates.into_iter().find(|path| path.is_file()).context(
        "mica-vm is not beside this program; build it with `cargo build -p mica-vmm`, or set MICA_VM",
    )
}
