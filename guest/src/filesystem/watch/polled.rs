//! Watchers that are asked for their events: what `CreateWatcher` makes.
//!
//! Called by the service. A task per watcher moves events from the kernel to a queue. Refuses a queue
//! of more than [`EVENTS_MAX`] events or [`BYTES_MAX`] bytes: the watcher then only tells that it
//! has lost some. Refuses to keep a watcher that nobody asks: after [`UNASKED_MAX`] it
//! goes when the next is made, and before that when its place is wanted and it was left alone longest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Watch;
use super::messages::FilesystemEvent;
use super::tree::lost;
use crate::connect::ConnectError;
use crate::filesystem::entry::EntryInfo;
use crate::interpreter::hex;

/// Most events that wait to be asked for.
pub const EVENTS_MAX: usize = 8192;

/// Most bytes of them, in all watchers together about 256 MiB if a client wants it so.
pub const BYTES_MAX: usize = 1024 * 1024;

/// How long a watcher is kept that nobody asks for its events: its client is gone, and never removed it.
pub const UNASKED_MAX: Duration = Duration::from_secs(15 * 60);

/// A watcher that was asked more lately than this is in use, and no other takes its place.
const IN_USE: Duration = Duration::from_secs(60);

/// What an event holds besides its texts.
const EVENT_BYTES: usize = size_of::<FilesystemEvent>();

/// What waits to be asked for, or why nothing more comes.
#[derive(Debug)]
struct Queue {
    waiting: Result<Vec<FilesystemEvent>, ConnectError>,
    bytes: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Self { waiting: Ok(Vec::new()), bytes: 0 }
    }
}

impl Queue {
    /// Whether there was room; an error stays for ever.
    fn put(&mut self, events: Vec<FilesystemEvent>) -> bool {
        let Ok(waiting) = &mut self.waiting else { return false };
        self.bytes += events.iter().map(size_of_event).sum::<usize>();
        if self.bytes > BYTES_MAX || waiting.len() + events.len() > EVENTS_MAX {
            self.fail(lost("nobody asked for the watcher's events for too long"));
            return false;
        }
        waiting.extend(events);
        true
    }

    fn fail(&mut self, error: ConnectError) {
        *self = Self { waiting: Err(error), bytes: 0 };
    }

    fn take(&mut self) -> Result<Vec<FilesystemEvent>, ConnectError> {
        self.bytes = 0;
        self.waiting.as_mut().map(std::mem::take).map_err(|error| error.clone())
    }
}

fn size_of_event(event: &FilesystemEvent) -> usize {
    let of_entry = event.entry.as_ref().map_or(0, |entry| {
        let metadata = entry.metadata.iter().map(|(key, value)| key.len() + value.len());
        let texts = [&entry.name, &entry.path, &entry.permissions, &entry.owner, &entry.group];
        texts.iter().map(|text| text.len()).sum::<usize>()
            + entry.symlink_target.as_ref().map_or(0, String::len)
            + metadata.sum::<usize>()
            + size_of::<EntryInfo>()
    });
    EVENT_BYTES + event.name.len() + of_entry
}

/// One watcher; it ends with the value.
#[derive(Debug)]
struct Polled {
    queue: Arc<Mutex<Queue>>,
    task: AbortHandle,
    /// When somebody last asked for its events, or made it.
    asked: Instant,
    /// Kept until the watcher is removed, and not only until it fails: that bounds how many there
    /// are to be kept at all.
    _place: Option<OwnedSemaphorePermit>,
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All of them, by their names.
#[derive(Debug, Default)]
pub struct PolledWatchers(Mutex<HashMap<String, Polled>>);

impl PolledWatchers {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Polled>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the watchers that were forgotten. Where that frees none and `is_full`, the one that was left alone
    /// longest goes, unless it is in use.
    pub fn make_room(&self, is_full: impl Fn() -> bool) {
        let now = Instant::now();
        let mut all = self.all();
        all.retain(|_, polled| now.duration_since(polled.asked) < UNASKED_MAX);
        if !is_full() {
            return;
        }
        let oldest = all.iter().min_by_key(|(_, polled)| polled.asked);
        let unused = oldest.filter(|(_, polled)| now.duration_since(polled.asked) >= IN_USE);
        if let Some(id) = unused.map(|(id, _)| id.clone()) {
            all.remove(&id);
        }
    }

