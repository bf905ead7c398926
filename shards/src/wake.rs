//! Whether a sandbox takes a visitor, and waking one that a visitor may wake.
//!
//! Called by `shard` for every stream. One that is paused with its disk alone boots only when a client says
//! so: a boot takes longer than a visitor waits. A resume that visitors wait for is begun once, whoever came
//! first, and goes on when that one leaves. Refuses to let a visitor wait without a bound, and to wake
//! a sandbox for the host's own use.

use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::time::{self, Instant};
use mica_numa::rt::{self, oneshot};

use crate::event::{IfRunning, Keeps, Wake};
use crate::sandbox::{Sandbox, Woken};
use crate::shard::Shard;
use crate::shell::Held;
use crate::{ConnectError, ShardError, Visitor};

/// How long a stream waits for a sandbox that is on its way to running.
const TRANSITION_DEADLINE: Duration = Duration::from_secs(5);

/// How long a visitor waits in all: less than the proxy waits for a stream.
const VISIT_DEADLINE: Duration = Duration::from_secs(9);

/// How long a sandbox that was woken lives at the least, as E2B's do.
const WOKEN_LIFE_MIN: Duration = Duration::from_secs(300);

impl Shard {
    /// The process of a sandbox, once it runs.
    pub(crate) async fn process_for(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        visitor: &Visitor,
    ) -> Result<Rc<Held>, ConnectError> {
        let id = sandbox.id;
        let by = Instant::now() + VISIT_DEADLINE;
        let is_client = matches!(visitor, Visitor::Client(_));
        if time::timeout(TRANSITION_DEADLINE, sandbox.settled()).await.is_err() {
            return Err(ConnectError::IsPaused(id));
        }
        let mut running = running(sandbox);
        if is_client
            && sandbox.info().is_some_and(|info| info.auto_resume && !info.disk_alone)
            && matches!(running, Err(ConnectError::IsPaused(_)))
        {
            let left = by.saturating_duration_since(Instant::now());
            let woken = time::timeout(left, self.wake(sandbox)).await;
            running = match woken.unwrap_or_else(|_| Err(took_too_long(id))) {
                Ok(()) => self::running(sandbox),
                Err(ShardError::NoSuchSandbox(_)) => Err(ConnectError::NoSuchSandbox(id)),
                Err(error) => {
                    Err(ConnectError::NotWoken { sandbox: id, reason: error.to_string() })
                }
            };
        }
        if is_client && running.is_ok() {
            sandbox.is_used();
        }
        running
    }

    /// Resumes it, or waits for the resume that another visitor began.
    async fn wake(self: &Rc<Self>, sandbox: &Rc<Sandbox>) -> Woken {
        let (sender, woken) = oneshot::channel();
        if sandbox.waits_for_wake(sender) {
            let (shard, sandbox) = (Rc::clone(self), Rc::clone(sandbox));
            rt::spawn(async move {
                let woken = time::timeout(VISIT_DEADLINE, shard.resume_for_visitors(&sandbox));
                let woken = woken.await.unwrap_or_else(|_| Err(took_too_long(sandbox.id)));
                if let Err(error) = &woken {
                    tracing::info!(id = %sandbox.id, %error, "visitors could not wake a sandbox");
                }
                sandbox.tell_woken(&woken);
            })
            .detach();
        }
        woken.await.unwrap_or(Err(ShardError::ShuttingDown))
    }

    async fn resume_for_visitors(&self, sandbox: &Sandbox) -> Woken {
        let life = sandbox.life_when_woken(WOKEN_LIFE_MIN);
        let (life, from) = (Some(life), Keeps::All);
        let if_running = IfRunning::Extend;
        let wake = Wake { life, on_timeout: None, if_running, from, size: None };
        loop {
            match self.resume(sandbox.id, wake).await {
                Ok(_) => return Ok(()),
                // Something else has it for a moment, and then it may be resumed, or run already.
                Err(ShardError::Conflict { .. }) if running(sandbox).is_err() => {
                    sandbox.changed().await;
                }
                Err(ShardError::Conflict { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn running(sandbox: &Sandbox) -> Result<Rc<Held>, ConnectError> {
    match (sandbox.info(), sandbox.process()) {
        (None, _) => Err(ConnectError::NoSuchSandbox(sandbox.id)),
        (Some(_), None) => Err(ConnectError::IsPaused(sandbox.id)),
        (Some(_), Some(held)) => Ok(held),
    }
}

fn took_too_long(sandbox: mica_units::SandboxId) -> ShardError {
    let reason = "it took too long".to_owned();
    ShardError::OperationFailed { operation: "a resume", sandbox, reason }
}

impl Sandbox {
    /// Waits with the others for it to be woken. Whether it is the first that does.
    fn waits_for_wake(&self, waiter: oneshot::Sender<Woken>) -> bool {
        let mut waking = self.waking_mut();
        match waking.as_mut() {
            Some(waiters) => {
                waiters.push(waiter);
                false
            }
            None => {
                *waking = Some(vec![waiter]);
                true
            }
        }
    }

    fn tell_woken(&self, woken: &Woken) {
        let waiters = self.waking_mut().take();
        for waiter in waiters.into_iter().flatten() {
            if waiter.send(woken.clone()).is_err() {
                tracing::trace!(id = %self.id, "a visitor left before the sandbox woke");
            }
        }
    }
}
