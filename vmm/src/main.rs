//! The `mica-vm` program: one jailed process for one VM.
//!
//! Started by a shard (or a test) with the control socket as standard input:
//! `mica-vm --uid N --gid N`. Refuses to do anything before its jail is closed, and to run as user 0
//! in it. After that everything it has to say goes through the socket.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use mica_vmm::control;
use mica_vmm::jail::seccomp::{self, ThreadKind};
use mica_vmm::jail::{self, Ids, descriptors};
use mica_vmm::panics;
use mica_wire::vm::{ControlSocket, Ending, Event};

const USAGE: &str = "usage: mica-vm --uid N --gid N, with a control socket as standard input";

fn main() -> ExitCode {
    if let Err(error) = descriptors::close_inherited() {
        return refuse(&format!("mica-vm: cannot close inherited descriptors: {error}"));
    }
    if !descriptors::share_one_heap() {
        return refuse("mica-vm: the allocator does not take its one setting");
    }
    let Some(ids) = parse(std::env::args().skip(1)) else { return refuse(USAGE) };
    // A number of its own, because standard input becomes /dev/null.
    let socket = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(fd) => ControlSocket::from_fd(fd),
        Err(error) => return refuse(&format!("mica-vm: standard input is closed: {error}")),
    };
    panics::remember();
    match std::panic::catch_unwind(|| run(&socket, ids)) {
        Ok(code) => code,
        Err(_) => end(&socket, Ending::Internal(panics::first().to_owned())),
    }
}

fn run(socket: &ControlSocket, ids: Ids) -> ExitCode {
    control::warm_clocks();
    if let Err(error) = jail::enter(ids) {
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        return end(socket, Ending::Internal(format!("{error}: {cause}")));
    }
    if let Err(error) = seccomp::install(ThreadKind::Setup) {
        return end(socket, Ending::Internal(error.to_string()));
    }
    match control::serve(socket) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody is left to be told.
        Err(_) => ExitCode::FAILURE,
    }
}

fn end(socket: &ControlSocket, ending: Ending) -> ExitCode {
    // A shard that is gone cannot be told, and the exit code says the same.
    match socket.send_event(&Event::Ended(ending)) {
        Ok(()) | Err(_) => ExitCode::FAILURE,
    }
}

fn refuse(words: &str) -> ExitCode {
    const USAGE_ERROR: u8 = 2;
    // Standard error may be closed; the exit code says it too.
    match writeln!(std::io::stderr(), "{words}") {
        Ok(()) | Err(_) => ExitCode::from(USAGE_ERROR),
    }
}

/// `--uid N --gid N`, each once, neither 0.
fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Ids> {
    let (mut uid, mut gid) = (None, None);
    while let Some(name) = arguments.next() {
        let slot = match name.as_str() {
            "--uid" => &mut uid,
            "--gid" => &mut gid,
            _ => return None,
        };
        let value: u32 = arguments.next()?.parse().ok()?;
        if value == 0 || value == u32::MAX || slot.replace(value).is_some() {
            return None;
        }
    }
    Some(Ids { uid: uid?, gid: gid? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Option<Ids> {
        parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn it_never_stays_root() {
        assert_eq!(parse_words("--uid 7 --gid 8"), Some(Ids { uid: 7, gid: 8 }));
        for bad in [
            "",
            "--uid 0 --gid 8",
            "--uid 7 --gid 0",
            "--uid 7",
            "--uid 7 --uid 7 --gid 8",
            "--uid -1 --gid 8",
            "--uid 4294967295 --gid 8",
            "--uid 7 --gid 8 extra",
        ] {
            assert_eq!(parse_words(bad), None, "{bad}");
        }
    }
}
