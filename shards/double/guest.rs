//! The "guest" of the double: an agent on a thread, in several tempers, and a program that tests talk to.
//!
//! Called by `main` for each stream. Refuses nothing that a hostile guest could do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, exit};
use std::sync::{Arc, Mutex};

use mica_units::FrameRun;
use mica_wire::guest::{
    ControlReply, ControlRequest, InitRequest, PREAMBLE_BYTES, Preamble, Verdict,
};
use mica_wire::vm::{ControlSocket, Ending, Event};

use crate::machine::{Machine, churn};
use crate::mood::Mood;

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
/// What the agent was told last: its identity, its token, and the environment.
pub const ABOUT_PORT: u16 = 14;
/// The VM process repeats itself without end.
pub const FLOOD_PORT: u16 = 15;
/// The program that does what one line says.
pub const PROGRAM_PORT: u16 = 16;
/// The VM process says that it thawed, and nobody asked.
pub const UNASKED_PORT: u16 = 17;

/// What the agent was told, in the order of its being told.
static TOLD: Mutex<Vec<InitRequest>> = Mutex::new(Vec::new());

/// Every open stream: they end when the guest goes back to a time that did not know them.
#[derive(Clone, Default)]
pub struct Streams(Arc<Mutex<Vec<UnixStream>>>);

impl Streams {
    pub fn cut(&self) {
        for stream in self.0.lock().unwrap().drain(..) {
            // One that the other end closed already cannot be shut down, and need not be.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    fn enter(&self, stream: &UnixStream) {
        self.0.lock().unwrap().push(stream.try_clone().unwrap());
    }

    /// Lets go of a stream that is over: a descriptor that stays would keep it open.
    fn leave(&self, stream: &UnixStream) {
        let inode = |stream: &UnixStream| rustix::fs::fstat(stream).unwrap().st_ino;
        let ours = inode(stream);
        self.0.lock().unwrap().retain(|open| inode(open) != ours);
    }
}

/// Answers a new stream, on a thread of its own.
pub fn serve(
    mood: &Mood,
    stream: UnixStream,
    streams: &Streams,
    machine: &Arc<Machine>,
    socket: &Arc<ControlSocket>,
) {
    streams.enter(&stream);
    let (mood, streams) = (mood.clone(), streams.clone());
    let (machine, socket) = (Arc::clone(machine), Arc::clone(socket));
    std::thread::spawn(move || {
        answer_stream(&mood, &stream, &machine, &socket);
        streams.leave(&stream);
    });
}

fn answer_stream(mood: &Mood, stream: &UnixStream, machine: &Arc<Machine>, socket: &ControlSocket) {
    let mut stream = stream.try_clone().unwrap();
    // The shard's ends do not block; ours does.
    stream.set_nonblocking(false).unwrap();
    let mut preamble = [0u8; PREAMBLE_BYTES];
    if stream.read_exact(&mut preamble).is_err() {
        return;
    }
    // A guest that stands still answers nobody.
    machine.as_guest(|_| ());
    match Preamble::decode(preamble).unwrap() {
        Preamble::Control => initialise(mood, stream, machine),
        Preamble::Tcp(port) => serve_port(stream, port.get(), machine, socket),
    }
}

fn initialise(mood: &Mood, mut stream: UnixStream, machine: &Arc<Machine>) {
    let mood = mood.now();
    match &*mood {
        "init-hangs-up" => return,
        "init-refused" => return answer(&mut stream, &[Verdict::Refused as u8]),
        _ => answer(&mut stream, &[Verdict::Open as u8]),
    }
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    if reader.read_line(&mut line).is_err() {
        return;
    }
    let request = match serde_json::from_str(&line).unwrap() {
        ControlRequest::Init(request) => request,
        ControlRequest::Sync => return synced(&mood, &mut stream, machine),
        ControlRequest::Warm { .. } => panic!("a sandbox is not warmed"),
    };
    assert!(request.wall_clock_unix_ns > 1_600_000_000_000_000_000);
    TOLD.lock().unwrap().push(request);
    let error = (mood == "init-error").then(|| "no disk \x1b[31mhere".to_owned());
    let reply = ControlReply { envd_version: "9.9.9".to_owned(), error };
    match &*mood {
        "init-garbage" => answer(&mut stream, b"[1, 2\n"),
        "init-silent" => crate::hang(),
        "init-flood" => {
            let piece = vec![b'x'; 64 * 1024];
            while stream.write_all(&piece).is_ok() {}
        }
        _ => {
            let line = format!("{}\n", serde_json::to_string(&reply).unwrap());
            answer(&mut stream, line.as_bytes());
        }
    }
}

/// Writes to the disk what was in memory alone: the word for it, where a test left one.
fn synced(mood: &str, stream: &mut UnixStream, machine: &Arc<Machine>) {
    let error = (mood == "sync-error").then(|| "unknown variant `sync`".to_owned());
    if mood == "sync-silent" {
        crate::hang();
    }
    machine.as_guest(|guest| {
        if let Some(word) = guest.unwritten.take() {
            guest.disk().write_all_at(&word, 0).unwrap();
        }
    });
    let reply = ControlReply { envd_version: "9.9.9".to_owned(), error };
    answer(stream, format!("{}\n", serde_json::to_string(&reply).unwrap()).as_bytes());
}

/// The other end may be gone already: that is the test's affair.
fn answer(stream: &mut UnixStream, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes) {
        drop(writeln!(std::io::stderr(), "the shard does not listen: {error}"));
    }
}

