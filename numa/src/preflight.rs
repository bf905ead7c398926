//! What the machine must grant before an executor starts.
//!
//! Called by `seat` and by the binary's doctor. Refuses to go on where glommio would panic, and
//! says what to change.

use std::io;

use io_uring::opcode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Locked memory for one executor: [`crate::seat::IO_MEMORY_BYTES`], registered with each of its three
/// rings, and what else glommio asks for (512 KiB at the least).
const MEMLOCK_BYTES_PER_SEAT: u64 = 1 << 20;

const _: () = assert!(MEMLOCK_BYTES_PER_SEAT >= 3 * crate::seat::IO_MEMORY_BYTES as u64);
const _: () = assert!(MEMLOCK_BYTES_PER_SEAT >= 512 << 10);

/// Open files that are asked for: a sandbox holds about five.
pub const OPEN_FILES: u64 = 1 << 20;

/// Why executors cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// The system call is not there.
    #[error("this kernel has no io_uring; Linux 6.7 or newer, built with CONFIG_IO_URING, has it")]
    NoIoUring(#[source] io::Error),
    /// It is switched off.
    #[error(
        "io_uring is forbidden here (kernel.io_uring_disabled={sysctl}); run \
         `sysctl kernel.io_uring_disabled=0`, or allow it in the container's seccomp profile"
    )]
    IoUringForbidden {
        /// The value of the sysctl, or `unknown`.
        sysctl: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// Something else about rings.
    #[error("cannot make an io_uring; out of descriptors or of memory?")]
    IoUring(#[source] io::Error),
    /// The limit cannot be raised.
    #[error(
        "executors need {wanted} bytes of locked memory and the limit is {limit}; run as root, or \
         set LimitMEMLOCK=infinity in the unit file"
    )]
    Memlock {
        /// What is needed.
        wanted: u64,
        /// The hard limit.
        limit: u64,
    },
}

/// Checks io_uring, and raises the limits on locked memory and open files as far as they go.
///
/// # Errors
/// See [`PreflightError`].
pub fn check(seats: u16) -> Result<(), PreflightError> {
    io_uring()?;
    let wanted = memlock_bytes(seats);
    if let Err(limit) = raise(Resource::Memlock, wanted) {
        return Err(PreflightError::Memlock { wanted, limit });
    }
    if let Err(limit) = raise(Resource::Nofile, OPEN_FILES) {
        tracing::warn!(
            limit,
            "open files are limited; a host of many sandboxes needs {OPEN_FILES}"
        );
    }
    Ok(())
}

/// Raises the limit on locked memory by `bytes` above what it is, as far as that goes. Whoever needs
/// the memory finds out by asking the kernel for it.
pub(crate) fn raise_memlock_by(bytes: u64) {
    let Some(now) = getrlimit(Resource::Memlock).current else { return };
    if let Err(limit) = raise(Resource::Memlock, now.saturating_add(bytes)) {
        tracing::warn!(limit, "locked memory is limited; I/O buffers may not fit");
    }
}

fn io_uring() -> Result<(), PreflightError> {
    io_uring::IoUring::new(4).map(drop).map_err(explain)
}

/// The operations that rings of this crate use.
const OPERATIONS: [(&str, u8); 8] = [
    ("READ", opcode::Read::CODE),
    ("WRITE", opcode::Write::CODE),
    ("READ_FIXED", opcode::ReadFixed::CODE),
    ("WRITE_FIXED", opcode::WriteFixed::CODE),
    ("FSYNC", opcode::Fsync::CODE),
    ("FALLOCATE", opcode::Fallocate::CODE),
    ("POLL_ADD", opcode::PollAdd::CODE),
    ("CLOSE", opcode::Close::CODE),
];

/// Makes a ring, and asks which of the operations that are used the kernel does not know. Changes nothing.
///
/// # Errors
/// When there can be no ring.
pub fn missing_operations() -> Result<Vec<&'static str>, PreflightError> {
    let ring = io_uring::IoUring::new(4).map_err(explain)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(explain)?;
    let missing = OPERATIONS.into_iter().filter(|(_, code)| !probe.is_supported(*code));
    Ok(missing.map(|(name, _)| name).collect())
}

/// How much locked memory [`check`] wants for so many seats.
#[must_use]
pub const fn memlock_bytes(seats: u16) -> u64 {
    MEMLOCK_BYTES_PER_SEAT.saturating_mul(seats as u64)
}

/// What the kernel's refusal to make a ring most likely means.
fn explain(error: io::Error) -> PreflightError {
    match error.kind() {
        io::ErrorKind::Unsupported => PreflightError::NoIoUring(error),
        io::ErrorKind::PermissionDenied => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned());
            PreflightError::IoUringForbidden { sysctl, source: error }
        }
        _ => PreflightError::IoUring(error),
    }
}

/// Raises the soft limit to `wanted`, the hard one too where this process may. The limit in force
/// when it stays below.
fn raise(resource: Resource, wanted: u64) -> Result<(), u64> {
    let now = getrlimit(resource);
    if now.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(wanted));
    if setrlimit(resource, Rlimit { current: Some(wanted), maximum }).is_ok() {
        return Ok(());
    }
    // Not privileged: as far as the hard limit goes.
    let hard = now.maximum.unwrap_or(wanted).min(wanted);
    if setrlimit(resource, Rlimit { current: Some(hard), maximum: now.maximum }).is_err() {
        return Err(now.current.unwrap_or(0));
    }
    if hard >= wanted { Ok(()) } else { Err(hard) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_with_its_likely_cause() {
        let explained = |errno: rustix::io::Errno| explain(errno.into()).to_string();
        assert!(explained(rustix::io::Errno::NOSYS).contains("CONFIG_IO_URING"));
        assert!(explained(rustix::io::Errno::PERM).contains("sysctl kernel.io_uring_disabled=0"));
        assert!(explained(rustix::io::Errno::MFILE).contains("descriptors"));
        assert!(io_uring().is_ok(), "the other tests of this crate need it");
        assert_eq!(missing_operations().unwrap(), Vec::<&str>::new(), "and these");
    }

    /// Run by the test below, in a process that starts with low limits.
    #[test]
    #[ignore = "needs the limits that the next test gives it"]
    fn in_a_process_with_low_limits() {
        assert_eq!(getrlimit(Resource::Nofile).current, Some(256));
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        check(2).unwrap();
        let open_files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(open_files >= OPEN_FILES.min(hard), "{open_files}");
        let locked = getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
        assert!(locked >= 2 * MEMLOCK_BYTES_PER_SEAT, "{locked}");
    }

    #[test]
    fn low_limits_are_raised() {
        let child = "preflight::tests::in_a_process_with_low_limits";
        let ran = std::process::Command::new("sh")
            .args(["-c", "ulimit -S -n 256 && ulimit -S -l 64 && exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", child])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn a_limit_is_raised_and_stays() {
        let before = getrlimit(Resource::Core);
        let wanted = before.maximum.unwrap_or(4096).min(4096);
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: before.maximum }).unwrap();
        raise(Resource::Core, wanted).unwrap();
        assert_eq!(getrlimit(Resource::Core).current, Some(wanted));
        raise(Resource::Core, 0).unwrap();
        assert_eq!(getrlimit(Resource::Core).current, Some(wanted), "never lowered");
    }
}
