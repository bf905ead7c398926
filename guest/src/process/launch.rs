//! `mica-guest launch-as`: like the shim, for programs that the agent runs for itself as a user.
//!
//! The code interpreter starts its kernels through [`launcher`]; everything but the environment
//! and the standard descriptors, which the child simply inherits, is on the command line. Refuses
//! to run the program half-prepared.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use super::shim::{SpecUser, prepare};
use crate::http::error::chain;
use crate::interpreter::{LaunchSpec, Launcher};

/// The first argument of the program in this role.
pub const ROLE: &str = "launch-as";

/// In place of user and groups: stay who you are.
const SAME_USER: &str = "-";

/// Makes commands that become the program as the spec's user. Where the agent is not root, it can
/// be nobody else, and so is the program.
#[must_use]
pub fn launcher() -> Launcher {
    Arc::new(|spec: &LaunchSpec| {
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.arg(ROLE).args(head(spec, rustix::process::geteuid().is_root()));
        command.arg(&spec.program).args(&spec.args).env_clear().envs(&spec.env);
        Ok(command)
    })
}

/// user, group, groups, directory.
fn head(spec: &LaunchSpec, is_root: bool) -> [OsString; 4] {
    let cwd = spec.cwd.clone().into_os_string();
    if !is_root {
        return [SAME_USER.into(), SAME_USER.into(), SAME_USER.into(), cwd];
    }
    let groups: Vec<String> = spec.user.groups.iter().map(u32::to_string).collect();
    let (uid, gid) = (spec.user.uid.to_string(), spec.user.gid.to_string());
    [uid.into(), gid.into(), groups.join(",").into(), cwd]
}

/// Becomes the program; returns the exit code only when that failed.
#[must_use]
pub fn run() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(2).collect();
    let [uid, gid, groups, cwd, program, rest @ ..] = args.as_slice() else {
        eprintln!("mica-guest {ROLE}: only the agent calls this");
        return ExitCode::from(2);
    };
    let Ok(user) = parse_user(uid, gid, groups) else {
        eprintln!("mica-guest {ROLE}: the user or its groups are not numbers");
        return ExitCode::from(2);
    };
    if let Err(error) = prepare(user.as_ref(), Path::new(cwd), false) {
        eprintln!("mica-guest {ROLE}: {}", chain(&error));
        return ExitCode::from(127);
    }
    let error = Command::new(program).args(rest).exec();
    eprintln!("mica-guest {ROLE}: cannot run {}: {error}", Path::new(program).display());
    ExitCode::from(127)
}

fn parse_user(
    uid: &OsStr,
    gid: &OsStr,
    groups: &OsStr,
) -> Result<Option<SpecUser>, std::num::ParseIntError> {
    if uid == SAME_USER {
        return Ok(None);
    }
    let number = |text: &[u8]| String::from_utf8_lossy(text).parse::<u32>();
    let all = groups.as_bytes().split(|byte| *byte == b',').filter(|group| !group.is_empty());
    Ok(Some(SpecUser {
        uid: number(uid.as_bytes())?,
        gid: number(gid.as_bytes())?,
        groups: all.map(number).collect::<Result<_, _>>()?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users::User;

    #[test]
    fn what_the_launcher_writes_the_shim_reads() {
        let user = User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1001,
            groups: vec![27, 1001],
            home: "/home/user".into(),
            shell: "/bin/bash".into(),
        };
        let spec = LaunchSpec {
            program: "python3".into(),
            args: vec!["-m".into()],
            env: std::collections::BTreeMap::new(),
            cwd: "/home/user".into(),
            user,
        };
        let [uid, gid, groups, cwd] = head(&spec, true);
        let read = parse_user(&uid, &gid, &groups).unwrap().unwrap();
        assert_eq!((read.uid, read.gid, read.groups), (1000, 1001, vec![27, 1001]));
        assert_eq!(cwd, "/home/user");
        let [uid, gid, groups, _] = head(&spec, false);
        assert!(parse_user(&uid, &gid, &groups).unwrap().is_none());
        assert!(parse_user(OsStr::new("x"), &gid, &groups).is_err());
    }
}
