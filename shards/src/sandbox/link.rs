//! The shard's side of a VM process's control socket, and streams into the guest.
//!
//! Called by the driver (events, boot, init) and by `connect`. Refuses to block and to trust: a
//! packet that is no frame ends the sandbox.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use mica_numa::rt::net::UnixStream;
use mica_numa::rt::{self, time};
use mica_wire::guest::{
    CONTROL_LINE_BYTES_MAX, ControlReply, ControlRequest, GATEWAY_PORT, Preamble, Verdict,
};
use mica_wire::vm::{self, Command, ControlSocket, FRAME_BYTES_MAX, SocketError, decode_event};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// How long a VM process may leave its socket full before it counts as lost.
const SEND_DEADLINE: Duration = Duration::from_secs(2);

/// Most times one command waits for room.
const SEND_TRIES_MAX: u32 = 64;

/// Reads events. One packet is one event.
#[derive(Debug)]
pub(crate) struct Events {
    stream: UnixStream,
    // One byte more than a frame may have: a longer packet shows.
    packet: Box<[u8]>,
    /// What comes once in the life of a process, and came.
    heard: Vec<vm::Event>,
}

impl Events {
    /// Reads from a second descriptor of the control socket.
    pub(crate) fn new(control: &ControlSocket) -> io::Result<Self> {
        let fd = control.as_fd().try_clone_to_owned()?;
        let packet = vec![0; FRAME_BYTES_MAX + 1].into_boxed_slice();
        Ok(Self { stream: UnixStream::from_fd(fd), packet, heard: Vec::new() })
    }

    /// Waits for the next event; why there is none after it if the VM process is lost. May be
    /// dropped at any await: a packet is taken only when it is returned.
    pub(crate) async fn next(&mut self) -> Result<vm::Event, &'static str> {
        let length = match self.stream.read(&mut self.packet).await {
            Ok(0) => return Err("the VM process closed its control socket"),
            Ok(length) if length > FRAME_BYTES_MAX => {
                return Err("the VM process sent too long a frame");
            }
            Ok(length) => length,
            Err(_) => return Err("the VM process's control socket failed"),
        };
        let event = decode_event(&self.packet[..length])
            .map_err(|_| "the VM process sent something that is no event")?;
        // What is no answer to a command comes once, and answers that nobody asked for end a sandbox.
        // So a VM process that a guest has taken over cannot keep a shard busy.
        if matches!(event, vm::Event::ConsoleStarted | vm::Event::Doorbell) {
            if self.heard.contains(&event) {
                return Err("the VM process said the same thing twice");
            }
            self.heard.push(event.clone());
        }
        Ok(event)
    }
}

/// Why a command was not sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The socket stayed full.
    #[error("the VM process takes no commands")]
    Full,
    /// It is closed, or the command cannot be encoded.
    #[error("cannot send to the VM process")]
    Socket(#[source] SocketError),
}

/// Sends a command without blocking the shard: waits for room, for a bounded time.
pub(crate) async fn send(
    control: &ControlSocket,
    command: &Command,
    fds: &[BorrowedFd<'_>],
) -> Result<(), SendError> {
    let work = async {
        for _ in 0..SEND_TRIES_MAX {
            match control.send_command(command, fds) {
                Err(SocketError::WouldBlock) => {}
                other => return other.map_err(SendError::Socket),
            }
            if let Err(error) = rt::writable(control).await {
                tracing::warn!(%error, "cannot wait for room in a control socket");
                return Err(SendError::Full);
            }
        }
        Err(SendError::Full)
    };
    time::timeout(SEND_DEADLINE, work).await.unwrap_or(Err(SendError::Full))
}

/// Makes a stream to the guest's gateway; nothing has been said on it yet.
pub(crate) async fn open_stream(control: &ControlSocket) -> Result<OwnedFd, SendError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| SendError::Socket(SocketError::Os(errno)))?;
    let command = Command::OpenStream { vsock_port: GATEWAY_PORT };
    send(control, &command, &[far.as_fd()]).await?;
    Ok(near)
}

