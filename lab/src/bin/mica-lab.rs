//! `mica-lab`: the emulated dual-socket host, from the command line. `mica lab …` runs it.
//!
//! Thin: it parses arguments and calls `mica_lab::host`. `inside` is for the host's own init only.

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use mica_lab::fleet::command::{self, SimulateArgs};
use mica_lab::host::channel::server;
use mica_lab::host::drives::TOOLS;
use mica_lab::host::options::Shape;
use mica_lab::host::qemu::CHANNEL_PORT_INSIDE;
use mica_lab::host::state::Home;
use mica_lab::host::{down, ensure, foreground, keys, progress, status, template, up};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "mica-lab", version, about = "An emulated dual-socket host to run Mica in")]
struct Cli {
    /// Which lab; several can run side by side on different ports.
    #[arg(long, global = true, env = "MICA_LAB_NAME", default_value = "default")]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start the host and its daemon, or bring a running one up to date.
    Up(Up),
    /// Say whether it runs; the exit code is 0 only when it does.
    Status,
    /// Run a program in the host as root, with this terminal's streams.
    Exec {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Print the exports that a client needs: eval "$(mica lab env)".
    Env,
    /// Start the host, follow its daemon's log, and switch it off at the end: `mica serve` where
    /// KVM cannot run Linux.
    Serve(Up),
    /// Build a template on this machine and bring it into the host, if it is not there already.
    Template {
        /// Its name.
        template: String,
        /// What else `mica template build` is told, after `--`.
        #[arg(last = true)]
        build: Vec<String>,
    },
    /// Import a template archive (made by `mica template export`) in the host.
    PushTemplate {
        archive: PathBuf,
        /// Replace a template of the same name.
        #[arg(long)]
        force: bool,
    },
    /// Restart the daemon. An `up` that brings new programs starts it without the options.
    Restart {
        /// What else `mica serve` is told, after `--`.
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Switch the host off.
    Down {
        /// Also remove the store with its templates, and the API key.
        #[arg(long)]
        wipe: bool,
    },
    /// Replay arrivals against a fleet that is only simulated, with several ways to choose a host.
    Simulate(SimulateArgs),
    /// Serve the exec channel; started by the host's init.
    #[command(hide = true)]
    Inside,
}

#[derive(Debug, Args)]
struct Up {
    #[arg(long, default_value_t = 2)]
    sockets: u32,
    /// Cores of each socket.
    #[arg(long, default_value_t = 2)]
    cores: u32,
    /// Memory of the whole host in MiB.
    #[arg(long, default_value_t = 8192)]
    memory: u32,
    /// Size of the emulated NVMe store in GiB; used when the store is made.
    #[arg(long, default_value_t = 32)]
    drive: u32,
    /// The port on loopback where the API appears.
    #[arg(long, env = "MICA_LAB_PORT", default_value_t = 3000)]
    port: u16,
    /// Where mica, mica-vm and mica-guest are; default: beside this program.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Start the host alone.
    #[arg(long)]
    no_daemon: bool,
}

fn main() -> ExitCode {
    progress::seconds();
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mica-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let home = Home::new(&cli.name)?;
    match cli.verb {
        Verb::Up(options) => up::up(&home, &request(options)?)?,
        Verb::Status => {
            let (text, good) = status::status(&home)?;
            println!("{text}");
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Verb::Exec { command } => {
            return home.running()?.channel().exec_attached(command).map(exit_code);
        }
        Verb::Env => println!("{}", status::exports(&home)?),
        Verb::PushTemplate { archive, force } => {
            return template::push(&home, &archive, force).map(exit_code);
        }
        Verb::Serve(options) => {
            up::up(&home, &request(options)?)?;
            foreground::follow(&home)?;
        }
        Verb::Template { template, build } => {
            let own = std::env::current_exe().context("find the path of mica-lab itself")?;
            ensure::ensure(&home, &own.with_file_name("mica"), &template, &build)?;
        }
        Verb::Restart { options } => up::restart(&home, &options)?,
        Verb::Down { wipe } => down::down(&home, wipe)?,
        Verb::Simulate(args) => print!("{}", command::run(&args)?),
        Verb::Inside => inside()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A program's code fits a byte; anything else is a failure.
fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn request(options: Up) -> Result<up::Request> {
    let beside = || -> Result<PathBuf> {
        let own = std::env::current_exe().context("find the path of mica-lab itself")?;
        Ok(own.parent().map(PathBuf::from).unwrap_or_default())
    };
    Ok(up::Request {
        shape: Shape {
            sockets: options.sockets,
            cores_per_socket: options.cores,
            memory_mib: options.memory,
            drive_gib: options.drive,
        },
        api_port: options.port,
        binaries: options.binaries.map_or_else(beside, Ok)?,
        daemon: !options.no_daemon,
    })
}

fn inside() -> Result<()> {
    let path = format!("{TOOLS}/token");
    let token = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CHANNEL_PORT_INSIDE))
        .context("listen for the exec channel")?;
    // The host works without it, only less long.
    let _idle = keys::hold().inspect_err(|error| eprintln!("mica-lab inside: {error:#}"));
    server::serve(&listener, token)
}
