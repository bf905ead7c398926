//! Streams into sandboxes that wait for the next request of the same client.
//!
//! Called by [`super`] before each request, and by the body of an answer at its end. What is kept
//! belongs to one connection of one client: whatever a server says on it out of turn, no other client
//! hears. Refuses to keep more than a few for a connection, more than its bounds for a sandbox and for a
//! shard, and any for longer than [`IDLE_MAX`]: servers that close what is idle wait longer than that.
//!
//! Keeping one proves nothing: each request asks the sandbox's owner again, who knows whether it may
//! go there and whether the stream is still good.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use futures_lite::AsyncRead;
use mica_shards::GuestStream;
use mica_shards::rt::time::Instant;
use mica_shards::rt::{self, time};
use mica_units::{GuestPort, SandboxId, ShardCount};

/// How long a stream may be idle. Node.js and uvicorn close theirs after 5 s.
const IDLE_MAX: Duration = Duration::from_secs(3);

/// How often it is looked for those that were.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Streams of one connection of a client.
const OF_ONE_CLIENT_MAX: usize = 4;

/// Streams into one sandbox, of all shards together. A sandbox takes 512 streams (`vmm/src/virtio/vsock`),
/// and what only waits must not take them from what has something to say.
const OF_ONE_SANDBOX_MAX: usize = 128;

/// All that one shard keeps.
#[derive(Clone, Debug)]
pub struct Shelf(Rc<Shared>);

#[derive(Debug)]
struct Shared {
    count: Cell<usize>,
    max: usize,
    /// Of each sandbox that there are any of.
    of_sandboxes: RefCell<HashMap<SandboxId, usize>>,
    of_sandbox_max: usize,
    clients: RefCell<Vec<Weak<Kept>>>,
    is_swept: Cell<bool>,
}

/// What is kept for one connection of a client.
#[derive(Debug)]
pub struct Kept {
    shelf: Shelf,
    idle: RefCell<Vec<Idle>>,
    is_listed: Cell<bool>,
}

#[derive(Debug)]
struct Idle {
    id: SandboxId,
    port: GuestPort,
    stream: GuestStream,
    since: Instant,
}

impl Shelf {
    /// An empty one with room for `max` streams, of a host with so many shards.
    #[must_use]
    pub fn new(max: usize, shards: ShardCount) -> Self {
        Self(Rc::new(Shared {
            count: Cell::new(0),
            max,
            of_sandboxes: RefCell::default(),
            of_sandbox_max: (OF_ONE_SANDBOX_MAX / usize::from(shards.get())).max(1),
            clients: RefCell::default(),
            is_swept: Cell::new(false),
        }))
    }

    /// Counts one more, if there is room.
    fn add(&self, id: SandboxId) -> bool {
        let mut of_sandboxes = self.0.of_sandboxes.borrow_mut();
        let of_this = of_sandboxes.get(&id).copied().unwrap_or(0);
        let fits = self.0.count.get() < self.0.max && of_this < self.0.of_sandbox_max;
        if fits {
            self.0.count.set(self.0.count.get() + 1);
            of_sandboxes.insert(id, of_this + 1);
        }
        fits
    }

    /// Counts one less.
    fn remove(&self, id: SandboxId) {
        self.0.count.set(self.0.count.get() - 1);
        let mut of_sandboxes = self.0.of_sandboxes.borrow_mut();
        match of_sandboxes.get_mut(&id) {
            Some(of_this) if *of_this > 1 => *of_this -= 1,
            _ => drop(of_sandboxes.remove(&id)),
        }
    }

    /// Room for what one connection keeps.
    #[must_use]
    pub fn client(&self) -> Rc<Kept> {
        let (idle, is_listed) = (RefCell::default(), Cell::new(false));
        Rc::new(Kept { shelf: self.clone(), idle, is_listed })
    }