/// Why the gateway did not let us through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GatewayError {
    /// Nothing listens on the port.
    #[error("nothing listens there")]
    Refused,
    /// It closed, failed, or answered out of form.
    #[error("the gateway did not answer in form")]
    Broken,
}

/// Says whom the stream is for, and reads the verdict.
pub(crate) async fn greet(stream: &mut UnixStream, preamble: Preamble) -> Result<(), GatewayError> {
    stream.write_all(&preamble.encode()).await.map_err(|_| GatewayError::Broken)?;
    let mut verdict = [0u8; 1];
    stream.read_exact(&mut verdict).await.map_err(|_| GatewayError::Broken)?;
    match Verdict::decode(verdict[0]) {
        Some(Verdict::Open) => Ok(()),
        Some(Verdict::Refused) => Err(GatewayError::Refused),
        Some(Verdict::BadPreamble) | None => Err(GatewayError::Broken),
    }
}

/// Why an agent was not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AgentError {
    /// The connection ended before the answer: trying again can help.
    #[error("the agent closed the connection")]
    Broken,
    /// The agent says no.
    #[error("{0}")]
    Refused(String),
}

impl AgentError {
    /// Whether the connection broke.
    pub(crate) fn is_broken(&self) -> bool {
        *self == Self::Broken
    }
}

/// One exchange with the agent itself; the envd version it speaks.
pub(crate) async fn tell_agent(
    control: &ControlSocket,
    request: &ControlRequest,
) -> Result<String, AgentError> {
    let refused = |words: String| AgentError::Refused(words);
    let near = open_stream(control).await.map_err(|error| refused(super::chain(&error)))?;
    let mut stream = UnixStream::from_fd(near);
    greet(&mut stream, Preamble::Control).await.map_err(|error| match error {
        GatewayError::Broken => AgentError::Broken,
        GatewayError::Refused => refused(error.to_string()),
    })?;
    let mut line = serde_json::to_vec(request).map_err(|error| refused(error.to_string()))?;
    line.push(b'\n');
    if line.len() > CONTROL_LINE_BYTES_MAX {
        let most = CONTROL_LINE_BYTES_MAX;
        return Err(refused(format!("env_vars make a request of more than {most} bytes")));
    }
    stream.write_all(&line).await.map_err(|_| AgentError::Broken)?;
    let reply = read_line(&mut stream).await?;
    let reply: ControlReply = serde_json::from_slice(&reply)
        .map_err(|_| refused("the agent's answer is no answer".to_owned()))?;
    let harmless = |text: String| {
        let text = crate::console::sanitise(text.as_bytes());
        text.chars().take(TEXT_CHARS_MAX).collect::<String>()
    };
    match reply.error {
        Some(error) => Err(refused(harmless(error))),
        None => Ok(harmless(reply.envd_version)),
    }
}

/// Most characters of an agent's text that go any further.
const TEXT_CHARS_MAX: usize = 256;

/// One line, without its newline, of at most [`CONTROL_LINE_BYTES_MAX`].
async fn read_line(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, AgentError> {
    let mut line = Vec::new();
    let mut piece = [0u8; 4096];
    loop {
        let length = stream.read(&mut piece).await.map_err(|_| AgentError::Broken)?;
        if length == 0 {
            return Err(AgentError::Broken);
        }
        if let Some(end) = piece[..length].iter().position(|b| *b == b'\n') {
            line.extend_from_slice(&piece[..end]);
            return Ok(line);
        }
        line.extend_from_slice(&piece[..length]);
        if line.len() >= CONTROL_LINE_BYTES_MAX {
            return Err(AgentError::Refused("the agent's answer is too long".to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_a_bound() {
        futures_lite::future::block_on(async {
            let mut good: &[u8] = b"{}\nrest";
            assert_eq!(read_line(&mut good).await, Ok(b"{}".to_vec()));
            let mut cut: &[u8] = b"{}";
            assert_eq!(read_line(&mut cut).await, Err(AgentError::Broken));
            let long = vec![b'x'; CONTROL_LINE_BYTES_MAX + 5000];
            let error = read_line(&mut long.as_slice()).await.unwrap_err();
            assert!(error.to_string().contains("too long"));
        });
    }
}
