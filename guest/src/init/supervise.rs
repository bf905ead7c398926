//! Runs the agent, waits for every child that ends, and resets the machine when the agent does.
//!
//! Called by init as its last step. Refuses to outlive the agent: a sandbox that cannot be reached
//! is worth nothing to anyone.

use std::convert::Infallible;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, WaitOptions};
use rustix::system::RebootCommand;

use super::InitError;

/// This very program. The path it came in by is gone with the initramfs, but while it runs the
/// kernel keeps its file, and starts it again through this link. A copy would cost its memory twice.
const SELF: &str = "/proc/self/exe";

/// What the agent, and through it every command, looks programs up in.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Open files of each process: the kernel's default of 1024 is too few for servers.
const OPEN_FILES_SOFT: u64 = 65_536;
const OPEN_FILES_HARD: u64 = 1_048_576;

/// Watchers of directories that each user may have: the kernel's 128 are too few for the agent's,
/// which count against the user who watches, beside the user's own.
const WATCHERS: (&str, &[u8]) = ("/proc/sys/fs/inotify/max_user_instances", b"1024");

/// Starts the agent and waits until it ends.
pub fn run() -> Result<Infallible, InitError> {
    let limit = Rlimit { current: Some(OPEN_FILES_SOFT), maximum: Some(OPEN_FILES_HARD) };
    rustix::process::setrlimit(Resource::Nofile, limit)
        .map_err(InitError::at("raise the limit of open files"))?;
    let (path, number) = WATCHERS;
    if let Err(error) = std::fs::write(path, number) {
        // What is over the kernel's own limit is refused with a reason.
        eprintln!("mica-guest: cannot raise {path}: {error}");
    }
    let agent = Command::new(SELF)
        .arg0("mica-guest")
        .arg("agent")
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null())
        // A group of its own: the kernel starts process 1 in group 0, which no call can name.
        .process_group(0)
        .spawn()
        .map_err(InitError::at("start the agent"))?;
    let agent = i32::try_from(agent.id()).unwrap_or(-1);
    protect(agent);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_nonzero().get() == agent => {
                let how = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("exit status {code}"),
                    (None, Some(signal)) => format!("signal {signal}"),
                    (None, None) => "an unknown cause".to_owned(),
                };
                return Err(InitError::at("go on without the agent")(std::io::Error::other(how)));
            }
            // An orphan: its parent is gone and nobody else will ask.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(InitError::at("wait for children")(errno)),
        }
    }
}

/// Memory that runs out must not cost the sandbox its agent. Where it cannot be said, the agent
/// is as mortal as the rest.
fn protect(agent: i32) {
    if let Err(error) = std::fs::write(format!("/proc/{agent}/oom_score_adj"), b"-1000") {
        eprintln!("mica-guest: cannot protect the agent from the OOM killer: {error}");
    }
}

/// Resets the machine, in the way the kernel's `reboot=` says: what a VMM without ACPI sees as the
/// end, where a power-off would leave the kernel idle for ever.
pub fn reset() -> ! {
    rustix::fs::sync();
    if let Err(errno) = rustix::system::reboot(RebootCommand::Restart) {
        eprintln!("mica-guest: cannot reset the machine: {errno}");
    }
    // Process 1 that ends makes the kernel panic, and `panic=-1` resets at once.
    std::process::exit(1)
}
