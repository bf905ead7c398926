//! How a kernel process is started: which program, as whom, with what environment.
//!
//! Called by [`super::kernel`]. The agent passes a [`Launcher`] that becomes the user before it
//! executes; this module never changes identity itself. Refuses nothing: a program that is not
//! there is the launcher's error.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::languages::Program;
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

/// Where Debian's and pip's packages put what belongs to Jupyter.
const SHARED: [&str; 2] = ["/usr/local/share/jupyter", "/usr/share/jupyter"];

/// The program of a kernel: beside its Python or in the agent's search path, if it is there.
pub fn find_program(program: Program, python: &Path) -> Option<PathBuf> {
    let Program::Named(name) = program else { return Some(python.to_owned()) };
    let path = std::env::var_os("PATH").unwrap_or_else(|| super::SEARCH_PATH.into());
    let beside = python.parent().filter(|parent| parent.is_absolute()).map(Path::to_owned);
    let mut places = beside.into_iter().chain(std::env::split_paths(&path));
    places.find_map(|place| Some(place.join(name)).filter(|path| path.is_file()))
}

/// A file that a package has put below `share/jupyter`.
pub fn find_shared(name: &str, python: &Path) -> Option<PathBuf> {
    let own = python.parent().and_then(Path::parent).map(|prefix| prefix.join("share/jupyter"));
    let mut places = own.into_iter().chain(SHARED.map(PathBuf::from));
    places.find_map(|place| Some(place.join(name)).filter(|path| path.is_file()))
}

/// The interpreter that kernels run in: the template's own if it is there.
pub fn find_python() -> PathBuf {
    let own = Path::new(TEMPLATE_PYTHON);
    if own.exists() { own.to_owned() } else { PathBuf::from("python3") }
}
