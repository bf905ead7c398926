//! What answers in place of a guest's agent.
//!
//! Called by [`crate::machine`], which brings the streams. Refuses to tell the sandboxes apart: every
//! agent here serves the same loopback, or the same user's processes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};
use mica_units::GuestPort;
use mica_wire::guest::{
    CONTROL_LINE_BYTES_MAX, ControlReply, ControlRequest, ENVD_VERSION, InitRequest,
    PREAMBLE_BYTES, Preamble, Verdict,
};

use crate::complain;
use crate::streams::Passage;

/// In the directory for temporary files, followed by the process id.
const DIRECTORY_PREFIX: &str = "mica-standin-";

/// Characters of a machine id.
const MACHINE_ID_CHARS: usize = 32;

/// The agent of one pretended guest.
#[derive(Debug)]
pub enum Agent {
    /// This program.
    Builtin,
    /// A `mica-guest` of its own.
    Guest {
        /// Its process.
        child: Mutex<Child>,
        /// Where its socket is.
        directory: PathBuf,
    },
}

impl Agent {
    /// Starts `mica-guest agent` and waits until it says that it listens.
    pub fn start(guest: Option<PathBuf>) -> Result<Self> {
        let guest = guest.map_or_else(beside_this_program, Ok)?;
        remove_what_the_dead_left();
        let directory =
            std::env::temp_dir().join(format!("{DIRECTORY_PREFIX}{}", std::process::id()));
        std::fs::create_dir(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        // setpriv, so that the agent dies with this process even when that is killed outright.
        let mut child = Process::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&guest)
            .args(["agent", "--root-user", "--envd-tcp", "none", "--interpreter-tcp", "none"])
            .arg("--unix")
            .arg(socket_path(&directory))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", guest.display()))?;
        let stdout = child.stdout.take().context("the agent has no standard output")?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        stdout.by_ref().take(1024).read_line(&mut line)?;
        if line.trim() != "ready" {
            bail!("the agent said {line:?} instead of `ready`");
        }
        thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        Ok(Self::Guest { child: Mutex::new(child), directory })
    }

    /// Serves one stream of the gateway.
    pub fn connect(&self, passage: Passage) -> Result<()> {
        match self {
            Self::Builtin => builtin(passage),
            Self::Guest { directory, .. } => {
                let agent = UnixStream::connect(socket_path(directory))
                    .context("the agent does not take connections")?;
                passage.splice(agent.into())
            }
        }
    }

    /// Ends it.
    pub fn stop(&self) {
        let Self::Guest { child, directory } = self else { return };
        if let Ok(mut child) = child.lock()
            && let Err(error) = child.kill().and_then(|()| child.wait())
        {
            complain(&anyhow::Error::new(error).context("cannot stop the agent"));
        }
        if let Err(error) = std::fs::remove_dir_all(directory) {
            complain(&anyhow::Error::new(error).context("cannot remove the agent's directory"));
        }
    }
}

/// A daemon ends this program with SIGKILL, and then the agent's socket stays behind.
fn remove_what_the_dead_left() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX));
        let Some(Ok(process)) = process.map(str::parse::<u32>) else { continue };
        if !Path::new(&format!("/proc/{process}")).exists() {
            // Another stand-in may be doing the same.
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

fn beside_this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("mica-guest"))
}

fn socket_path(directory: &Path) -> PathBuf {
    directory.join("agent")
}

/// The gateway protocol, as `mica-guest` speaks it, over this machine's loopback.
fn builtin(mut stream: Passage) -> Result<()> {
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut preamble)?;
    match Preamble::decode(preamble) {
        Ok(Preamble::Control) => builtin_control(stream),
        Ok(Preamble::Tcp(port)) => builtin_tcp(stream, port),
        Err(_) => Ok(stream.write_all(&[Verdict::BadPreamble as u8])?),
    }
}

fn builtin_control(mut stream: Passage) -> Result<()> {
    stream.write_all(&[Verdict::Open as u8])?;
    let limit = u64::try_from(CONTROL_LINE_BYTES_MAX)?;
    let mut line = String::new();
    BufReader::new(&mut stream).take(limit).read_line(&mut line)?;
    let error = match serde_json::from_str(&line).context("a control request")? {
        ControlRequest::Warm { .. } | ControlRequest::Sync => None,
        ControlRequest::Init(init) => {
            show_identity(&init.sandbox_id);
            complaint(&init)
        }
    };
    let reply = ControlReply { envd_version: ENVD_VERSION.to_owned(), error };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Makes `ps` and tests see which process is which sandbox: the kernel keeps 15 characters.
fn show_identity(sandbox_id: &str) {
    if let Err(error) = std::fs::write(format!("/proc/{}/comm", std::process::id()), sandbox_id) {
        complain(&anyhow::Error::new(error).context("cannot take the sandbox's name"));
    }
}

/// What a real agent could not work with.
fn complaint(init: &InitRequest) -> Option<String> {
    let is_hex = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f');
    let machine_id = init.machine_id.as_bytes();
    let in_form = machine_id.len() == MACHINE_ID_CHARS && machine_id.iter().all(|b| is_hex(*b));
    (!in_form).then(|| format!("{:?} is no machine id", init.machine_id))
}

fn builtin_tcp(mut stream: Passage, port: GuestPort) -> Result<()> {
    match TcpStream::connect(("127.0.0.1", port.get())) {
        Ok(server) => {
            server.set_nodelay(true)?;
            stream.write_all(&[Verdict::Open as u8])?;
            stream.splice(server.into())
        }
        Err(_) => Ok(stream.write_all(&[Verdict::Refused as u8])?),
    }
}
