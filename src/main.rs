//! The binary `mica`: command line, configuration, signals, and nothing else.
//!
//! Called by people and by service managers. Refuses to do any work of its own: a command here is
//! read, checked, and handed to the crate that does it.

#![forbid(unsafe_code)]

mod awake;
mod cert;
mod config;
mod doctor;
mod helper;
mod key;
mod kvm_kind;
mod layout;
mod plan;
mod pool;
mod serve;
mod signals;
mod template;
mod tls;
mod top;
mod topology;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Hosts thousands of hardware-isolated sandboxes on one bare-metal Linux server.
#[derive(Parser, Debug)]
#[command(version, arg_required_else_help = true, allow_external_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the host: the API, the sandbox proxy, and the sandboxes.
    Serve(Box<config::ServeArgs>),
    /// Show a machine, and which of its hardware threads shards and vCPUs would sit on.
    Topology(topology::TopologyArgs),
    /// Say how many hosts a load needs, and what runs out first.
    Plan(plan::CapacityArgs),
    /// Show a running host: nodes, shards, operations, and the sandboxes that use most.
    Top(top::TopArgs),
    /// Make, list and move templates.
    Template(template::TemplateArgs),
    /// Make, list and revoke API keys.
    Key(key::KeyArgs),
    /// Make, list and remove file systems that can clone files.
    Pool(pool::PoolArgs),
    /// Make a private certificate authority, and a certificate for `mica serve --tls-cert`.
    Cert(cert::CertArgs),
    /// Say what of this machine keeps Mica from running or makes it slow, and what mends it. Changes nothing;
    /// the exit code is 0 only where `mica serve` can run.
    Doctor(doctor::DoctorArgs),
    /// Say what KVM here is; the exit code is 0 only where a Linux guest runs.
    KvmKind,
    /// Another program of Mica beside this one: `mica lab …` runs `mica-lab …`.
    #[command(external_subcommand)]
    Helper(Vec<OsString>),
}

/// What is logged: as `MICA_LOG` says, or what happens to the host; and more with `-v`.
fn logs(verbosity: u8) -> EnvFilter {
    let otherwise = if verbosity > 2 { "debug" } else { "info" };
    let logs = EnvFilter::try_from_env("MICA_LOG").unwrap_or_else(|_| EnvFilter::new(otherwise));
    match "mica::operations=debug".parse() {
        Ok(operations) if verbosity == 2 => logs.add_directive(operations),
        _ => logs,
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let logs = logs(match &cli.command {
        Command::Serve(args) => args.verbosity(),
        _ => 0,
    });
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(logs)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Topology(args) => topology::print(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Top(args) => top::run(&args),
        Command::KvmKind => kvm_kind::print(),
        Command::Template(args) => template::run(&args),
        Command::Cert(args) => cert::run(&args),
        Command::Key(args) => key::run(args),
        Command::Pool(args) => pool::run(&args),
        Command::Helper(words) => helper::become_helper(&words),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mica: {error:#}");
            ExitCode::FAILURE
        }
    }
}
