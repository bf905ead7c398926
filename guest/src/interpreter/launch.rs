//! How a kernel process is started: which program, as whom, with what environment.
//!
//! Called by [`super::kernel`]. The agent passes a [`Launcher`] that becomes the user before it
//! executes; this module never changes identity itself. Refuses nothing: a program that is not
//! there is the launcher's error.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::users::User;

/// Where a template keeps the Python that has ipykernel.
const TEMPLATE_PYTHON: &str = "/opt/mica/python/bin/python3";

/// One process to start.
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    /// The program, found in `PATH` unless it has a slash.
    pub program: PathBuf,
    /// Its arguments, without the program.
    pub args: Vec<OsString>,
    /// Its whole environment.
    pub env: BTreeMap<String, String>,
    /// Where it starts.
    pub cwd: PathBuf,
    /// Who it becomes.
    pub user: User,
}

/// A process could not be prepared.
#[derive(Debug, thiserror::Error)]
#[error("cannot prepare {program} to run as {user}: {reason}")]
pub struct LaunchError {
    /// The program.
    pub program: String,
    /// Who it was to become.
    pub user: String,
    /// Why not.
    pub reason: String,
}

/// Turns a spec into a command that runs as the spec's user. The command must execute the program
/// in the process it spawns (no fork in between) and make it the leader of a process group,
/// because signals go to that process and to its group: what a cell has started is interrupted
/// with it.
pub type Launcher =
    Arc<dyn Fn(&LaunchSpec) -> Result<tokio::process::Command, LaunchError> + Send + Sync>;

/// The interpreter that kernels run in: the template's own if it is there.
pub fn find_python() -> PathBuf {
    let own = Path::new(TEMPLATE_PYTHON);
    if own.exists() { own.to_owned() } else { PathBuf::from("python3") }
}
