//! The `mica-vm` program: one jailed process for one VM.
//!
//! Started by a shard (or a test) with the control socket as standard input:
//! `mica-vm --uid N --gid N [--netns N]`. The process that was started says the number of the one
//! that will be the VM, and ends. Refuses to do anything before its jail is closed, and to run as
//! user 0 in it. After that everything it has to say goes through the socket.

#![forbid(unsafe_code)]

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use mica_vmm::control;
use mica_vmm::jail::seccomp::{self, ThreadKind};
use mica_vmm::jail::{self, Ids, JailError, Side, descriptors};
use mica_vmm::panics;
use mica_wire::vm::{ControlSocket, Ending, Event};

const USAGE: &str = "usage: mica-vm --uid N --gid N [--netns N], with a control socket as standard \
    input. N of --netns is the number of an open descriptor: an empty network namespace to share";

fn main() -> ExitCode {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1)) else {
        return refuse(USAGE);
    };
    let network = match descriptors::close_inherited(arguments.netns) {
        Ok(network) => network,
        Err(error) => return refuse(&format!("mica-vm: cannot close other descriptors: {error}")),
    };
    if !descriptors::share_one_heap() {
        return refuse("mica-vm: the allocator does not take its one setting");
    }
    // A number of its own, because standard input becomes /dev/null.
    let socket = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(fd) => ControlSocket::from_fd(fd),
        Err(error) => return refuse(&format!("mica-vm: standard input is closed: {error}")),
    };
    panics::remember();
    #[cfg(feature = "breakout")]
    mica_vmm::breakout::take_order();
    match std::panic::catch_unwind(|| run(&socket, arguments.ids, network)) {
        Ok(code) => code,
        Err(_) => end(&socket, Ending::Internal(panics::first().to_owned())),
    }
}

fn run(socket: &ControlSocket, ids: Ids, network: Option<OwnedFd>) -> ExitCode {
    match jail::separate(socket, network) {
        Ok(Side::First) => return ExitCode::SUCCESS,
        Ok(Side::Orphan) => return ExitCode::FAILURE,
        Ok(Side::Vm) => {}
        Err(error) => return end(socket, jail_ending(&error)),
    }
    control::warm_clocks();
    if let Err(error) = jail::enter(ids) {
        return end(socket, jail_ending(&error));
    }
    #[cfg(feature = "breakout")]
    if let Some(ending) = mica_vmm::breakout::attempt_bare() {
        return end(socket, ending);
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

fn jail_ending(error: &JailError) -> Ending {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    Ending::Internal(format!("{error}: {cause}"))
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

/// What the command line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arguments {
    ids: Ids,
    netns: Option<u32>,
}

impl Arguments {
    /// `--uid N --gid N`, each once, neither 0; `--netns N` at most once, and not the control socket.
    fn parse(mut words: impl Iterator<Item = String>) -> Option<Self> {
        let (mut uid, mut gid, mut netns) = (None, None, None);
        while let Some(name) = words.next() {
            let slot = match name.as_str() {
                "--uid" => &mut uid,
                "--gid" => &mut gid,
                "--netns" => &mut netns,
                _ => return None,
            };
            let value: u32 = words.next()?.parse().ok()?;
            if value == 0 || value == u32::MAX || slot.replace(value).is_some() {
                return None;
            }
        }
        Some(Self { ids: Ids { uid: uid?, gid: gid? }, netns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Option<Arguments> {
        Arguments::parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn it_never_stays_root() {
        let ids = Ids { uid: 7, gid: 8 };
        assert_eq!(parse("--uid 7 --gid 8"), Some(Arguments { ids, netns: None }));
        let shared = Some(Arguments { ids, netns: Some(1) });
        assert_eq!(parse("--netns 1 --uid 7 --gid 8"), shared);
        for bad in [
            "",
            "--uid 0 --gid 8",
            "--uid 7 --gid 0",
            "--uid 7",
            "--uid 7 --uid 7 --gid 8",
            "--uid -1 --gid 8",
            "--uid 4294967295 --gid 8",
            "--uid 7 --gid 8 extra",
            "--uid 7 --gid 8 --netns 0",
            "--uid 7 --gid 8 --netns",
            "--uid 7 --gid 8 --netns 1 --netns 4",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
