//! The agent of the sandbox in which a template is built: running commands in it, giving it files.
//!
//! Called by the steps. Speaks to envd's port over a stream of its own for each call, as a client would.
//! Refuses to hold more of a guest's answer than a frame.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_lite::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use mica_shards::rt::{self, Task, time};
use mica_shards::{ConnectError, Host};
use mica_units::{GuestPort, SandboxId};

use super::connect::{self, FrameError, Frames, ProcessEvent};
use crate::conn::Adapted;

/// How much of a file is read at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// How much of an answer that is an error is read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;
/// How long the agent may take to begin an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No stream to it.
    #[error("the build's sandbox cannot be reached: {0}")]
    Connect(#[from] ConnectError),
    /// The stream broke.
    #[error("the build's sandbox broke off: {0}")]
    Broken(#[from] hyper::Error),
    /// It takes too long.
    #[error("the build's sandbox does not answer")]
    Silent,
    /// It said no.
    #[error("{0}")]
    Refused(String),
    /// What it said is out of form.
    #[error(transparent)]
    Form(#[from] FrameError),
    /// The request cannot be written.
    #[error("the request to the agent cannot be written: {0}")]
    Request(#[from] http::Error),
    /// It ended without saying how the process did.
    #[error("the build's sandbox ended while a command ran in it")]
    CutOff,
}

/// A command for the agent.
#[derive(Clone, Debug, Default)]
pub struct Command {
    /// Arguments of bash.
    pub args: Vec<String>,
    /// Environment on top of the sandbox's.
    pub env: BTreeMap<String, String>,
    /// Where; the sandbox's directory when absent.
    pub cwd: Option<String>,
    /// Who; the sandbox's user when absent.
    pub user: Option<String>,
}

/// The agent of one sandbox.
#[derive(Clone, Debug)]
pub struct Guest {
    host: Host,
    id: SandboxId,
    token: Option<String>,
}

/// What a process says, until it ends. Dropping this leaves the process alone.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    frames: Frames,
    _driving: Driving,
}

/// The task that drives a stream into the guest. Dropping this drops the stream.
#[derive(Debug)]
struct Driving(Task<()>);

impl Drop for Driving {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Guest {
    /// The agent of this sandbox.
    #[must_use]
    pub fn new(host: Host, id: SandboxId, token: Option<String>) -> Self {
        Self { host, id, token }
    }

    /// Starts bash with a command's arguments.
    ///
    /// # Errors
    /// [`GuestError`]; [`GuestError::Refused`] has the agent's words.
    pub async fn start(&self, command: &Command) -> Result<Events, GuestError> {
        let mut process = serde_json::json!({
            "cmd": "/bin/bash", "args": command.args, "envs": command.env,
        });
        if let Some(cwd) = &command.cwd {
            process["cwd"] = serde_json::json!(cwd);
        }
        let message = serde_json::json!({ "process": process, "stdin": false }).to_string();
        let body = Sent::Whole(Some(connect::frame(message.as_bytes()).into()));
        let request = self
            .request(command.user.as_deref(), "/process.Process/Start")
            .header("connect-protocol-version", "1")
            .header(CONTENT_TYPE, "application/connect+json")
            .body(body)?;
        let (response, driving) = self.send(request).await?;
        let body = accepted(response).await?;
        Ok(Events { body, frames: Frames::default(), _driving: driving })
    }

    /// Gives the guest a file, as root. The path is ours, so nothing in it needs encoding.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn upload(&self, path: &str, file: File) -> Result<(), GuestError> {
        let target = format!("/files?path={path}&username=root");
        let request = self
            .request(Some("root"), &target)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(Sent::Pieces(Box::pin(pieces(self.host.clone(), file))))?;
        let (response, _driving) = Box::pin(self.send_slowly(request)).await?;
        accepted(response).await.map(drop)
    }

    fn request(&self, user: Option<&str>, target: &str) -> http::request::Builder {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(target)
            .header(HOST, format!("{}-{}", GuestPort::ENVD, self.id));
        if let Some(token) = &self.token {
            request = request.header("x-access-token", token);
        }
        if let Some(user) = user {
            let encoded = BASE64_STANDARD.encode(format!("{user}:"));
            request = request.header(AUTHORIZATION, format!("Basic {encoded}"));
        }
        request
    }

    async fn send(
        &self,
        request: Request<Sent>,
    ) -> Result<(Response<Incoming>, Driving), GuestError> {
        let sent = time::timeout(ANSWER_DEADLINE, Box::pin(self.send_slowly(request))).await;
        sent.unwrap_or(Err(GuestError::Silent))
    }

    /// The same for a body that takes its time: the step it belongs to has a limit.
    async fn send_slowly(
        &self,
        request: Request<Sent>,
    ) -> Result<(Response<Incoming>, Driving), GuestError> {
        let stream = self.host.connect(self.id, GuestPort::ENVD).await?;
        let (mut sender, connection) = http1::handshake(Adapted(stream)).await?;
        let driving = Driving(rt::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a stream into a build's sandbox ended");
            }
        }));
        Ok((sender.send_request(request).await?, driving))
    }
}

impl Events {
    /// The next event. After [`ProcessEvent::Ended`] there is none.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn next(&mut self) -> Result<ProcessEvent, GuestError> {
        loop {
            if let Some(event) = self.frames.next()? {
                return Ok(event);
            }
            let frame = self.body.frame().await.ok_or(GuestError::CutOff)??;
            if let Some(data) = frame.data_ref() {
                self.frames.push(data);
            }
        }
    }
}

/// The body of an answer that is no error.
async fn accepted(response: Response<Incoming>) -> Result<Incoming, GuestError> {
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response.into_body());
    }
    let body = Limited::new(response.into_body(), REFUSAL_BYTES_MAX).collect();
    let body = time::timeout(ANSWER_DEADLINE, body).await.map_err(|_| GuestError::Silent)?;
    let said = body.ok().and_then(|body| connect::refusal(&body.to_bytes()));
    Err(GuestError::Refused(said.unwrap_or_else(|| format!("the agent answered {status}"))))
}

/// A file, piece by piece. Each is read on a thread that may block.
fn pieces(host: Host, file: File) -> impl Stream<Item = io::Result<Bytes>> {
    stream::unfold(Some(file), move |file| {
        let host = host.clone();
        async move {
            let mut file = file?;
            let read = host.with_builds(move |_| {
                let mut piece = vec![0; CHUNK_BYTES];
                let count = file.read(&mut piece);
                piece.truncate(*count.as_ref().unwrap_or(&0));
                Ok((count, piece, file))
            });
            match read.await {
                Ok(Ok((Ok(0), ..))) => None,
                Ok(Ok((Ok(_), piece, file))) => Some((Ok(Bytes::from(piece)), Some(file))),
                Ok(Ok((Err(error), ..))) => Some((Err(error), None)),
                Ok(Err(error)) => Some((Err(io::Error::other(error)), None)),
                Err(error) => Some((Err(io::Error::other(error)), None)),
            }
        }
    })
}

/// A body for the agent.
enum Sent {
    Whole(Option<Bytes>),
    Pieces(Pin<Box<dyn Stream<Item = io::Result<Bytes>>>>),
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(pieces) => {
                pieces.poll_next(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }
}
