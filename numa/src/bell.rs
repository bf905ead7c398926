//! How one thread wakes an executor on another: a byte in a socket that the executor polls.
//!
//! Called by `mailbox`, `blocking` and `stop`. Refuses to carry data: what happened is found in the
//! structure beside the bell. glommio's own cross-thread wakers are not used: a bell is one ring
//! completion like any other, and rings that nobody heard yet are merged into one.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_lite::AsyncReadExt;

/// The end that any thread may ring.
#[derive(Clone, Debug)]
pub(crate) struct Bell(Arc<Rope>);

#[derive(Debug)]
struct Rope {
    rung: AtomicBool,
    far: UnixStream,
}

/// The end that one executor will listen to, on its way there.
#[derive(Debug)]
pub(crate) struct Listener {
    rope: Arc<Rope>,
    near: UnixStream,
}

/// Spares others the ringing while the listener looks for itself.
#[derive(Clone, Debug)]
pub(crate) struct Hush(Arc<Rope>);

/// While this lives nobody rings. It ends at the drop; what was put beside the bell until then is to be
/// looked for afterwards.
#[derive(Debug)]
pub(crate) struct Hushed<'h>(&'h Rope);

/// The end that this executor listens to.
#[derive(Debug)]
pub(crate) struct Ear {
    rope: Arc<Rope>,
    near: crate::rt::net::UnixStream,
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
    /// Starts to listen on this executor.
    pub(crate) fn attach(self) -> Ear {
        Ear { rope: self.rope, near: crate::rt::net::UnixStream::from_fd(self.near.into()) }
    }
}

impl Hush {
    /// Makes everybody believe that the bell was rung. `None` when it was, or is hushed already.
    pub(crate) fn begin(&self) -> Option<Hushed<'_>> {
        (!self.0.rung.swap(true, Ordering::AcqRel)).then_some(Hushed(&self.0))
    }
}

impl Drop for Hushed<'_> {
    fn drop(&mut self) {
        // A swap, for the reason that `Ear::heard` has.
        self.0.rung.swap(false, Ordering::AcqRel);
    }
}

impl Ear {
    /// See [`Hush`].
    pub(crate) fn hush(&self) -> Hush {
        Hush(Arc::clone(&self.rope))
    }

    /// Waits for a ring. What was put beside the bell before the ring is visible afterwards.
    /// `false` when the socket failed.
    pub(crate) async fn heard(&mut self) -> bool {
        let mut bytes = [0u8; 64];
        let heard = matches!(self.near.read(&mut bytes).await, Ok(1..));
        // Only now: a ring after this line writes a new byte. A swap and not a store, because it has
        // to see what was put beside the bell by every ringer that found it rung and wrote nothing.
        self.rope.rung.swap(false, Ordering::AcqRel);
        heard
    }
}
