//! Resource limits of the process.
//!
//! Called while the jail closes, and once more when the disk is known. Refuses to raise any.

use std::os::fd::AsFd;

use mica_units::Mebibytes;
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors: KVM and its vCPUs, device events, and one for each stream into the guest.
const DESCRIPTORS_MAX: u64 = 1024;
/// Threads of its user, which has no other process: control, devices, a vCPU each, KVM's own, and
/// those of the disk's ring.
const THREADS_MAX: u64 = 64;
/// Memory that cannot be reclaimed: the rings of an io_uring count, since Linux 6.14 in full.
const LOCKED_BYTES_MAX: u64 = 64 * 1024;
/// Address space beside guest memory: the program, the stacks of its threads, the buffers of its
/// devices, what it shares with the kernel and the shard.
const OWN_BYTES_MAX: u64 = 256 << 20;

/// Why a limit was not set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The disk's length is unknown.
    #[error("reading the length of the disk failed")]
    DiskLength(#[source] Errno),
    /// The kernel refused.
    #[error("limiting the size of files failed")]
    Set(#[source] Errno),
    /// The kernel refused.
    #[error("limiting the address space failed")]
    Space(#[source] Errno),
}

/// The limits that do not depend on what is booted.
pub fn set() -> Result<(), Errno> {
    set_one(Resource::Nofile, DESCRIPTORS_MAX)?;
    set_one(Resource::Nproc, THREADS_MAX)?;
    set_one(Resource::Memlock, LOCKED_BYTES_MAX)?;
    // A core dump would write guest memory to the host's disk.
    set_one(Resource::Core, 0)
}

/// Lets this process write files up to the length of the disk, and none without one.
///
/// # Errors
/// See [`LimitError`].
pub fn allow_file_bytes(disk: Option<&impl AsFd>) -> Result<(), LimitError> {
    let bytes = match disk {
        Some(disk) => fstat(disk).map_err(LimitError::DiskLength)?.st_size,
        None => 0,
    };
    set_one(Resource::Fsize, u64::try_from(bytes).unwrap_or(0)).map_err(LimitError::Set)
}

/// Lets this process map guest memory, and what it needs for itself.
///
/// # Errors
/// When the kernel refuses.
pub fn allow_address_space(memory: Mebibytes) -> Result<(), LimitError> {
    set_one(Resource::As, memory.to_bytes() + OWN_BYTES_MAX).map_err(LimitError::Space)
}

fn set_one(resource: Resource, value: u64) -> Result<(), Errno> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
}
