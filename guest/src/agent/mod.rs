//! `mica-guest agent`: the gateway, and the services behind it.
//!
//! Started by init in a guest, or by hand and by tests on any machine with `--unix`. Refuses to
//! start without its gateway; a loopback port that is taken is told on the console and done
//! without, because the host does not need it.

mod control;
mod envd;
mod gateway;
mod kept;
mod listen;
mod memory;
mod names;
mod relay;
mod serve;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mica_wire::guest::Defaults;

pub use listen::ListenError;
pub use names::NOBODY;

use crate::http::Router;
use crate::http::error::chain;
use crate::interpreter::{self, Interpreter, find_python};
use crate::process;
use crate::sandbox::{Sandbox, SettingsError, TemplateSettings};
use control::{Control, Surroundings};
use gateway::Gateway;

/// How to run.
#[derive(Clone, Debug, clap::Args)]
pub struct AgentArgs {
    /// Take connections on this Unix socket instead of vsock: for machines that are not a guest.
    /// Prints `ready` when it listens, and leaves host name and clock alone.
    #[arg(long, value_name = "PATH")]
    pub unix: Option<PathBuf>,
    /// The template's settings.
    #[arg(long, value_name = "PATH", default_value = "/etc/mica/template.json")]
    pub template_json: PathBuf,
    /// Processes run as root where the client names no user or the template's is missing.
    #[arg(long)]
    pub root_user: bool,
    /// Loopback address of envd, or `none`.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:49983", value_parser = optional_address)]
    pub envd_tcp: OptionalAddress,
    /// Loopback address of the code interpreter, or `none`.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:49999", value_parser = optional_address)]
    pub interpreter_tcp: OptionalAddress,
}

/// An address, or none on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionalAddress(pub Option<SocketAddr>);

fn optional_address(text: &str) -> Result<OptionalAddress, String> {
    if text == "none" {
        return Ok(OptionalAddress(None));
    }
    let address = text.parse().map_err(|_| "expected IP:PORT or `none`".to_owned())?;
    Ok(OptionalAddress(Some(address)))
}

/// Why the agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The template's settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The runtime.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// The gateway.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// Runs until something breaks.
///
/// # Errors
/// [`AgentError`].
pub fn run(args: &AgentArgs) -> Result<(), AgentError> {
    // Started through a link, it would be called by the link's name in a list of processes, and
    // that is all that is lost where the name cannot be set.
    rustix::thread::set_name(c"mica-guest").unwrap_or_default();
    let settings = TemplateSettings::read(&args.template_json)?;
    // One thread: a guest has few CPUs, and they are for its user. File work goes to the pool.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    runtime.block_on(serve_all(args, settings))
}

async fn serve_all(args: &AgentArgs, settings: TemplateSettings) -> Result<(), AgentError> {
    let surroundings =
        if args.unix.is_some() { Surroundings::Foreign } else { Surroundings::Guest };
    let has_interpreter = settings.services.interpreter;
    let kept = match surroundings {
        Surroundings::Guest => kept_defaults(),
        Surroundings::Foreign => None,
    };
    let sandbox = Arc::new(Sandbox::new(settings, args.root_user).booted_with(kept));

    let mut envd = Router::new(Arc::clone(&sandbox));
    envd::register(&mut envd);
    let envd = Arc::new(envd);
    let interpreter = has_interpreter.then(|| start_interpreter(&sandbox, surroundings));
    let routes = interpreter.as_ref().map(|interpreter| {
        let mut router = Router::new(Arc::clone(&sandbox));
        interpreter::add_routes(&mut router, interpreter);
        Arc::new(router)
    });

    let control = Control::new(Arc::clone(&sandbox), surroundings, interpreter);
    let gateway = Gateway::new(Arc::clone(&sandbox), control, envd, routes);
    let gateway = Arc::new(gateway);
    listen::loopback(args.envd_tcp.0, gateway.envd()).await;
    if let Some(router) = gateway.interpreter() {
        listen::loopback(args.interpreter_tcp.0, router).await;
    }
    match &args.unix {
        Some(path) => listen::unix(path, gateway).await?,
        None => listen::vsock(gateway).await?,
    }
    Ok(())
}

/// What was kept of a sandbox before this boot. Whoever is root in it may have spoiled the file: that is
/// told on the console, and the sandbox comes up without.
fn kept_defaults() -> Option<Defaults> {
    kept::read(Path::new(kept::DEFAULTS)).unwrap_or_else(|error| {
        eprintln!("mica-guest: processes start without a template's settings: {}", chain(&error));
        None
    })
}

/// The code interpreter. Its first kernel starts now, before anyone asks for it; one that cannot
/// is told on the console and again to whoever asks.
fn start_interpreter(sandbox: &Arc<Sandbox>, surroundings: Surroundings) -> Arc<Interpreter> {
    let directory = match surroundings {
        Surroundings::Guest => PathBuf::from("/run/mica/kernels"),
        Surroundings::Foreign => {
            std::env::temp_dir().join(format!("mica-kernels-{}", std::process::id()))
        }
    };
    let interpreter = Arc::new(Interpreter::new(
        Arc::clone(sandbox),
        process::launch::launcher(),
        find_python(),
        directory,
    ));
    if let Err(error) = interpreter.warm() {
        eprintln!("mica-guest: cannot start the Python kernel: {}", chain(&error));
    }
    interpreter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_or_none() {
        assert_eq!(optional_address("none"), Ok(OptionalAddress(None)));
        let address = optional_address("127.0.0.1:1").unwrap();
        assert_eq!(address.0.unwrap().port(), 1);
        assert!(optional_address("localhost:1").is_err());
    }
}
