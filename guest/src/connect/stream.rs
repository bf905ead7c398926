//! The answer of a server stream: envelopes from a handler, keepalives, the deadline, one end.
//!
//! Made by `rpc`, written by handlers, polled by hyper. Refuses to run ahead of the client by more
//! than [`FRAMES_AHEAD_MAX`] envelopes, and to end without saying how.

use std::future::Future as _;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use super::{Code, Codec, ConnectError, Reply, envelope};
use crate::http::body::Disconnected;

/// How many envelopes a handler may be ahead of the client.
const FRAMES_AHEAD_MAX: usize = 16;

/// Writes messages of one type to the client.
#[derive(Debug)]
pub struct StreamSender<T> {
    frames: mpsc::Sender<Bytes>,
    codec: Codec,
    message: PhantomData<fn(T)>,
}

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The client is gone, or its deadline has passed.
    #[error(transparent)]
    Disconnected(#[from] Disconnected),
    /// The message did not serialise.
    #[error(transparent)]
    Message(#[from] ConnectError),
}

impl<T: Reply> StreamSender<T> {
    /// Sends one message, waiting while the client is behind.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, message: &T) -> Result<(), SendError> {
        let frame = envelope::message(&self.codec.encode(message)?);
        self.frames.send(frame).await.map_err(|_| SendError::Disconnected(Disconnected))
    }

    /// Waits until the client has gone or its deadline has passed.
    pub async fn closed(&self) {
        self.frames.closed().await;
    }
}

/// How a stream keeps its connection alive and when it must end.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    /// Sent after `every` without another message, but never first: clients read what a stream is about
    /// from its first message.
    pub keepalive: Option<Bytes>,
    /// How long that is.
    pub every: Duration,
    /// When the stream ends with `deadline_exceeded`.
    pub deadline: Option<Instant>,
}

/// What ends the stream: sent by the task that runs the handler.
pub(super) type Outcome = Result<(), ConnectError>;

/// The body of the answer.
pub(super) struct StreamBody {
    frames: mpsc::Receiver<Bytes>,
    outcome: tokio::sync::oneshot::Receiver<Outcome>,
    pace: Pace,
    /// When silence is to be filled; none before the first message.
    keepalive: Option<Pin<Box<Sleep>>>,
    deadline: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

/// A stream: what the handler writes to, where its outcome goes, and the body.
pub(super) fn stream<T: Reply>(
    codec: Codec,
    pace: Pace,
) -> (StreamSender<T>, tokio::sync::oneshot::Sender<Outcome>, StreamBody) {
    let (sender, frames) = mpsc::channel(FRAMES_AHEAD_MAX);
    let (done, outcome) = tokio::sync::oneshot::channel();
    let body = StreamBody {
        frames,
        outcome,
        keepalive: None,
        deadline: pace.deadline.map(|at| Box::pin(tokio::time::sleep_until(at))),
        pace,
        ended: false,
    };
    (StreamSender { frames: sender, codec, message: PhantomData }, done, body)
}

impl StreamBody {
    fn finish(&mut self, error: Option<&ConnectError>) -> Bytes {
        self.ended = true;
        self.frames.close();
        envelope::end(error)
    }

    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // The deadline first: a stream with much to say ends on time as well.
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            let error = ConnectError::new(Code::DeadlineExceeded, "context deadline exceeded");
            return Poll::Ready(Some(self.finish(Some(&error))));
        }
        match self.frames.poll_recv(context) {
            Poll::Ready(Some(frame)) => {
                self.put_keepalive_off();
                return Poll::Ready(Some(frame));
            }
            Poll::Ready(None) => {
                let broken =
                    |_| Err(ConnectError::internal("the handler of this stream broke off"));
                let outcome =
                    ready!(Pin::new(&mut self.outcome).poll(context)).unwrap_or_else(broken);
                return Poll::Ready(Some(self.finish(outcome.err().as_ref())));
            }
            Poll::Pending => {}
        }
        if let (Some(frame), Some(silence)) = (self.pace.keepalive.clone(), &mut self.keepalive) {
            ready!(silence.as_mut().poll(context));
            self.put_keepalive_off();
            return Poll::Ready(Some(frame));
        }
        Poll::Pending
    }

    fn put_keepalive_off(&mut self) {
        let at = Instant::now() + self.pace.every;
        match &mut self.keepalive {
            Some(silence) => silence.as_mut().reset(at),
            None => self.keepalive = Some(Box::pin(tokio::time::sleep_until(at))),
        }
    }
}

impl http_body::Body for StreamBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.poll_bytes(context).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    fn pace(deadline: Option<Instant>) -> Pace {
        let keepalive = Some(envelope::message(b"{\"keepalive\":{}}"));
        Pace { keepalive, every: Duration::from_secs(5), deadline }
    }

    async fn next(body: &mut StreamBody) -> Option<Bytes> {
        Some(body.frame().await?.unwrap().into_data().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_but_not_before_the_first_message() {
        let (sender, done, mut body) = stream::<u32>(Codec::Json, pace(None));
        let start = Instant::now();
        let writer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(12)).await;
            sender.send(&7).await.unwrap();
            tokio::time::sleep(Duration::from_secs(4)).await;
            sender.send(&8).await.unwrap();
            sender.closed().await;
            drop(done);
        });
        assert_eq!(next(&mut body).await.unwrap(), envelope::message(b"7"));
        assert_eq!(start.elapsed().as_secs(), 12);
        assert_eq!(next(&mut body).await.unwrap(), envelope::message(b"8"), "it puts them off");
        for silence in 1..=2 {
            assert_eq!(next(&mut body).await.unwrap(), envelope::message(b"{\"keepalive\":{}}"));
            assert_eq!(start.elapsed().as_secs(), 16 + 5 * silence);
        }
        drop(body);
        writer.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn every_end_says_how() {
        let (sender, done, mut body) = stream::<u32>(Codec::Json, pace(None));
        done.send(Ok(())).unwrap();
        drop(sender);
        assert_eq!(next(&mut body).await.unwrap(), envelope::end(None));
        assert_eq!(next(&mut body).await, None);

        let (sender, done, mut body) = stream::<u32>(Codec::Json, pace(None));
        drop((sender, done));
        let frame = next(&mut body).await.unwrap();
        assert!(String::from_utf8_lossy(&frame).contains("internal"), "{frame:?}");

        let soon = Instant::now() + Duration::from_secs(1);
        let (sender, _done, mut body) = stream::<u32>(Codec::Json, pace(Some(soon)));
        let frame = next(&mut body).await.unwrap();
        assert!(String::from_utf8_lossy(&frame).contains("deadline_exceeded"), "{frame:?}");
        assert!(matches!(sender.send(&1).await, Err(SendError::Disconnected(_))));
    }
}
