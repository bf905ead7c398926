//! Runs the real `mica-guest agent` on a Unix socket and speaks its protocols as the host and a
//! client would, byte by byte.
//!
//! Called by the tests of this folder. Refuses to wait longer than [`PATIENCE`] for anything.

#![expect(clippy::unwrap_used, reason = "a test's support fails its test by panicking")]

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mica_units::GuestPort;
use mica_wire::guest::{ControlReply, ControlRequest, InitRequest, Preamble, Verdict};
use serde_json::Value;

/// Longest wait for any single read.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The token of a sandbox that [`Agent::start`] initialises.
pub const TOKEN: &str = "token-of-the-test";

/// What [`Agent::init`] says; the same sandbox goes on unless the id is another.
pub fn identity(sandbox_id: &str) -> InitRequest {
    InitRequest {
        sandbox_id: sandbox_id.to_owned(),
        template_id: "template".to_owned(),
        machine_id: "0123456789abcdef".repeat(2),
        access_token: Some(TOKEN.to_owned()),
        env_vars: [("OF_THE_SANDBOX".to_owned(), "1".to_owned())].into(),
        wall_clock_unix_ns: 1,
        new_sandbox: false,
        defaults: None,
    }
}

/// One running agent; it ends with the value.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    directory: PathBuf,
}

impl Agent {
    /// An agent that has its identity.
    pub fn start() -> Self {
        let agent = Self::start_bare();
        assert_eq!(agent.init("itest").error, None);
        agent
    }

    /// An agent that nobody has talked to yet.
    pub fn start_bare() -> Self {
        Self::start_prepared(|_, _| {})
    }

