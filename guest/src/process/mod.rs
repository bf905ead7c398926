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
