//! Local tasks.
//!
//! Called by everything that runs on a shard. Refuses to move a future to another core.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use glommio::timer::Timer;

use super::turns;

/// A task on this executor. Dropping the handle lets the task go on alone.
#[must_use = "use `detach` to say that the task goes on alone"]
#[derive(Debug)]
pub struct Task<T>(glommio::task::JoinHandle<T>);

/// Starts `future` on this executor. It runs whether or not the handle is kept.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let counted = async move {
        let mut future = pin!(future);
        poll_fn(|context| {
            turns::count();
            future.as_mut().poll(context)
        })
        .await
    };
    Task(glommio::spawn_local(counted).detach())
}

impl<T> Task<T> {
    /// Lets the task go on alone.
    pub fn detach(self) {
        drop(self);
    }

    /// Waits for the task. `None` if it panicked or was cancelled.
    pub async fn join(self) -> Option<T> {
        self.0.await
    }

    /// Stops the task at its next await and drops its future, some time soon.
    pub fn cancel(&self) {
        self.0.cancel();
    }

    /// As [`Self::cancel`], and waits until the future is dropped.
    pub async fn end(self) {
        self.cancel();
        self.join().await;
    }
}

/// Lets the other tasks of this executor run once.
pub async fn yield_now() {
    glommio::executor().yield_now().await;
}

/// How far off the timer of a turn is: it has passed when the executor looks at its timers, since it goes
/// through its rings first, with several system calls.
const SOON: Duration = Duration::from_micros(1);

/// Lets the executor see to its rings and timers once, without sleeping, as soon as no other task can run.
/// [`yield_now`] does not: as long as a task can run, glommio looks at its rings only every 100 ms.
pub async fn turn() {
    let mut begun: Option<Timer> = None;
    poll_fn(|context| {
        if let Some(timer) = &mut begun {
            return Pin::new(timer).poll(context).map(drop);
        }
        let mut soon = SOON;
        loop {
            let mut timer = Timer::new(soon);
            if Pin::new(&mut timer).poll(context).is_pending() {
                begun = Some(timer);
                return Poll::Pending;
            }
            // This thread was held up for longer than that, and a timer that is over does not wait.
            soon *= 2;
        }
    })
    .await;
}
