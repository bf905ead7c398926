//! The body of a sandbox's answer, read from its stream as the client takes it.
//!
//! Called by hyper, through [`crate::body`]. Between two pieces it holds no buffer, so an answer that says
//! nothing for hours costs next to nothing; the connection's driver may take it over from hyper, whose
//! buffers are then gone as well. When it is dropped the stream into the guest closes; when it
//! has ended well the stream is kept for the client's next request. Refuses to keep one that says more
//! than its answer.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_lite::AsyncRead;
use hyper::HeaderMap;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use mica_shards::GuestStream;
use mica_shards::rt::Task;
use mica_shards::rt::time::Instant;
use mica_units::{GuestPort, SandboxId};

use super::answer::{BodyReader, Malformed};
use super::headers;
use super::kept::Kept;
use super::streams::Open;

/// Most bytes of one read, on the stack of one poll.
pub const READ_BYTES: usize = 16 * 1024;

/// Why an answer ends before its end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A call over HTTP/2 did.
    #[error(transparent)]
    Call(#[from] hyper::Error),
    /// The stream broke.
    #[error("the stream into the sandbox broke")]
    Stream(#[from] io::Error),
    /// The server does not keep to the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// A task beside an answer. Dropping this ends it.
#[derive(Debug)]
pub struct Beside(Task<()>);

impl Beside {
    /// From now on it ends with the answer.
    #[must_use]
    pub fn new(task: Task<()>) -> Self {
        Self(task)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Where a stream goes when it has served a request.
#[derive(Debug)]
pub struct Return {
    /// The client's place for it.
    pub kept: Rc<Kept>,
    /// The sandbox that it leads to.
    pub id: SandboxId,
    /// The port.
    pub port: GuestPort,
}

impl Return {
    /// Keeps it there.
    pub fn put(self, stream: GuestStream) {
        self.kept.put(self.id, self.port, stream);
    }
}

/// The body.
#[derive(Debug)]
pub enum FromSandbox {
    /// Over HTTP/1.1.
    H1(Rc<Passing>),
    /// Of a call over HTTP/2.
    Call {
        /// As hyper reads it.
        body: Incoming,
        /// What drives the stream.
        _driver: Beside,
        /// Its count.
        _open: Open,
    },
}

/// An answer that hyper passes on, for as long as nobody takes it over.
#[derive(Debug)]
pub struct Passing {
    answering: RefCell<Option<Answering>>,
    /// When it said something last.
    spoke_at: Cell<Instant>,
    /// hyper has bytes of it that the client's socket has not.
    unflushed: Cell<bool>,
}

impl Passing {
    /// An answer of which hyper has nothing but the head.
    #[must_use]
    pub fn new(answering: Answering) -> Rc<Self> {
        let (spoke_at, unflushed) = (Cell::new(Instant::now()), Cell::new(true));
        Rc::new(Self { answering: RefCell::new(Some(answering)), spoke_at, unflushed })
    }

    /// All that hyper had of it was handed to the kernel.
    pub fn flushed(&self) {
        self.unflushed.set(false);
    }

    /// Takes it over if it has been silent for so long, and nothing but its own bytes is to come. hyper
    /// must not ask for more of it then.
    pub fn take_silent(&self, silence: Duration) -> Option<Answering> {
        let is_silent = !self.unflushed.get() && self.spoke_at.get().elapsed() >= silence;
        let mut answering = self.answering.borrow_mut();
        let waits = answering.as_ref().is_some_and(|it| it.upload.is_none() && !it.body.is_done());
        if is_silent && waits { answering.take() } else { None }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let mut answering = self.answering.borrow_mut();
        let Some(answering) = answering.as_mut() else { return Poll::Pending };
        let frame = ready!(answering.poll(cx));
        self.spoke_at.set(Instant::now());
        self.unflushed.set(true);
        Poll::Ready(frame)
    }

    /// How much is still to come, where that is known.
    fn left(&self) -> Option<u64> {
        self.answering.borrow().as_ref().and_then(|answering| answering.body.left())
    }
}

/// An answer over HTTP/1.1.
#[derive(Debug)]
pub struct Answering {
    /// The stream, until the answer has ended.
    pub stream: Option<Rc<RefCell<GuestStream>>>,
    /// What is left of the answer.
    pub body: BodyReader,
    /// What was read with its head.
    pub early: Vec<u8>,
    /// The rest of the request, on its way.
    pub upload: Option<Beside>,
    /// Where the stream goes then, if it may.
    pub then: Option<Return>,
    /// Its count.
    pub open: Option<Open>,
}

impl Answering {
    /// The next piece, when there is one.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        loop {
            if self.body.is_done() {
                let trailers = self.body.trailers().map(clean);
                return Poll::Ready(trailers.map(|fields| Ok(Frame::trailers(fields))));
            }
            let content = if self.early.is_empty() {
                ready!(self.poll_read(cx))
            } else {
                let early = std::mem::take(&mut self.early);
                self.take(&early)
            };
            match content {
                Ok(content) if content.is_empty() => {}
                Ok(content) => return Poll::Ready(Some(Ok(Frame::data(content)))),
                Err(error) => {
                    self.let_go();
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Broken>> {
        let Some(stream) = &self.stream else {
            return Poll::Ready(Err(Malformed::CutShort.into()));
        };
        let mut scratch = [0; READ_BYTES];
        let read = Pin::new(&mut *stream.borrow_mut()).poll_read(cx, &mut scratch);
        let count = ready!(read)?;
        if count == 0 {
            self.body.close()?;
            self.let_go();
            return Poll::Ready(Ok(Bytes::new()));
        }
        Poll::Ready(self.take(&scratch[..count]))
    }

    /// The content of what was read. When it is the last, the stream goes where it goes.
    fn take(&mut self, read: &[u8]) -> Result<Bytes, Broken> {
        let mut content = BytesMut::with_capacity(read.len());
        let taken = self.body.take(read, &mut content)?;
        if self.body.is_done() {
            self.end(taken < read.len());
        }
        Ok(content.freeze())
    }

    /// The answer has ended, and the server may have said more than that.
    pub fn end(&mut self, said_more: bool) {
        let (stream, then) = (self.stream.take(), self.then.take());
        // A request that is not sent to its end still has the stream, and then it is not kept.
        let asked = self.upload.take().is_none();
        self.open = None;
        if let (Some(stream), Some(then), true, false) = (stream, then, asked, said_more)
            && let Ok(stream) = Rc::try_unwrap(stream)
        {
            then.put(stream.into_inner());
        }
    }

    fn let_go(&mut self) {
        (self.stream, self.upload, self.then, self.open) = (None, None, None, None);
    }
}

/// Without what is of the hop: HTTP/2 takes it for an error.
fn clean(mut trailers: HeaderMap) -> HeaderMap {
    headers::clean_response(&mut trailers);
    trailers
}

impl HttpBody for FromSandbox {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match self.get_mut() {
            Self::H1(passing) => passing.poll(cx),
            Self::Call { body, .. } => {
                Pin::new(body).poll_frame(cx).map(|frame| Some(frame?.map_err(Broken::Call)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            // Fields may stand behind chunks, and are asked for.
            Self::H1(passing) => passing.left() == Some(0),
            Self::Call { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::H1(passing) => passing.left().map_or_else(SizeHint::new, SizeHint::with_exact),
            Self::Call { body, .. } => body.size_hint(),
        }
    }
}