    /// Starts a watcher and gives its name, which nobody can guess.
    pub fn add(&self, mut watch: Watch) -> Result<String, ConnectError> {
        let mut random = [0_u8; 12];
        rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| ConnectError::io("cannot name the watcher", &errno.into()))?;
        let id = format!("w{}", hex(&random));
        let place = watch.place.take();
        let queue = Arc::new(Mutex::new(Queue::default()));
        let filled = Arc::clone(&queue);
        let task = tokio::spawn(async move {
            loop {
                let events = watch.next().await;
                let mut queue = filled.lock().unwrap_or_else(PoisonError::into_inner);
                let has_room = match events {
                    Ok(events) => queue.put(events),
                    Err(error) => {
                        queue.fail(error);
                        false
                    }
                };
                if !has_room {
                    return;
                }
            }
        });
        let polled =
            Polled { queue, task: task.abort_handle(), asked: Instant::now(), _place: place };
        self.all().insert(id.clone(), polled);
        Ok(id)
    }

    /// What has happened since the last call.
    ///
    /// # Errors
    /// `not_found`, or what ended the watcher.
    pub fn take(&self, id: &str) -> Result<Vec<FilesystemEvent>, ConnectError> {
        let mut all = self.all();
        let polled = all.get_mut(id).ok_or_else(|| not_found(id))?;
        polled.asked = Instant::now();
        let mut queue = polled.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.take()
    }

    /// Ends a watcher.
    ///
    /// # Errors
    /// `not_found`.
    pub fn remove(&self, id: &str) -> Result<(), ConnectError> {
        self.all().remove(id).map(drop).ok_or_else(|| not_found(id))
    }
}

fn not_found(id: &str) -> ConnectError {
    ConnectError::not_found(format!("watcher with id {id} not found"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Code;

    fn event(name: &str) -> FilesystemEvent {
        FilesystemEvent { name: name.to_owned(), kind: 1, entry: None }
    }

    #[test]
    fn a_queue_gives_each_event_once() {
        let mut queue = Queue::default();
        assert!(queue.put(vec![event("a")]));
        assert!(queue.put(vec![event("b")]));
        assert_eq!(queue.take().unwrap(), [event("a"), event("b")]);
        assert_eq!(queue.take().unwrap(), []);
        assert_eq!(queue.bytes, 0);
    }

    #[test]
    fn a_queue_that_runs_over_says_so_from_then_on() {
        let long = "x".repeat(BYTES_MAX / 4);
        for (events, times) in [(vec![event("a")], EVENTS_MAX + 1), (vec![event(&long)], 5)] {
            let mut queue = Queue::default();
            let room = (0..times).take_while(|_| queue.put(events.clone())).count();
            assert!(room < times, "{room}");
            for _ in 0..2 {
                assert_eq!(queue.take().unwrap_err().code, Code::ResourceExhausted);
            }
            assert!(!queue.put(events), "and holds nothing any more");
        }
    }

    fn polled(place: Option<OwnedSemaphorePermit>) -> Polled {
        let task = tokio::spawn(std::future::pending::<()>()).abort_handle();
        Polled { queue: Arc::default(), task, asked: Instant::now(), _place: place }
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_watcher_goes_and_one_that_is_asked_stays() {
        let watchers = PolledWatchers::default();
        watchers.all().insert("asked".to_owned(), polled(None));
        watchers.all().insert("forgotten".to_owned(), polled(None));
        let forgotten = watchers.all()["forgotten"].task.clone();
        tokio::time::advance(UNASKED_MAX / 2).await;
        watchers.take("asked").unwrap();
        watchers.make_room(|| false);
        assert_eq!(watchers.all().len(), 2);
        tokio::time::advance(UNASKED_MAX / 2).await;
        watchers.make_room(|| false);
        assert_eq!(watchers.all().keys().collect::<Vec<_>>(), ["asked"]);
        tokio::task::yield_now().await;
        assert!(forgotten.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn where_all_places_are_taken_the_one_left_alone_longest_gives_its_own() {
        let places = Arc::new(tokio::sync::Semaphore::new(2));
        let watchers = PolledWatchers::default();
        for id in ["first", "second"] {
            let place = Arc::clone(&places).try_acquire_owned().unwrap();
            watchers.all().insert(id.to_owned(), polled(Some(place)));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let is_full = || places.available_permits() == 0;
        watchers.make_room(is_full);
        assert!(is_full(), "both are in use");
        tokio::time::advance(IN_USE).await;
        watchers.take("first").unwrap();
        watchers.make_room(is_full);
        assert_eq!(watchers.all().keys().collect::<Vec<_>>(), ["first"]);
        watchers.make_room(is_full);
        assert_eq!(watchers.all().len(), 1, "no more than needed");
    }
}
