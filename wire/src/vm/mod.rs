//! The frames between a shard and the VM process of one sandbox.
//!
//! Called by `shards` (which sends [`Command`]s) and `vmm` (which sends [`Event`]s). The channel is
//! one `SOCK_SEQPACKET` socket, file descriptor 0 of the VM process; one packet is one frame.
//! Descriptors travel beside commands only, never beside events, so a shard can read with a plain
//! receive through its ring. Refuses a frame of another version, or one that fails validation: a VM
//! process that a guest has taken over can send anything.
//!
//! ```text
//!   shard                                   mica-vm (jailed before it reads the first frame)
//!     │ ◀──────────────────────── Jailed ──────│
//!     │ ── Boot {config} + fds ───────────────▶│
//!     │ ◀─────────────────────── Started ──────│  vCPUs run
//!     │ ◀──────────────── ConsoleStarted ──────│  first byte on the serial port
//!     │ ◀────────────────────── Doorbell ──────│  the agent's gateway listens
//!     │ ── OpenStream {port} + fd ────────────▶│  that socket is now a vsock connection
//!     │ ◀────────────────── Ended {why} ───────│  and the process exits
//! ```

#![expect(missing_docs, reason = "rkyv's derive makes variants with fields that carry no docs")]

mod codec;
mod socket;

use mica_units::{Mebibytes, VcpuCount};
use rkyv::{Archive, Deserialize, Serialize};

pub use codec::{
    FRAME_BYTES_MAX, FrameError, decode_command, decode_event, encode_command, encode_event,
};
pub use socket::{ControlSocket, FDS_PER_FRAME_MAX, SocketError};

/// The file descriptor number of the control socket in a fresh VM process (standard input).
pub const CONTROL_FD: i32 = 0;

/// The CID of every guest. Guests never see one another, so they may all have the same.
pub const GUEST_CID: u32 = 3;

/// What a file descriptor sent beside a [`Command`] is for.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[rkyv(derive(Debug))]
pub enum FdRole {
    /// `/dev/kvm`, open for reading and writing.
    Kvm,
    /// A bzImage or an ELF vmlinux, read-only. Told apart by its magic.
    Kernel,
    /// The initial RAM file system, read-only.
    Initramfs,
    /// The root disk: a regular file, its length a multiple of 512.
    Disk,
    /// A memfd of [`BootConfig::console_bytes`]: see [`console`].
    Console,
    /// One end of a connected stream socket.
    Stream,
}

/// The layout of the console memfd: a bounded ring that outlives the VM process.
///
/// ```text
///  0                8                       console_bytes
///  ┌────────────────┬───────────────────────┐
///  │ total written  │ ring                  │   total: u64 little endian, since boot
///  └────────────────┴───────────────────────┘
/// ```
/// Byte number `n` of the console is at `8 + n % (console_bytes - 8)`. The length is sealed.
pub mod console {
    /// Bytes of the header.
    pub const HEADER_BYTES: u64 = 8;
    /// Smallest memfd that is accepted.
    pub const BYTES_MIN: u64 = 4096;
}

/// What to boot.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct BootConfig {
    /// Number of vCPUs; [`BootConfig::vcpu_count`] checks it.
    pub vcpus: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u32,
    /// The kernel command line, without a terminating zero.
    pub cmdline: String,
    /// Whether the guest may write to its root disk.
    pub disk_read_only: bool,
    /// Length of the console memfd.
    pub console_bytes: u64,
    /// What each descriptor beside the frame is, in order. Each role at most once.
    pub fds: Vec<FdRole>,
}

impl BootConfig {
    /// The checked vCPU count.
    ///
    /// # Errors
    /// When it is out of bounds.
    pub fn vcpu_count(&self) -> Result<VcpuCount, mica_units::VcpuCountError> {
        VcpuCount::new(self.vcpus)
    }

    /// Guest memory as a unit.
    #[must_use]
    pub fn memory(&self) -> Mebibytes {
        Mebibytes::new(self.memory_mib)
    }
}

/// From the shard to the VM process.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Boot. Exactly once, first. Beside it: the descriptors of [`BootConfig::fds`].
    Boot(BootConfig),
    /// Connect the descriptor beside this frame ([`FdRole::Stream`]) to a vsock port of the guest.
    /// A guest that does not accept closes it.
    OpenStream {
        /// The guest-side vsock port.
        vsock_port: u32,
    },
    /// Stop the vCPUs and exit, with [`Ending::Asked`].
    Stop,
}

/// From the VM process to the shard.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The jail is closed; [`Command::Boot`] may come.
    Jailed,
    /// The vCPUs run.
    Started,
    /// The guest wrote its first byte to the serial port. Once.
    ConsoleStarted,
    /// The guest's agent listens on its gateway. Once.
    Doorbell,
    /// The last event. The process exits after it.
    Ended(Ending),
}

/// Why a VM stopped.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// [`Command::Stop`], or the shard closed the socket.
    Asked,
    /// The guest reset or powered off the machine (a kernel panic with `panic=-1` ends here).
    Reset,
    /// Every vCPU halted with interrupts off, or the guest asked to halt.
    Halted,
    /// A triple fault (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// The guest broke a rule that kills it, such as a virtqueue outside its memory.
    GuestFault(String),
    /// The configuration could not be booted.
    BadConfig(String),
    /// The host's fault, or ours.
    Internal(String),
}
