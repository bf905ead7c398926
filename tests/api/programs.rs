//! The programs of other packages that a daemon's sandboxes are: the stand-in VM, and the real agent.
//!
//! Called by [`crate::daemon`]. Refuses to build what is installed already: `MICA_BIN_DIR` says where.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The daemon passes a VM program no options of ours, so a script adds them.
pub fn vm_program(directory: &Path) -> PathBuf {
    let script = directory.join("vm");
    write_vm_program(&script, "--builtin-agent");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&script, executable).expect("a mode");
    script
}

pub fn write_vm_program(script: &Path, options: &str) {
    write_vm_script(script, "", options);
}

/// Has the stand-in run the real agent, as a plain process of this machine.
pub fn guest_agent() -> String {
    format!("--guest '{}'", guest().display())
}

/// In a mount namespace of its own: login shells read nothing of whoever runs the tests.
pub const WITHOUT_LOGIN_FILES: &str = r#"[ -n "$QUIET_LOGIN" ] || QUIET_LOGIN=1 exec unshare --mount "$0" "$@"
for file in ~root/.bash_profile ~root/.bash_login ~root/.profile ~root/.bashrc /etc/profile.d/*; do
  [ ! -f "$file" ] || mount --bind /dev/null "$file"
done
"#;

/// The same, with lines before the program starts.
pub fn write_vm_script(script: &Path, before: &str, options: &str) {
    let standin = standin_vm().display();
    let text = format!("#!/bin/sh\n{before}exec '{standin}' {options} \"$@\"\n");
    // Written beside and renamed: a script that is being run cannot be written to.
    let new = script.with_extension("new");
    std::fs::write(&new, text).expect("a script");
    if script.exists() {
        let mode = std::fs::metadata(script).expect("a script").permissions();
        std::fs::set_permissions(&new, mode).expect("a mode");
    }
    std::fs::rename(&new, script).expect("a script");
}

fn standin_vm() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| built("mica-lab", "standin-vm"))
}

pub fn guest() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| built("mica-guest", "mica-guest"))
}

/// A program of another package, which cargo has not built for this test.
fn built(package: &str, program: &str) -> PathBuf {
    let installed = std::env::var_os("MICA_BIN_DIR").map(PathBuf::from);
    if let Some(built) = installed.map(|directory| directory.join(program))
        && built.is_file()
    {
        return built;
    }
    let mica = Path::new(env!("CARGO_BIN_EXE_mica"));
    let directory = mica.parent().expect("a directory");
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", package, "--bin", program, "--profile", profile])
        .status()
        .expect("cargo");
    assert!(status.success(), "{program} does not build");
    directory.join(program)
}
