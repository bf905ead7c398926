//! The connections into the pretended guest: they stand still with it, and end with its time.
//!
//! Called by [`crate::machine`] for every stop, and by the agent's threads for every stream. Refuses
//! to pass on a byte while the guest is frozen.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Result, bail};

/// Bytes that are on their way in one direction of a stream.
const COPY_BYTES: usize = 16 * 1024;

/// Every stream, and whether the guest runs.
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    thawed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    frozen: bool,
    next: u64,
    open: BTreeMap<u64, UnixStream>,
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked left nothing half done: each change is one assignment.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on every stream stands still, also a new one.
    pub fn freeze(&self) {
        self.lock().frozen = true;
    }

    /// They go on.
    pub fn thaw(&self) {
        self.lock().frozen = false;
        self.0.thawed.notify_all();
    }

    /// Ends every stream: the guest goes back to a time that did not know them.
    pub fn cut(&self) {
        for stream in std::mem::take(&mut self.lock().open).into_values() {
            // One that is closed already cannot be shut down, and need not be.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Takes a new stream in.
    pub fn enter(&self, stream: UnixStream) -> Result<Passage> {
        // The shard made it for a ring; a thread wants to wait.
        stream.set_nonblocking(false)?;
        let twin = stream.try_clone()?;
        let mut state = self.lock();
        let key = state.next;
        state.next += 1;
        state.open.insert(key, twin);
        Ok(Passage { stream, key, streams: self.clone() })
    }

    fn wait_while_frozen(&self) {
        let mut state = self.lock();
        while state.frozen {
            state = self.0.thawed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One stream. Reads and writes wait while the guest is frozen.
#[derive(Debug)]
pub struct Passage {
    stream: UnixStream,
    key: u64,
    streams: Streams,
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.streams.lock().open.remove(&self.key);
    }
}

impl Read for Passage {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.streams.wait_while_frozen();
        Ok(count)
    }
}

impl Write for Passage {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.streams.wait_while_frozen();
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

impl Passage {
    /// Copies both ways until both ends are done. An end that breaks ends the other at once.
    pub fn splice(self, far: OwnedFd) -> Result<()> {
        // The far end may be TCP: shutdown, read and write are the same calls.
        let far = UnixStream::from(far);
        let (near_reader, far_writer) = (self.stream.try_clone()?, far.try_clone()?);
        let streams = self.streams.clone();
        let onward = thread::spawn(move || copy(&streams, near_reader, far_writer));
        let near = self.stream.try_clone()?;
        copy(&self.streams, far, near);
        if onward.join().is_err() {
            bail!("a copying thread panicked");
        }
        Ok(())
    }
}

/// One direction.
fn copy(streams: &Streams, mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = [0; COPY_BYTES];
    let whole = loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break true,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break false,
        };
        streams.wait_while_frozen();
        if to.write_all(&buffer[..count]).is_err() {
            break false;
        }
    };
    streams.wait_while_frozen();
    let how = if whole { Shutdown::Write } else { Shutdown::Both };
    // An end that is already closed cannot be shut down, and need not be.
    drop(to.shutdown(how));
    if !whole {
        drop(from.shutdown(Shutdown::Both));
    }
}
