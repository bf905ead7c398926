//! From one process to everyone who watches it.
//!
//! Called by the pumps to publish and by `Start` and `Connect` to subscribe. Refuses to buffer for
//! a slow watcher beyond [`EVENTS_AHEAD_MAX`]: the publisher waits, and so the process does.
//! What is published while nobody watches is gone; the end is kept for those who come late.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, mpsc};

use super::messages::{Data, End};

/// How many events a watcher may be behind: 16 chunks of 32 KiB.
const EVENTS_AHEAD_MAX: usize = 16;

/// Most watchers of one process.
const WATCHERS_MAX: usize = 256;

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The process wrote.
    Data(Data),
    /// The process ended; nothing follows.
    End(End),
}

/// The watchers of one process.
#[derive(Debug, Default)]
pub struct Hub {
    state: Mutex<State>,
    /// Whoever waits for the end without watching.
    over: Notify,
}

#[derive(Debug, Default)]
struct State {
    watchers: Vec<mpsc::Sender<Told>>,
    end: Option<End>,
}

impl Hub {
    /// Watches from now on. `None` when there are too many watchers.
    pub fn subscribe(&self) -> Option<mpsc::Receiver<Told>> {
        let (sender, receiver) = mpsc::channel(EVENTS_AHEAD_MAX);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(end) = &state.end {
            // The channel is empty and has room for more than one.
            sender.try_send(Told::End(end.clone())).ok()?;
            return Some(receiver);
        }
        state.watchers.retain(|watcher| !watcher.is_closed());
        if state.watchers.len() >= WATCHERS_MAX {
            return None;
        }
        state.watchers.push(sender);
        Some(receiver)
    }

    /// Tells every watcher what was written, waiting for the slow ones.
    pub async fn publish(&self, data: Data) {
        let watchers = self.state.lock().unwrap_or_else(PoisonError::into_inner).watchers.clone();
        for watcher in &watchers {
            // A watcher that has gone is not an error; it is dropped at the next subscription.
            drop(watcher.send(Told::Data(data.clone())).await);
        }
    }

    /// Tells every watcher that it is over, and keeps the end. One that does not read holds up
    /// neither the others nor the caller: the end waits for it until it reads or leaves.
    pub fn finish(&self, end: &End) {
        let watchers = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.end = Some(end.clone());
            std::mem::take(&mut state.watchers)
        };
        self.over.notify_waiters();
        for watcher in watchers {
            let told = Told::End(end.clone());
            // A watcher that has gone is not an error.
            tokio::spawn(async move { drop(watcher.send(told).await) });
        }
    }

    /// How the process ended, once it has.
    pub fn has_ended(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).end.is_some()
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) {
        let over = self.over.notified();
        tokio::pin!(over);
        // Before the look, so that an end in between is not missed.
        over.as_mut().enable();
        if !self.has_ended() {
            over.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> End {
        End { exit_code: 0, exited: true, status: "exit status 0".to_owned(), error: None }
    }

    #[tokio::test]
    async fn everyone_is_told_and_late_comers_hear_the_end() {
        let hub = Hub::default();
        hub.publish(Data::Stdout(b"lost".to_vec())).await;
        let (mut a, mut b) = (hub.subscribe().unwrap(), hub.subscribe().unwrap());
        let data = Data::Stdout(b"hi".to_vec());
        hub.publish(data.clone()).await;
        hub.finish(&end());
        for watcher in [&mut a, &mut b] {
            assert_eq!(watcher.recv().await, Some(Told::Data(data.clone())));
            assert_eq!(watcher.recv().await, Some(Told::End(end())));
            assert_eq!(watcher.recv().await, None);
        }
        hub.ended().await;
        let mut late = hub.subscribe().unwrap();
        assert_eq!(late.recv().await, Some(Told::End(end())));
        assert_eq!(late.recv().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_watcher_keeps_the_end_from_nobody() {
        let hub = Hub::default();
        let (mut slow, mut other) = (hub.subscribe().unwrap(), hub.subscribe().unwrap());
        for _ in 0..EVENTS_AHEAD_MAX {
            hub.publish(Data::Stdout(vec![0])).await;
            assert!(matches!(other.recv().await, Some(Told::Data(_))));
        }
        hub.finish(&end());
        let told = tokio::time::timeout(std::time::Duration::from_secs(60), other.recv()).await;
        assert_eq!(told, Ok(Some(Told::End(end()))));
        for _ in 0..EVENTS_AHEAD_MAX {
            assert!(matches!(slow.recv().await, Some(Told::Data(_))));
        }
        assert_eq!(slow.recv().await, Some(Told::End(end())), "it waits for who reads late");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_watcher_holds_the_publisher_until_it_leaves() {
        let hub = std::sync::Arc::new(Hub::default());
        let slow = hub.subscribe().unwrap();
        let publisher = {
            let hub = std::sync::Arc::clone(&hub);
            tokio::spawn(async move {
                for _ in 0..=EVENTS_AHEAD_MAX {
                    hub.publish(Data::Stdout(vec![0])).await;
                }
            })
        };
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        assert!(!publisher.is_finished());
        drop(slow);
        publisher.await.unwrap();
    }
}
