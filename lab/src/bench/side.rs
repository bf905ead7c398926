//! One side of an A/B run: a `mica` of its own, with a store, keys, a port and control groups of its own.
//!
//! Called by `mica bench ab`. Needs root, as the daemon does. Refuses to leave anything: the daemon, its VM processes and
//! its files go with the value.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::daemon::Daemon;
use super::host::Address;
use crate::served::{Places, Serve, Served, without_limits};

/// What sandboxes are made of, on both sides.
const TEMPLATE: &str = "bench";

/// What the sandboxes of both sides are.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The stand-in, which isolates nothing: the daemon alone is measured.
    StandIn {
        /// Its program.
        program: PathBuf,
        /// The agent that it runs; without one it is its own.
        agent: Option<PathBuf>,
    },
    /// A VM.
    Vm {
        /// Its program.
        program: PathBuf,
        /// What `mica template add` is told besides names and places.
        template_args: Vec<String>,
    },
}

/// A daemon under measurement.
#[derive(Debug)]
pub struct Side {
    /// Where it is.
    pub address: Address,
    /// Its process.
    pub daemon: Daemon,
    _served: Served,
    /// Goes after the daemon.
    _places: Places,
}

impl Side {
    /// Starts it in `directory`, which must not be there.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(
        mica: &Path,
        serve_args: &[String],
        guest: &Guest,
        directory: &Path,
    ) -> Result<Self> {
        // From here on whatever fails takes back what was made.
        let places = Places::make(directory.to_owned())?;
        let without = without_limits()?;
        let vm_program = vm_program(&places, guest)?;
        add_template(&places, mica, guest, &vm_program, without)?;
        let (store, keys) = (places.path("store"), places.path("keys"));
        let cgroup = &places.cgroup;
        let serve = Serve { mica, store: &store, keys: &keys, cgroup, vm_program: &vm_program };
        let usual = ["--accept-unusable-kvm"].into_iter().chain(without);
        let served = Served::start(&serve, usual.chain(serve_args.iter().map(String::as_str)))?;
        let address = Address {
            url: format!("http://{}", served.address),
            api_key: served.key.clone(),
            template: TEMPLATE.to_owned(),
        };
        Ok(Self { address, daemon: served.process(), _served: served, _places: places })
    }
}

/// The daemon passes a VM program no options of ours, so a script adds them.
fn vm_program(places: &Places, guest: &Guest) -> Result<PathBuf> {
    let (program, options) = match guest {
        Guest::Vm { program, .. } => return Ok(program.clone()),
        Guest::StandIn { program, agent: None } => (program, "--builtin-agent".to_owned()),
        Guest::StandIn { program, agent: Some(agent) } => {
            (program, format!("--guest '{}'", agent.display()))
        }
    };
    let script = places.path("vm");
    let text = format!("#!/bin/sh\nexec '{}' {options} \"$@\"\n", program.display());
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

fn add_template(
    places: &Places,
    mica: &Path,
    guest: &Guest,
    vm_program: &Path,
    without: Option<&str>,
) -> Result<()> {
    let mut command = Command::new(mica);
    command
        .args(["template", "add", "--name", TEMPLATE, "--accept-unusable-kvm"])
        .args(without)
        .arg("--store")
        .arg(places.path("store"))
        .arg("--vm-program")
        .arg(vm_program)
        .arg("--cgroup-root")
        .arg(places.warm_cgroup());
    match guest {
        Guest::Vm { template_args, .. } => command.args(template_args),
        Guest::StandIn { .. } => {
            // The stand-in looks at neither.
            let (kernel, disk) = (places.path("kernel"), places.path("disk"));
            fs::write(&kernel, "not a kernel")?;
            fs::write(&disk, vec![0x5a; 1 << 20])?;
            command.args(["--ready", "agent", "--memory", "16", "--kernel"]).arg(kernel);
            command.arg("--disk").arg(disk)
        }
    };
    let done = command.output().with_context(|| format!("run {}", mica.display()))?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "mica template add: {}", said.trim());
    Ok(())
}
