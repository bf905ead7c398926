//! How the outer machine runs programs inside the emulated host: one TCP connection per program.
//!
//! `mica-lab inside` serves it in the host, behind a port that QEMU forwards on loopback only;
//! `up`, `exec`, `push-template` and `down` are its clients. It is no ssh: nothing is encrypted,
//! because emulated cryptography would cost a second per command and the bytes never leave this
//! machine. A token made anew at every `up` keeps other users of the machine out.
//!
//! ```text
//! client                                   server
//!   Hello {token, request}  ─────────────►
//!   Stdin* StdinEnd         ─────────────►
//!                           ◄─────────────  Stdout* Stderr*
//!                           ◄─────────────  Exit(code) | Failed(text)     then both close
//! ```
//!
//! A client that goes away without reading Exit has its program killed, with all its process group.

pub mod client;
pub mod frame;
pub mod server;
pub mod supervisor;

use serde::{Deserialize, Serialize};

/// The first frame of every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What `up` wrote into the tools drive.
    pub token: String,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Answers Exit(0). Used to see that the host is up.
    Ping,
    /// Runs a program as root. `argv` has at least one element.
    Exec { argv: Vec<String> },
    /// Starts the daemon under supervision, or restarts it when it runs.
    DaemonStart { argv: Vec<String> },
    /// Stops the daemon: SIGTERM, then SIGKILL after a bounded wait.
    DaemonStop,
    /// Says on stdout what the daemon does; Exit(0) only when it runs.
    DaemonStatus,
    /// Stops the daemon, unmounts the store and switches the machine off.
    PowerOff,
}
