//! Writes in flight.
//!
//! Called by the writers. Every future is polled when it is added, so that its write starts, and
//! again whenever the writer waits for anything, so that buffers come free. After the first failure
//! it refuses everything with the same kind of error: what was written then is of no use.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};

use super::Pending;

#[derive(Default)]
pub(super) struct Queue {
    writes: Vec<Pending<()>>,
    failed: Option<io::Error>,
}

impl Queue {
    /// Drives every write; what is done leaves the queue.
    fn poll(&mut self, cx: &mut Context<'_>) {
        let failed = &mut self.failed;
        self.writes.retain_mut(|write| match write.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(Ok(())) => false,
            Poll::Ready(Err(error)) => {
                failed.get_or_insert(error);
                false
            }
        });
    }

    fn outcome(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            // An error of the system can be made again; of another, the kind is kept.
            Some(error) => Err(error
                .raw_os_error()
                .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)),
        }
    }

    /// Starts a write.
    pub(super) async fn start(&mut self, write: Pending<()>) -> io::Result<()> {
        self.writes.push(write);
        poll_fn(|cx| {
            self.poll(cx);
            Poll::Ready(self.outcome())
        })
        .await
    }

    /// Writes that are not done.
    pub(super) async fn in_flight(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            self.poll(cx);
            Poll::Ready(self.outcome())
        })
        .await?;
        Ok(self.writes.len())
    }

    /// Waits for something else, and drives the writes meanwhile.
    pub(super) async fn race<T>(&mut self, mut other: Pending<T>) -> io::Result<T> {
        poll_fn(|cx| {
            self.poll(cx);
            if let Err(error) = self.outcome() {
                return Poll::Ready(Err(error));
            }
            other.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for every write, also after one has failed: their buffers must come back first.
    pub(super) async fn all(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            self.poll(cx);
            if self.writes.is_empty() { Poll::Ready(self.outcome()) } else { Poll::Pending }
        })
        .await
    }
}
