//! Bytes between a client and a sandbox after both have left HTTP, as a WebSocket does.
//!
//! Called by the driver of HTTP/1.1 connections once a `101` has left. Holds one read's worth of
//! bytes each way, and only while the other side does not take them. An end that closes its direction
//! closes that direction of the other at once; one that breaks ends both. Refuses to keep what is
//! half closed and silent.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncWrite, FutureExt};
use mica_shards::rt::time;

/// Most bytes of one read, on the stack of one poll.
const READ_BYTES: usize = 16 * 1024;

/// How long one direction may be silent once the other is closed. Both ends know by then that no more
/// comes; what is left is one that went away without a word.
const HALF_CLOSED_SILENCE: Duration = Duration::from_secs(60);

/// One direction.
struct Pump {
    /// Bytes that were read and not taken yet.
    held: Vec<u8>,
    taken: usize,
    unflushed: bool,
    state: State,
    moved: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Closing,
    Closed,
}

impl Pump {
    fn new(early: Vec<u8>) -> Self {
        Self { held: early, taken: 0, unflushed: false, state: State::Open, moved: 0 }
    }

    /// Moves what can be moved. Ready when this direction is closed.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        loop {
            while self.taken < self.held.len() {
                let count = ready!(Pin::new(&mut *to).poll_write(cx, &self.held[self.taken..]))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.count(count);
                self.taken += count;
            }
            if !self.held.is_empty() {
                (self.held, self.taken) = (Vec::new(), 0);
            }
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_close(cx))?;
                    self.state = State::Closed;
                }
                State::Open => {
                    let mut scratch = [0; READ_BYTES];
                    match Pin::new(&mut *from).poll_read(cx, &mut scratch)? {
                        Poll::Ready(0) => self.state = State::Closing,
                        Poll::Ready(count) => self.pass(cx, &scratch[..count], to)?,
                        Poll::Pending if self.unflushed => {
                            ready!(Pin::new(&mut *to).poll_flush(cx))?;
                            self.unflushed = false;
                            return Poll::Pending;
                        }
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
        }
    }

    /// Writes as much as is taken at once and holds the rest.
    fn pass(
        &mut self,
        cx: &mut Context<'_>,
        mut bytes: &[u8],
        to: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => {
                    self.count(count);
                    bytes = &bytes[count..];
                }
                Poll::Pending => {
                    self.held = bytes.to_vec();
                    break;
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, bytes: usize) {
        self.unflushed = true;
        self.moved = self.moved.wrapping_add(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

/// Passes bytes both ways until both directions are closed, one end breaks, or `stop`. `early` are the
/// bytes that each end said before it was known that it had left HTTP.
pub async fn splice(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    guest: &mut (impl AsyncRead + AsyncWrite + Unpin),
    (early_client, early_guest): (Vec<u8>, Vec<u8>),
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let mut up = Pump::new(early_client);
    let mut down = Pump::new(early_guest);
    let mut stop = std::pin::pin!(stop);
    loop {
        let half_closed = up.state == State::Closed || down.state == State::Closed;
        let moved = up.moved.wrapping_add(down.moved);
        let work = poll_fn(|cx| -> Poll<io::Result<Option<bool>>> {
            let open = (up.state, down.state);
            let ups = up.poll(cx, client, guest)?;
            let downs = down.poll(cx, guest, client)?;
            let done = ups.is_ready() && downs.is_ready();
            let changed = open != (up.state, down.state) && (ups.is_ready() || downs.is_ready());
            if done || changed { Poll::Ready(Ok(Some(done))) } else { Poll::Pending }
        });
        let silence = async {
            if !half_closed {
                return std::future::pending().await;
            }
            time::sleep(HALF_CLOSED_SILENCE).await;
            Ok(None)
        };
        let stopped = async {
            stop.as_mut().await;
            Ok(Some(true))
        };
        match work.or(silence).or(stopped).await? {
            Some(true) => return Ok(()),
            Some(false) => {}
            None if moved == up.moved.wrapping_add(down.moved) => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::block_on;
    use std::collections::VecDeque;

    /// An end that says `says` and then closes, or waits; and takes `takes` bytes at a time, or none.
    struct End {
        says: VecDeque<Vec<u8>>,
        closes: bool,
        takes: usize,
        heard: Vec<u8>,
        closed: bool,
        reads: usize,
    }

    impl End {
        fn new(says: &[&[u8]], closes: bool, takes: usize) -> Self {
            let says = says.iter().map(|part| part.to_vec()).collect();
            Self { says, closes, takes, heard: Vec::new(), closed: false, reads: 0 }
        }
    }

    impl AsyncRead for End {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.reads += 1;
            match self.says.pop_front() {
                Some(part) => {
                    buffer[..part.len()].copy_from_slice(&part);
                    Poll::Ready(Ok(part.len()))
                }
                None if self.closes => Poll::Ready(Ok(0)),
                None => Poll::Pending,
            }
        }
    }

    impl AsyncWrite for End {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            if self.takes == 0 {
                return Poll::Pending;
            }
            let count = bytes.len().min(self.takes);
            self.heard.extend_from_slice(&bytes[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.closed = true;
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn what_was_said_early_comes_first_and_both_ends_close() {
        let mut client = End::new(&[b"two", b"three"], true, 2);
        let mut guest = End::new(&[b"answer"], true, 100);
        let early = (b"one".to_vec(), b"hello ".to_vec());
        let never = std::future::pending();
        block_on(splice(&mut client, &mut guest, early, never)).unwrap();
        assert_eq!(guest.heard, b"onetwothree");
        assert_eq!(client.heard, b"hello answer");
        assert!(client.closed && guest.closed);
    }

    #[test]
    fn a_side_that_takes_nothing_holds_the_other_back() {
        let endless: Vec<&[u8]> = vec![b"some"; 100];
        let mut client = End::new(&endless, false, 100);
        let mut guest = End::new(&[], false, 0);
        let mut polls = 0;
        let stop = poll_fn(|cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls > 50 { Poll::Ready(()) } else { Poll::Pending }
        });
        block_on(splice(&mut client, &mut guest, Default::default(), stop)).unwrap();
        assert_eq!(client.reads, 1, "one read is held, and no second is made");
    }

    #[test]
    fn a_direction_that_is_closed_leaves_the_other_open() {
        let mut client = End::new(&[b"last"], true, 100);
        let mut guest = End::new(&[], false, 100);
        let mut pump = Pump::new(Vec::new());
        let outcome = block_on(poll_fn(|cx| pump.poll(cx, &mut client, &mut guest)));
        assert!(outcome.is_ok() && guest.closed && !client.closed);
        assert_eq!(guest.heard, b"last");
    }
}
