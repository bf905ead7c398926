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
//!     │ ◀─────────────── Spawned {pid} ────────│  from the process that starts it and ends
//!     │ ◀──────────────────────── Jailed ──────│
//!     │ ── Build {shell} + fds ───────────────▶│
//!     │ ◀───────────────────────── Built ──────│  memory reserved, KVM shell up: it waits in the pool
//!     │ ── Boot {cmdline} + fds ──────────────▶│  either: from a kernel
//!     │ ── Restore {plan, state} + fds ───────▶│  or: from layers and a saved state
//!     │ ◀─────────────────────── Started ──────│  vCPUs run
//!     │ ◀──────────────── ConsoleStarted ──────│  first byte on the serial port
//!     │ ◀────────────────────── Doorbell ──────│  the agent's gateway listens (after a boot)
//!     │ ── OpenStream {port} + fd ────────────▶│  that socket is now a vsock connection
//!     │ ── Freeze ────────────────────────────▶│
//!     │ ◀──────────────────────── Frozen ──────│  vCPUs out, queues drained, state in the exchange
//!     │ ── Thaw │ Restore (a rollback) ───────▶│
//!     │ ◀────────────── Thawed │ Started ──────│
//!     │ ◀────────────────── Ended {why} ───────│  and the process exits
//! ```
//! Commands but `OpenStream` and `Stop` are answered before the next one may be sent. What is too
//! long for a frame, plans and states, travels through the **exchange**, a memfd that both hold: a
//! plan at offset 0, and a state at the next multiple of 4 KiB (shard to VM process), or a state at
//! offset 0 (VM process to shard).
//!
//! The VM process also holds the shard's end of the socket, [`FdRole::Spare`]. So the socket outlives
//! a daemon that is killed, and the next one takes its end from there (`pidfd_getfd`), sends
//! [`Command::Report`] and reads on from the matching [`Event::Status`].

#![expect(missing_docs, reason = "rkyv's derive makes variants with fields that carry no docs")]

mod codec;
pub mod plan;
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
    /// A memfd of [`ShellConfig::console_bytes`]: see [`console`].
    Console,
    /// A memfd of [`ShellConfig::exchange_bytes`], its length sealed.
    Exchange,
    /// A duplicate of the shard's end of the control socket, to be kept open and not used.
    Spare,
    /// A bzImage or an ELF vmlinux, read-only. Told apart by its magic.
    Kernel,
    /// The initial RAM file system, read-only.
    Initramfs,
    /// The root disk: a regular file, its length a multiple of 512.
    Disk,
    /// A layer of guest memory, read-only. The n-th of a frame is layer n of its plan.
    Layer,
    /// One end of a connected stream socket.
    Stream,
}

/// Longest plan, and longest state, that an exchange carries.
pub const EXCHANGE_PART_BYTES_MAX: u64 = 2 << 20;

/// The usual length of an exchange.
pub const EXCHANGE_BYTES: u64 = 2 * EXCHANGE_PART_BYTES_MAX;

/// Most layers of one guest's memory: flattening keeps chains far shorter.
pub const LAYERS_MAX: usize = 16;

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

/// What a shell is made for. Everything here is fixed for the life of the process.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ShellConfig {
    /// Number of vCPUs; [`ShellConfig::vcpu_count`] checks it.
    pub vcpus: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u32,
    /// Whether the guest has a root disk. The file comes with `Boot` or `Restore`.
    pub disk: bool,
    /// Length of the console memfd.
    pub console_bytes: u64,
    /// Length of the exchange.
    pub exchange_bytes: u64,
    /// Whether the VM process is to tell what was written to guest memory: see [`Event::Frozen`]. It makes
    /// the guest's first write to each page after a freeze cost an exit. For kernels on which the shard
    /// cannot see that from outside.
    pub log_writes: bool,
    /// What each descriptor beside the frame is, in order. Each role at most once.
    pub fds: Vec<FdRole>,
}