    /// Lets go of what is idle for too long, until there is nothing left.
    async fn sweep(self) {
        while !self.0.clients.borrow().is_empty() {
            time::sleep(SWEEP_EVERY).await;
            let now = Instant::now();
            self.0.clients.borrow_mut().retain(|client| {
                client.upgrade().is_some_and(|client| {
                    let keeps = client.expire(now);
                    client.is_listed.set(keeps);
                    keeps
                })
            });
        }
        self.0.is_swept.set(false);
    }
}

impl Kept {
    /// Takes a stream to that port on which all is quiet.
    pub async fn take(&self, id: SandboxId, port: GuestPort) -> Option<GuestStream> {
        loop {
            let mut idle = {
                let mut all = self.idle.borrow_mut();
                let at = all.iter().rposition(|idle| idle.id == id && idle.port == port)?;
                all.swap_remove(at)
            };
            self.shelf.remove(id);
            if idle.since.elapsed() < IDLE_MAX && is_quiet(&mut idle.stream).await {
                return Some(idle.stream);
            }
        }
    }

    /// Keeps a stream whose last answer has ended, if there is room.
    pub fn put(self: &Rc<Self>, id: SandboxId, port: GuestPort, stream: GuestStream) {
        let mut all = self.idle.borrow_mut();
        if all.len() >= OF_ONE_CLIENT_MAX {
            // The one that is idle for longest.
            let oldest = all.iter().enumerate().min_by_key(|(_, idle)| idle.since);
            if let Some(at) = oldest.map(|(at, _)| at) {
                self.shelf.remove(all.swap_remove(at).id);
            }
        }
        if !self.shelf.add(id) {
            return;
        }
        all.push(Idle { id, port, stream, since: Instant::now() });
        let shelf = &self.shelf.0;
        if !self.is_listed.replace(true) {
            shelf.clients.borrow_mut().push(Rc::downgrade(self));
        }
        if !shelf.is_swept.replace(true) {
            rt::spawn(self.shelf.clone().sweep()).detach();
        }
    }

    /// Whether anything is left.
    fn expire(&self, now: Instant) -> bool {
        let mut all = self.idle.borrow_mut();
        all.retain(|idle| {
            let stays = now.saturating_duration_since(idle.since) < IDLE_MAX;
            if !stays {
                self.shelf.remove(idle.id);
            }
            stays
        });
        if all.is_empty() {
            // A connection that rests for long rests without this.
            *all = Vec::new();
        }
        !all.is_empty()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for idle in self.idle.borrow().iter() {
            self.shelf.remove(idle.id);
        }
    }
}

/// Whether the other end is still there and has said nothing: what comes without a question is no
/// answer, and must not be taken for the next one.
async fn is_quiet(stream: &mut GuestStream) -> bool {
    poll_fn(|cx| {
        // The first poll may be one that only lets other tasks run.
        let mut poll = || Pin::new(&mut *stream).poll_read(cx, &mut [0]).is_pending();
        Poll::Ready(poll() && poll())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_counted_for_its_sandbox_and_for_the_shard() {
        let id = |last: char| format!("i{}{last}", "0".repeat(19)).parse::<SandboxId>().unwrap();
        let shelf = Shelf::new(3, ShardCount::new(64).unwrap());
        let (a, b) = (id('a'), id('b'));
        assert!(shelf.add(a) && shelf.add(a));
        assert!(!shelf.add(a), "its share on one of 64 shards");
        assert!(shelf.add(b));
        assert!(!shelf.add(id('c')), "the shard's share");
        shelf.remove(a);
        assert!(shelf.add(b), "there is room again");
        for id in [a, b, b] {
            shelf.remove(id);
        }
        assert_eq!(shelf.0.count.get(), 0);
        assert!(shelf.0.of_sandboxes.borrow().is_empty());
        let few = Shelf::new(3, ShardCount::new(1000).unwrap());
        assert!(few.add(a) && !few.add(a), "there is always one");
    }
}