    /// The same, with a last word on its command line; the directory is the agent's own.
    pub fn start_prepared(prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique =
            format!("mica-agent-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&directory).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica-guest"));
        command
            .args(["agent", "--root-user", "--envd-tcp", "none", "--interpreter-tcp", "none"])
            .arg("--unix")
            .arg(directory.join("gateway"))
            .stdout(Stdio::piped());
        prepare(&mut command, &directory);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, directory }
    }

    /// A connection to the gateway, and the verdict.
    pub fn gateway(&self, preamble: &[u8]) -> (UnixStream, Option<Verdict>) {
        let mut stream = UnixStream::connect(self.directory.join("gateway")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(preamble).unwrap();
        let mut verdict = [0];
        stream.read_exact(&mut verdict).unwrap();
        (stream, Verdict::decode(verdict[0]))
    }

    /// A connection to a port.
    pub fn port(&self, port: u16) -> (UnixStream, Option<Verdict>) {
        self.gateway(&Preamble::Tcp(GuestPort::new(port).unwrap()).encode())
    }

    /// Tells the agent who it is.
    pub fn init(&self, sandbox_id: &str) -> ControlReply {
        self.control(&ControlRequest::Init(identity(sandbox_id)))
    }

    /// One control exchange.
    pub fn control(&self, request: &ControlRequest) -> ControlReply {
        let (mut stream, verdict) = self.gateway(&Preamble::Control.encode());
        assert_eq!(verdict, Some(Verdict::Open));
        stream.set_read_timeout(Some(8 * PATIENCE)).unwrap();
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        stream.write_all(&line).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        serde_json::from_slice(&reply).unwrap()
    }

    /// Sends a whole HTTP request to envd and reads the answer's head.
    pub fn request(&self, head: &str, body: &[u8]) -> Answer {
        self.request_to(49983, head, body)
    }

    /// The same to one of the agent's other ports.
    pub fn request_to(&self, port: u16, head: &str, body: &[u8]) -> Answer {
        let (mut stream, verdict) = self.port(port);
        assert_eq!(verdict, Some(Verdict::Open));
        stream
            .write_all(
                format!("{head}\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(),
            )
            .unwrap();
        stream.write_all(body).unwrap();
        Answer::read(stream)
    }

    /// A unary call; a method without a service is of `process.Process`.
    pub fn call(&self, method: &str, message: &Value) -> (u16, Value) {
        let mut answer = self.call_with(method, "", message);
        let body = answer.body();
        (answer.status, serde_json::from_slice(&body).unwrap())
    }

    /// The same with more headers, its answer as it is.
    pub fn call_with(&self, method: &str, headers: &str, message: &Value) -> Answer {
        let kind = format!("application/json{headers}");
        self.request(&head(TOKEN, method, &kind), message.to_string().as_bytes())
    }

    /// A unary call in binary: status, content type, body.
    pub fn call_binary(&self, method: &str, message: &[u8]) -> (u16, String, Vec<u8>) {
        let mut answer = self.request(&head(TOKEN, method, "application/proto"), message);
        let kind = answer.header("content-type").unwrap().to_owned();
        (answer.status, kind, answer.body())
    }

    /// A call that streams, in binary.
    pub fn stream_binary(&self, method: &str, headers: &str, message: &[u8]) -> Answer {
        let kind = format!("application/connect+proto{headers}");
        self.request(&head(TOKEN, method, &kind), &envelope(message))
    }

    /// A call whose client streams: the request's head is sent, its body is the caller's.
    pub fn open(&self, method: &str, kind: &str) -> Upstream {
        let (mut stream, verdict) = self.port(49983);
        assert_eq!(verdict, Some(Verdict::Open));
        let head = head(TOKEN, method, kind);
        let head = format!("{head}\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        Upstream(stream)
    }

    /// What is the agent's own of the file system.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A call that streams, with more headers.
    pub fn stream_with(&self, method: &str, headers: &str, message: &Value) -> Answer {
        self.stream_as(TOKEN, method, headers, message)
    }

    /// The same with a token of one's own.
    pub fn stream_as(&self, token: &str, method: &str, headers: &str, message: &Value) -> Answer {
        let kind = format!("application/connect+json{headers}");
        self.request(&head(token, method, &kind), &envelope(message.to_string().as_bytes()))
    }

    /// A call that streams.
    pub fn stream(&self, method: &str, message: &Value) -> Answer {
        self.stream_with(method, "", message)
    }

    /// `Start`, and the process id of its first event.
    pub fn start_process(&self, message: &Value) -> (u64, Answer) {
        let mut answer = self.stream("Start", message);
        let first = answer.event().unwrap();
        (first["event"]["start"]["pid"].as_u64().unwrap(), answer)
    }
}

/// The head of a call; `kind` may bring more headers along.
fn head(token: &str, method: &str, kind: &str) -> String {
    let service = if method.contains('/') { "" } else { "process.Process/" };
    format!("POST /{service}{method} HTTP/1.1\r\nx-access-token: {token}\r\ncontent-type: {kind}")
}

/// One message of a stream.
pub fn envelope(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// The body of a request that is still being sent.
#[derive(Debug)]
pub struct Upstream(UnixStream);

impl Upstream {
    /// Sends bytes as they are, as one chunk.
    pub fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
        self.0.write_all(&chunk)
    }

    /// Sends one message.
    pub fn send(&mut self, message: &[u8]) {
        self.raw(&envelope(message)).unwrap();
    }

    /// Gives up writing after a while without progress.
    pub fn hurry(&self, patience: Duration) {
        self.0.set_write_timeout(Some(patience)).unwrap();
    }

    /// Ends the body and reads the answer.
    pub fn end(mut self) -> Answer {
        self.0.write_all(b"0\r\n\r\n").unwrap();
        Answer::read(self.0)
    }

    /// Reads the answer while the body is not at its end.
    pub fn answer(self) -> Answer {
        Answer::read(self.0)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// An answer whose body is read piece by piece.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers, in lower case.
    pub headers: Vec<(String, String)>,
    reader: BufReader<UnixStream>,
    /// Bytes of chunks that are not yet taken as frames.
    pending: Vec<u8>,
}

impl Answer {
    fn read(stream: UnixStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        Self { status, headers, reader, pending: Vec::new() }
    }

    /// One header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All of the body.
    pub fn body(&mut self) -> Vec<u8> {
        if matches!(self.status, 204 | 304) {
            return Vec::new();
        }
        if let Some(length) = self.header("content-length") {
            let mut body = vec![0; length.parse().unwrap()];
            self.reader.read_exact(&mut body).unwrap();
            return body;
        }
        while self.chunk() {}
        std::mem::take(&mut self.pending)
    }

    fn chunk(&mut self) -> bool {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        let length = usize::from_str_radix(line.trim_end(), 16).unwrap();
        let mut bytes = vec![0; length + 2];
        self.reader.read_exact(&mut bytes).unwrap();
        self.pending.extend(&bytes[..length]);
        length > 0
    }

    fn frame(&mut self) -> (u8, Value) {
        let (flags, payload) = self.raw_frame();
        (flags, serde_json::from_slice(&payload).unwrap())
    }

    /// The next envelope of a stream: its flags and what is in it.
    pub fn raw_frame(&mut self) -> (u8, Vec<u8>) {
        loop {
            if let Some(([flags, length @ ..], rest)) = self.pending.split_first_chunk::<5>() {
                let length = usize::try_from(u32::from_be_bytes(*length)).unwrap();
                if let Some(payload) = rest.get(..length) {
                    let frame = (*flags, payload.to_vec());
                    self.pending.drain(..5 + length);
                    return frame;
                }
            }
            if let Some(length) = self.header("content-length") {
                let mut body = vec![0; length.parse().unwrap()];
                self.reader.read_exact(&mut body).unwrap();
                self.headers.retain(|(name, _)| name != "content-length");
                self.pending.extend(body);
            } else {
                assert!(self.chunk(), "the stream ended without an end frame");
            }
        }
    }

    /// The next message of a stream; `None` at an end in good order.
    pub fn event(&mut self) -> Option<Value> {
        match self.frame() {
            (0, message) => Some(message),
            (2, end) => {
                assert_eq!(end, serde_json::json!({}));
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// The error in a stream's end, which must come next but for data.
    pub fn error(&mut self) -> Value {
        loop {
            match self.frame() {
                (0, _) => {}
                (2, end) => return end["error"].clone(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Everything up to the end event: what was written, by kind, and the end.
    pub fn rest(&mut self) -> (String, String, Value) {
        let (mut out, mut err) = (String::new(), String::new());
        loop {
            let message = self.event().expect("an end event comes before the end");
            let event = &message["event"];
            if event["end"].is_object() {
                assert_eq!(self.event(), None, "the end event is the last");
                return (out, err, event["end"].clone());
            }
            let data = &event["data"];
            if let Some(text) = data["stdout"].as_str().or_else(|| data["pty"].as_str()) {
                out.push_str(&decode(text));
            }
            if let Some(text) = data["stderr"].as_str() {
                err.push_str(&decode(text));
            }
        }
    }

    /// Whether the agent hangs up, with nothing more to say.
    pub fn is_cut_off(&mut self) -> bool {
        self.pending.is_empty() && self.reader.fill_buf().unwrap().is_empty()
    }

    /// Hangs up, as a client that goes away does.
    pub fn hang_up(self) {
        self.reader.get_ref().shutdown(Shutdown::Both).unwrap();
    }
}

/// base64 to text.
pub fn decode(data: &str) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(data).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Text to base64.
pub fn encode(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}