impl ShellConfig {
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

/// A finished shell, as the shard has to know it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shell {
    /// Where guest memory starts in the address space of the VM process: frame 0.
    pub memory_address: u64,
    /// Number of the spare descriptor in the VM process.
    pub spare_fd: i32,
    /// Number of the exchange in the VM process.
    pub exchange_fd: i32,
    /// Number of the console memfd in the VM process.
    pub console_fd: i32,
    /// Number of its userfaultfd in the VM process, where the kernel gave one.
    pub userfault_fd: Option<i32>,
}

/// A cold boot, in a shell that has not run.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct BootConfig {
    /// The kernel command line, without a terminating zero.
    pub cmdline: String,
    /// Whether the guest may write to its root disk.
    pub disk_read_only: bool,
    /// What each descriptor beside the frame is, in order. Each role at most once.
    pub fds: Vec<FdRole>,
}

/// A saved state to go on from, in a shell that has not run or in a frozen VM.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct RestoreConfig {
    /// Length of the plan in the exchange: see [`plan`].
    pub plan_bytes: u64,
    /// Length of the state in the exchange.
    pub state_bytes: u64,
    /// The new generation id of the guest: written to VMGENID, and the guest is notified.
    pub generation: [u8; 16],
    /// What each descriptor beside the frame is: `Disk` at most once (never in a frozen VM, which
    /// keeps its disk; its content was replaced), then layers.
    pub fds: Vec<FdRole>,
}

/// From the shard to the VM process.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make the shell. Exactly once, first. Beside it: the descriptors of [`ShellConfig::fds`].
    Build(ShellConfig),
    /// Boot a kernel. Beside it: the descriptors of [`BootConfig::fds`].
    Boot(BootConfig),
    /// Go on from a saved state. Beside it: the descriptors of [`RestoreConfig::fds`].
    Restore(RestoreConfig),
    /// Connect the descriptor beside this frame ([`FdRole::Stream`]) to a vsock port of the guest.
    /// A guest that does not accept closes it.
    OpenStream {
        /// The guest-side vsock port.
        vsock_port: u32,
    },
    /// Stop the vCPUs and drain the devices, and put the state into the exchange.
    Freeze,
    /// Go on where [`Command::Freeze`] stopped.
    Thaw,
    /// Say where you are.
    Report {
        /// Comes back in the answer.
        nonce: u64,
    },
    /// Stop the vCPUs and exit, with [`Ending::Asked`].
    Stop,
}

/// How far a VM process is.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A shell that has not run.
    Idle,
    /// vCPUs run.
    Running,
    /// Frozen.
    Frozen,
}

/// From the VM process to the shard.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The number of the process that will be the VM, in the pid namespace of who started it. Said
    /// by the process in between, which then ends; the VM process cannot know it.
    Spawned {
        /// The number.
        pid: u32,
    },
    /// The jail is closed; [`Command::Build`] may come.
    Jailed,
    /// The shell is up.
    Built(Shell),
    /// The vCPUs run: after `Boot` and after `Restore`.
    Started,
    /// The guest wrote its first byte to the serial port. Once in the life of the process.
    ConsoleStarted,
    /// The guest's agent listens on its gateway. Once in the life of the process.
    Doorbell,
    /// Frozen, and the state is in the exchange.
    Frozen {
        /// Its length.
        state_bytes: u64,
        /// Length of the log, which lies behind the state, at the next page of the exchange: a bit for
        /// each frame, frame 0 first, least significant bit first, set where the guest or a device wrote
        /// since the last freeze or the restore. 0 without a log, also where memory has more frames than
        /// [`EXCHANGE_PART_BYTES_MAX`] bytes have bits.
        log_bytes: u64,
    },
    /// The vCPUs run again, after `Thaw`.
    Thawed,
    /// The answer to `Report`.
    Status {
        /// Of the question.
        nonce: u64,
        /// How far it is.
        phase: Phase,
        /// The shell, if it is built.
        shell: Option<Shell>,
    },
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
