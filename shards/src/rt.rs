//! The runtime as `http` may see it: local tasks, timers and sockets of the shard it runs on.
//!
//! Called by `http`, which may not import `numa`. Refuses to add anything of its own.

pub use mica_numa::rt::{BlockingError, Task, blocking, net, oneshot, spawn, time, yield_now};
