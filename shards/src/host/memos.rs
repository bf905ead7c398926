//! Doing once what clients may ask for twice: the way to the shard that keeps a name.
//!
//! Called by `http` through [`Host`]. Refuses to lose the end of what was begun: whoever does it holds a
//! [`Doing`], which tells its end also when it is dropped, for a while also past a full mailbox.

use std::fmt;
use std::sync::Arc;

use mica_numa::rt::{self, oneshot, time};
use mica_units::SandboxId;

use super::{CANCEL_RETRY, CANCEL_TRIES, Host, out_of_form};
use crate::ShardError;
use crate::event::{Operation, Reply};
use crate::memo::{Digest, Memo, MemoKey, MemoTicket};

/// What asking for something under a name comes to.
#[derive(Debug)]
pub enum Once {
    /// The asker is to do it.
    Begun(Doing),
    /// Somebody is doing it.
    Running,
    /// It was done, and this was the answer.
    Done(Arc<[u8]>),
    /// An earlier daemon was asked, and made this sandbox, which may have ended since; none where it may not
    /// have been ready.
    Left(Option<SandboxId>),
    /// Something else was asked for under this name.
    Mismatch,
}

/// Something that is being done once. Dropped, it came to nothing, and who asks next begins again.
pub struct Doing {
    host: Host,
    key: MemoKey,
    ticket: Option<MemoTicket>,
}

impl fmt::Debug for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doing").field("tenant", &self.key.tenant).finish_non_exhaustive()
    }
}

impl Doing {
    /// It is done: keeps the answer for who asks again. Goes on when the future is dropped.
    pub async fn done(self, answer: Vec<u8>) {
        self.tell(Some(answer)).await;
    }

    /// It came to nothing: the next who asks begins again.
    pub async fn failed(self) {
        self.tell(None).await;
    }

    async fn tell(mut self, answer: Option<Vec<u8>>) {
        let Some(ticket) = self.ticket.take() else { return };
        let (host, key) = (self.host.clone(), self.key.clone());
        let telling = rt::spawn(async move { host.tell_memo(key, ticket, answer).await });
        if telling.join().await.is_none() {
            tracing::error!("telling how a create ended panicked");
        }
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        let (host, key) = (self.host.clone(), self.key.clone());
        rt::spawn(async move { host.tell_memo(key, ticket, None).await }).detach();
    }
}

impl Host {
    /// Begins what is to be done once under this name, or says what became of it. May be dropped at any
    /// await: what was begun for nobody is let go.
    ///
    /// # Errors
    /// See [`ShardError`]; [`ShardError::Busy`] also when too much is being done.
    pub async fn once(&self, key: MemoKey, digest: Digest) -> Result<Once, ShardError> {
        let (sender, answer) = oneshot::channel();
        let host = self.clone();
        rt::spawn(async move {
            let once = host.begin(key, digest).await;
            if sender.send(once).is_err() {
                tracing::debug!("who began a create is gone");
            }
        })
        .detach();
        answer.await.unwrap_or(Err(ShardError::ShuttingDown))
    }

    async fn begin(&self, key: MemoKey, digest: Digest) -> Result<Once, ShardError> {
        let shard = key.shard(self.0.shard.shards);
        let memo = match self.ask(shard, Operation::MemoBegin(key.clone(), digest)).await? {
            Reply::Memo(memo) => memo,
            other => return Err(out_of_form(&other)),
        };
        Ok(match memo {
            Memo::Begun(ticket) => {
                Once::Begun(Doing { host: self.clone(), key, ticket: Some(ticket) })
            }
            Memo::Running => Once::Running,
            Memo::Done(answer) => Once::Done(answer),
            Memo::Left(sandbox) => Once::Left(sandbox),
            Memo::Mismatch => Once::Mismatch,
            Memo::Full => return Err(ShardError::Busy),
        })
    }

    async fn tell_memo(self, key: MemoKey, ticket: MemoTicket, answer: Option<Vec<u8>>) {
        let shard = key.shard(self.0.shard.shards);
        for _ in 0..CANCEL_TRIES {
            let operation = Operation::MemoEnd(key.clone(), ticket, answer.clone());
            match self.ask(shard, operation).await {
                Err(ShardError::Busy) => time::sleep(CANCEL_RETRY).await,
                _ => return,
            }
        }
        tracing::warn!("how a create ended was not told; its idempotency key stays taken a while");
    }
}
