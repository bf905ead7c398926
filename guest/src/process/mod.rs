//! The RPC service `process.Process`: start, watch, feed and signal processes of the sandbox.
//!
//! Called by envd's router. Refuses more than [`PROCESSES_MAX`] at once, and to let one slow client
//! grow a buffer: a process waits for those who watch it, and what nobody watches is dropped.
//!
//! ```text
//!  Start ──▶ spawn ──▶ exec-as shim ──▶ the command      stdout, stderr, pty
//!                                          │                   │
//!            supervise: waits, kills at the deadline      pump ▼
//!                                          └──▶ Hub ──▶ Start's stream, every Connect's stream
//! ```

mod events;
mod hub;
pub mod launch;
mod messages;
mod pump;
mod service;
pub mod shim;
mod spawn;
mod table;

pub use service::register;
pub use table::PROCESSES_MAX;

/// As how many of the service's requests the bytes can be read: see [`crate::untrusted`].
pub(crate) fn decodes(codec: crate::connect::Codec, data: &[u8]) -> usize {
    use crate::untrusted::decodes;
    decodes::<messages::StartRequest>(codec, data)
        + decodes::<messages::SelectRequest>(codec, data)
        + decodes::<messages::SendInputRequest>(codec, data)
        + decodes::<messages::StreamInputRequest>(codec, data)
        + decodes::<messages::SendSignalRequest>(codec, data)
        + decodes::<messages::UpdateRequest>(codec, data)
}
