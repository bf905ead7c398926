//! Bounded messages from any thread to one executor.
//!
//! Called by `shards`, for everything that crosses cores. Refuses to wait for room: a full mailbox
//! gives the message back, and what that means is the sender's decision.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

use crate::bell::{self, Bell, Ear, Listener};

/// Messages that an executor takes before it lets its other tasks run.
const BATCH: u32 = 64;

/// The end that any thread may send to.
#[derive(Debug)]
pub struct Post<M> {
    queue: SyncSender<M>,
    bell: Bell,
}

// Derived, it would ask for `M: Clone`.
impl<M> Clone for Post<M> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), bell: self.bell.clone() }
    }
}

/// The end that one executor will receive from, on its way there.
#[derive(Debug)]
pub struct Mailbox<M> {
    queue: Receiver<M>,
    listener: Listener,
}

/// The end that this executor receives from.
#[derive(Debug)]
pub struct Inbox<M> {
    queue: Receiver<M>,
    ear: Ear,
    taken: u32,
}

/// Why a message came back, with the message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Returned<M> {
    /// There is no room.
    #[error("the mailbox is full")]
    Full(M),
    /// The receiving executor is gone.
    #[error("the mailbox is closed")]
    Closed(M),
}

/// Makes a mailbox of `capacity` messages.
///
/// # Errors
/// When the process has no descriptor left.
pub fn mailbox<M>(capacity: usize) -> io::Result<(Post<M>, Mailbox<M>)> {
    let (bell, listener) = bell::pair()?;
    let (sender, receiver) = sync_channel(capacity);
    Ok((Post { queue: sender, bell }, Mailbox { queue: receiver, listener }))
}

impl<M> Post<M> {
    /// Puts a message in.
    ///
    /// # Errors
    /// The message back, see [`Returned`].
    pub fn send(&self, message: M) -> Result<(), Returned<M>> {
        self.queue.try_send(message).map_err(|error| match error {
            TrySendError::Full(message) => Returned::Full(message),
            TrySendError::Disconnected(message) => Returned::Closed(message),
        })?;
        self.bell.ring();
        Ok(())
    }
}

impl<M> Mailbox<M> {
    /// Starts to receive on this executor.
    #[must_use]
    pub fn attach(self) -> Inbox<M> {
        Inbox { queue: self.queue, ear: self.listener.attach(), taken: 0 }
    }
}

impl<M> Inbox<M> {
    /// Waits for the next message. `None` when no sender is left; a wait that has begun does not
    /// notice that the last one goes. May be dropped at any await: no message is lost by it.
    pub async fn next(&mut self) -> Option<M> {
        loop {
            if self.taken >= BATCH {
                self.taken = 0;
                crate::rt::yield_now().await;
            }
            match self.queue.try_recv() {
                Ok(message) => {
                    self.taken += 1;
                    return Some(message);
                }
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            self.taken = 0;
            if !self.ear.heard().await {
                tracing::error!("the bell of a mailbox is broken; nobody reads it any more");
                return self.queue.try_recv().ok();
            }
        }
    }
}
