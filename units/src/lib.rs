//! Units and ids that every other crate shares, as types with checked arithmetic.
//!
//! Called by every crate of the workspace. Refuses to know any operating system, any format and
//! any other crate of ours: a leaf, `no I/O`, nothing that can fail for a reason outside its input.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bytes;
mod frames;
mod histogram;
mod ids;
mod limits;

pub use bytes::{Gpa, Mebibytes, PAGE_BYTES};
pub use frames::{FRAMES_MAX, FrameRun, frames_len, frames_of};
pub use histogram::{Buckets, Distribution, Durations};
pub use ids::{
    GuestPort, IdError, PerShard, SANDBOX_ID_CHARS, SandboxId, ShardCount, ShardId, TemplateName,
    TenantId,
};
pub use limits::{VCPUS_MAX, VcpuCount, VcpuCountError};
