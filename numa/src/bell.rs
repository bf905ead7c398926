//! How one thread wakes an executor on another: a byte in a socket that the executor polls.
//!
//! Called by `mailbox`, `blocking` and `stop`. Refuses to carry data: what happened is found in the
//! structure beside the bell. glommio's own cross-thread wakers are not used: a bell is one ring
//! completion like any other, and rings that nobody heard yet are merged into one.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The end that any thread may ring.
#[derive(Clone, Debug)]
pub(crate) struct Bell(Arc<Rope>);

#[derive(Debug)]
struct Rope {
    rung: AtomicBool,
    far: UnixStream,
}

/// The end that one executor listens to.
#[derive(Debug)]
pub(crate) struct Listener {
    rope: Arc<Rope>,
    near: UnixStream,
}

/// Both ends.
pub(crate) fn pair() -> io::Result<(Bell, Listener)> {
    let (far, near) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    near.set_nonblocking(true)?;
    let rope = Arc::new(Rope { rung: AtomicBool::new(false), far });
    Ok((Bell(Arc::clone(&rope)), Listener { rope, near }))
}

impl Bell {
    /// Wakes the listener, now or as soon as it listens.
    pub(crate) fn ring(&self) {
        if self.0.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        // A full socket means unread rings, which wake the listener as well; a closed one means
        // that there is no listener any more. Both need nothing from the ringer.
        if let Err(error) = (&self.0.far).write(&[1]) {
            tracing::trace!(%error, "a bell without a listener");
        }
    }
}

impl Listener {
    /// Waits for a ring. What was put beside the bell before the ring is visible afterwards.
    pub(crate) async fn heard(&mut self) -> io::Result<()> {
        crate::rt::readable(&self.near).await?;
        let mut bytes = [0u8; 64];
        match self.near.read(&mut bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        // Only now: a ring after this line writes a new byte.
        self.rope.rung.store(false, Ordering::Release);
        Ok(())
    }
}
