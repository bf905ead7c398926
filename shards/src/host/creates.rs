//! Making one sandbox: the shard that takes it, and what the create counts as.
//!
//! Called by `http` through [`Host`], and by copies beside it. A name may stand for several things, of which
//! the caller tries one after another: all that is one create, and counts once. Refuses to know which.

use std::cell::Cell;

use mica_units::SandboxId;

use super::{CancelOnDrop, Host, out_of_form};
use crate::event::{Operation, Reply};
use crate::metrics::{self, Asked};
use crate::registry::HostSet;
use crate::{CreateRequest, SandboxInfo, ShardError};

/// What a shard is asked.
type Ask = fn(SandboxId, Box<CreateRequest>, Asked) -> Operation;

/// One create, from when it was asked for.
pub struct OneCreate<'h> {
    host: &'h Host,
    asked: Asked,
    counted: bool,
}

impl std::fmt::Debug for OneCreate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OneCreate").field("counted", &self.counted).finish_non_exhaustive()
    }
}

impl OneCreate<'_> {
    /// Makes it of what `request` names. `None`: that is not there, and nothing is counted yet; something else
    /// may be tried. Dropping the future ends what was begun.
    ///
    /// # Errors
    /// As [`Host::create`], but for [`ShardError::NoSuchTemplate`].
    pub async fn of(&mut self, request: CreateRequest) -> Result<Option<SandboxInfo>, ShardError> {
        match self.made(request, Operation::Create).await {
            Err(ShardError::NoSuchTemplate(_)) => Ok(None),
            made => made.map(Some),
        }
    }

    /// It came to nothing: nothing of what it might have been made of is there. Counts, unless it was
    /// counted.
    pub fn failed(mut self) {
        if !self.counted {
            self.host.0.shard.metrics.failed(metrics::Operation::Create);
            self.count(false);
        }
    }

    /// Makes a copy.
    pub(super) async fn copy(mut self, request: CreateRequest) -> Result<SandboxInfo, ShardError> {
        let made = self.made(request, Operation::Copy).await;
        if made.is_err() {
            self.failed();
        }
        made
    }

    async fn made(&mut self, request: CreateRequest, ask: Ask) -> Result<SandboxInfo, ShardError> {
        let made = self.host.create_by(request, ask, &mut self.asked).await;
        if !matches!(made, Err(ShardError::NoSuchTemplate(_))) {
            self.count(made.is_ok());
        }
        made
    }

    fn count(&mut self, is_done: bool) {
        self.counted = true;
        self.host.0.shard.metrics.created(self.asked.at, is_done);
    }
}

impl Host {
    /// Makes a sandbox and waits until it is ready. Dropping the future ends what was begun.
    ///
    /// # Errors
    /// See [`ShardError`]. Nothing of the sandbox is left then.
    pub async fn create(&self, request: CreateRequest) -> Result<SandboxInfo, ShardError> {
        let mut create = self.one_create();
        let made = create.made(request, Operation::Create).await;
        if made.is_err() {
            create.failed();
        }
        made
    }

    /// The same where it is not sure yet of what.
    #[must_use]
    pub fn one_create(&self) -> OneCreate<'_> {
        OneCreate { host: self, asked: self.0.shard.metrics.asked_to_create(), counted: false }
    }

    async fn create_by(
        &self,
        request: CreateRequest,
        ask: Ask,
        asked: &mut Asked,
    ) -> Result<SandboxInfo, ShardError> {
        let mut full = self.0.shard.at_capacity();
        let mut tried = HostSet::default();
        // None has room, or each has said that it has none.
        while let Ok(chosen) = self.0.shard.choice.choose(&tried, &request.template) {
            let shard = chosen.shard();
            tried.insert(chosen.host());
            let id = self.draw_id(shard)?;
            let guard = CancelOnDrop { host: self, id, armed: Cell::new(true) };
            let operation = ask(id, Box::new(request.clone()), asked.sent_for(id));
            let made = self.ask(shard, operation).await;
            guard.armed.set(false);
            match made? {
                Reply::Sandbox(Ok(info)) => return Ok(*info),
                // Its share is used up; another shard may have room.
                Reply::Sandbox(Err(error @ ShardError::AtCapacity { .. })) => full = error,
                Reply::Sandbox(Err(error)) => return Err(error),
                other => return Err(out_of_form(&other)),
            }
        }
        self.0.shard.metrics.refused(metrics::Operation::Create);
        Err(full)
    }
}
