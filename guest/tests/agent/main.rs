//! The real agent, run as a program and spoken to over its gateway.

mod codec;
mod files;
mod gateway;
mod identity;
mod interpreter;
mod process;
#[path = "../required/mod.rs"]
mod required;
mod stream_input;
mod support;
mod watch;
