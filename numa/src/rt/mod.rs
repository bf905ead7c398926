//! What a task on a shard may do: spawn a neighbour, wait for time, a socket or a descriptor.
//!
//! Called from futures that run on a seat's executor; every function here panics elsewhere, as
//! glommio does. Refuses to block the thread.

pub mod net;
pub mod oneshot;
mod ready;
mod stats;
mod task;
pub mod time;
pub(crate) mod turns;

pub use crate::blocking::{BlockingError, blocking};
pub(crate) use ready::polled;
pub use ready::{readable, writable};
pub use stats::{Stats, stats};
pub use task::{Task, spawn, turn, yield_now};
