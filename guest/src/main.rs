//! `mica-guest`: init, agent, or the shim between the agent and a command.
//!
//! Started by the kernel as `/init` (process 1), by init as `agent`, by the agent as `exec-as` and
//! `launch-as`, and by hand or tests as `agent --unix`. Refuses anything else on the command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mica_guest::agent::{self, AgentArgs};
use mica_guest::http::error::chain;
use mica_guest::{init, process};

/// The program inside a Mica sandbox
#[derive(Debug, Parser)]
#[command(name = "mica-guest", version)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve envd, the code interpreter and the gateway to the host
    Agent(AgentArgs),
}

fn main() -> ExitCode {
    // By the name the kernel starts it under, too: process 1 of a container must not be taken for
    // a guest's, whose disk it may be on.
    if std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == "/init") {
        init::run();
    }
    // The shims run for every command, so they do not wait for the command line's parser.
    match std::env::args_os().nth(1) {
        Some(role) if role == "exec-as" => return process::shim::run(),
        Some(role) if role == process::launch::ROLE => return process::launch::run(),
        _ => {}
    }
    match Cli::parse().role {
        Role::Agent(args) => match agent::run(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("mica-guest agent: {}", chain(&error));
                ExitCode::FAILURE
            }
        },
    }
}
