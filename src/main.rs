//! The `mica` program's command line.
//!
//! Called by the operator. Refuses an unknown command.

#![forbid(unsafe_code)]

mod template;

use clap::{Parser, Subcommand};

#[derive(Parser, Debug)]
#[command(name = "mica", about = "Hosts hardware-isolated sandboxes on this machine")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make, list and move templates.
    Template(template::TemplateArgs),
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match Cli::parse().command {
        Command::Template(args) => template::run(&args),
    }
}