fn serve_port(mut stream: UnixStream, port: u16, machine: &Arc<Machine>, socket: &ControlSocket) {
    let open = [Verdict::Open as u8];
    match port {
        ECHO_PORT => {
            answer(&mut stream, &open);
            let mut reader = stream.try_clone().unwrap();
            // An end of it that breaks is the test's affair.
            drop(std::io::copy(&mut reader, &mut stream));
            drop(stream.shutdown(Shutdown::Both));
        }
        ABOUT_PORT => {
            answer(&mut stream, &open);
            answer(&mut stream, about().as_bytes());
        }
        PROGRAM_PORT => {
            answer(&mut stream, &open);
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            if reader.read_line(&mut line).is_ok() && !line.is_empty() {
                let said = obey(machine, line.trim());
                answer(&mut stream, said.as_bytes());
            }
        }
        POWER_OFF_PORT => {
            socket.send_event(&Event::Ended(Ending::Reset)).unwrap();
            exit(0);
        }
        CRASH_PORT => std::process::abort(),
        GARBAGE_PORT => super::send_raw(socket, &[0xff; 100]),
        UNASKED_PORT => socket.send_event(&Event::Thawed).unwrap(),
        FLOOD_PORT => while socket.send_event(&Event::Started).is_ok() {},
        BAD_VERDICT_PORT => answer(&mut stream, &[77]),
        MUTE_PORT => crate::hang(),
        _ => answer(&mut stream, &[Verdict::Refused as u8]),
    }
}

fn about() -> String {
    let told = TOLD.lock().unwrap();
    let last = told.last().unwrap();
    let mut about = format!(
        "times={}\nid={}\ntemplate={}\nmachine={}\nnew={}\ntoken={}\n",
        told.len(),
        last.sandbox_id,
        last.template_id,
        last.machine_id,
        last.new_sandbox,
        last.access_token.clone().unwrap_or_default(),
    );
    for (name, value) in &last.env_vars {
        about.push_str(&format!("{name}={value}\n"));
    }
    about
}

/// Carries out one line of a test.
fn obey(machine: &Arc<Machine>, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let run = |first: &str, count: &str| {
        FrameRun::new(first.parse().unwrap(), count.parse().unwrap()).unwrap()
    };
    match words[..] {
        ["fill", first, count, byte] => {
            machine.as_guest(|guest| guest.fill(run(first, count), byte.parse().unwrap()));
            "done".to_owned()
        }
        ["forget", first, count] => {
            machine.as_guest(|guest| guest.forget(run(first, count)));
            "done".to_owned()
        }
        ["look", first, count] => {
            let bytes = machine.as_guest(|guest| guest.look(run(first, count)));
            bytes.iter().map(|byte| byte.map_or("??".to_owned(), |b| format!("{b:02x}"))).collect()
        }
        ["base"] => machine.as_guest(|guest| guest.base.clone()),
        ["frames"] => machine.as_guest(|guest| guest.frames()).to_string(),
        ["churn", first, count] => {
            churn(machine, run(first, count));
            "done".to_owned()
        }
        ["register"] => machine.as_guest(|guest| guest.register).to_string(),
        ["register", number] => {
            machine.as_guest(|guest| guest.register = number.parse().unwrap());
            "done".to_owned()
        }
        ["disk"] => machine.as_guest(|guest| {
            let mut text = [0; 16];
            guest.disk().read_exact_at(&mut text, 0).unwrap();
            String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
        }),
        ["disk", text] => machine.as_guest(|guest| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(16, 0);
            guest.disk().write_all_at(&bytes, 0).unwrap();
            "done".to_owned()
        }),
        // On the disk once it is synced, and not before.
        ["cached", text] => machine.as_guest(|guest| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(16, 0);
            guest.unwritten = Some(bytes);
            "done".to_owned()
        }),
        _ => panic!("unknown line {line:?}"),
    }
}

/// Children that outlive a VM process, unless its cgroup is killed.
pub fn start_children() -> Vec<Child> {
    (0..3).map(|_| Command::new("/bin/sleep").arg("3600").spawn().unwrap()).collect()
}
