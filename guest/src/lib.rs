//! The program inside the VM: first process, agent, envd, code interpreter.
//!
//! Called by `main.rs`, which is `mica-guest`. Refuses to trust anything a client of the sandbox
//! sends, and to hold a secret the sandbox's owner may not see: the guest belongs to its user.

#![forbid(unsafe_code)]

pub mod agent;
pub mod connect;
pub mod filesystem;
pub mod http;
pub mod init;
pub mod interpreter;
pub mod process;
pub mod sandbox;
pub mod untrusted;
pub mod users;
