//! Everything two of our programs say to one another, as types: the API's JSON, the frames between
//! a shard and a VM process, and what host and guest agent exchange over vsock.
//!
//! Called by `shards`, `http`, `vmm`, `guest`. Refuses I/O beyond one seqpacket socket, and any
//! decision: a frame that is out of form is an error here, what it means is decided elsewhere.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
pub mod guest;
pub mod vm;
