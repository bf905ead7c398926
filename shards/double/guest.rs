//! The "guest" of the double: an agent on a thread, in several tempers.
//!
//! Called by `main` for each stream. Refuses nothing that a hostile guest could do.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, exit};

use mica_wire::guest::{InitReply, InitRequest, PREAMBLE_BYTES, Preamble, Verdict};
use mica_wire::vm::{ControlSocket, Ending, Event};

/// Ports of the double, and what a connection to them does.
pub const ECHO_PORT: u16 = 7;
/// The guest powers off.
pub const POWER_OFF_PORT: u16 = 9;
/// The VM process dies without a word.
pub const CRASH_PORT: u16 = 10;
/// The VM process sends garbage.
pub const GARBAGE_PORT: u16 = 11;
/// The gateway answers with a byte that is no verdict.
pub const BAD_VERDICT_PORT: u16 = 12;
/// The gateway says nothing.
pub const MUTE_PORT: u16 = 13;
/// The VM process repeats itself without end.
pub const FLOOD_PORT: u16 = 15;
/// The environment that the agent was given, one `NAME=value` a line, and its token.
pub const ABOUT_PORT: u16 = 14;

/// How the agent answers its first exchange.
#[derive(Clone, Copy)]
pub enum Agent {
    Good,
    Refuses,
    SaysError,
    SaysGarbage,
    IsSilent,
    Floods,
    HangsUp,
}

static ABOUT: std::sync::OnceLock<String> = std::sync::OnceLock::new();

impl Agent {
    pub fn parse(mode: &str) -> Self {
        match mode {
            "init-refused" => Self::Refuses,
            "init-error" => Self::SaysError,
            "init-garbage" => Self::SaysGarbage,
            "init-silent" => Self::IsSilent,
            "init-flood" => Self::Floods,
            "init-hangs-up" => Self::HangsUp,
            _ => Self::Good,
        }
    }

    pub fn serve(self, stream: OwnedFd, socket: &ControlSocket) {
        let mut stream = UnixStream::from(stream);
        // The shard's ends do not block; ours does.
        stream.set_nonblocking(false).unwrap();
        let mut preamble = [0u8; PREAMBLE_BYTES];
        if stream.read_exact(&mut preamble).is_err() {
            return;
        }
        match Preamble::decode(preamble).unwrap() {
            Preamble::Control => self.initialise(stream),
            Preamble::Tcp(port) => serve_port(stream, port.get(), socket),
        }
    }

    fn initialise(self, mut stream: UnixStream) {
        match self {
            Self::HangsUp => return,
            Self::Refuses => return answer(&mut stream, &[Verdict::Refused as u8]),
            _ => answer(&mut stream, &[Verdict::Open as u8]),
        }
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        let request: InitRequest = serde_json::from_str(&line).unwrap();
        assert!(request.wall_clock_unix_ns > 1_600_000_000_000_000_000);
        let error = matches!(self, Self::SaysError).then(|| "no disk \x1b[31mhere".to_owned());
        let reply = InitReply { envd_version: "9.9.9".to_owned(), error };
        let mut about = format!("token={}\n", request.access_token.unwrap_or_default());
        for (name, value) in request.env_vars {
            about.push_str(&format!("{name}={value}\n"));
        }
        ABOUT.set(about).unwrap();
        match self {
            Self::SaysGarbage => answer(&mut stream, b"[1, 2\n"),
            Self::IsSilent => crate::hang(),
            Self::Floods => {
                let piece = vec![b'x'; 64 * 1024];
                while stream.write_all(&piece).is_ok() {}
            }
            _ => answer(
                &mut stream,
                format!("{}\n", serde_json::to_string(&reply).unwrap()).as_bytes(),
            ),
        }
    }
}

/// The other end may be gone already: that is the test's affair.
fn answer(stream: &mut UnixStream, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes) {
        eprintln!("the shard does not listen: {error}");
    }
}

fn serve_port(mut stream: UnixStream, port: u16, socket: &ControlSocket) {
    let open = [Verdict::Open as u8];
    match port {
        ECHO_PORT => {
            answer(&mut stream, &open);
            let mut reader = stream.try_clone().unwrap();
            if std::io::copy(&mut reader, &mut stream).is_err() {
                eprintln!("the other end went away");
            }
        }
        ABOUT_PORT => {
            answer(&mut stream, &open);
            answer(&mut stream, ABOUT.get().unwrap().as_bytes());
        }
        POWER_OFF_PORT => {
            socket.send_event(&Event::Ended(Ending::Reset)).unwrap();
            exit(0);
        }
        CRASH_PORT => std::process::abort(),
        GARBAGE_PORT => super::send_raw(socket, &[0xff; 100]),
        FLOOD_PORT => while socket.send_event(&Event::Started).is_ok() {},
        BAD_VERDICT_PORT => answer(&mut stream, &[77]),
        MUTE_PORT => crate::hang(),
        _ => answer(&mut stream, &[Verdict::Refused as u8]),
    }
}

/// Children that outlive a VM process, unless its cgroup is killed.
pub fn start_children() -> Vec<Child> {
    (0..3).map(|_| Command::new("/bin/sleep").arg("3600").spawn().unwrap()).collect()
}
