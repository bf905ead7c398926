//! The real agent, run as a program and spoken to over its gateway.

mod gateway;
mod identity;
mod interpreter;
mod process;
mod support;
