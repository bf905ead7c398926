//! The one handle that callers hold: routes each request to the shard that owns its sandbox.
//!
//! Called by `http` on every shard. Refuses to hold any sandbox itself.

use std::rc::Rc;
use std::time::Duration;

use mica_units::{GuestPort, SandboxId, ShardId};

use crate::{ConnectError, CreateRequest, GuestStream, SandboxInfo, ShardError, TemplateInfo};

/// The host, as seen from one shard. Cheap to clone, and bound to its thread.
#[derive(Clone, Debug)]
pub struct Host {
    shard: Rc<ShardId>,
}

impl Host {
    /// hack
    pub fn hack(shard: ShardId) -> Self { Self { shard: Rc::new(shard) } }

    /// The shard this handle is on.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        *self.shard
    }

    /// Makes a sandbox and waits until it is ready. Dropping the future does not stop the work:
    /// a sandbox whose creator went away is removed as soon as it is up.
    ///
    /// # Errors
    /// See [`ShardError`]. Nothing of the sandbox is left then.
    pub async fn create(&self, _request: CreateRequest) -> Result<SandboxInfo, ShardError> {
        Err(ShardError::ShuttingDown)
    }

    /// A running sandbox.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn get(&self, id: SandboxId) -> Result<SandboxInfo, ShardError> {
        Err(ShardError::NoSuchSandbox(id))
    }

    /// Every running sandbox of all shards, ordered by start, then id.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn list(&self) -> Result<Vec<SandboxInfo>, ShardError> {
        Ok(Vec::new())
    }

    /// Kills a sandbox, also one that is still being made, and waits until nothing of it is left.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn kill(&self, id: SandboxId) -> Result<(), ShardError> {
        Err(ShardError::NoSuchSandbox(id))
    }

    /// Sets a sandbox's remaining life, counted from now.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn set_timeout(&self, id: SandboxId, _life: Duration) -> Result<(), ShardError> {
        Err(ShardError::NoSuchSandbox(id))
    }

    /// A stream to a TCP port of a guest.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(
        &self,
        id: SandboxId,
        port: GuestPort,
    ) -> Result<GuestStream, ConnectError> {
        if id.as_str() != "i00000000000000000000" { return Err(ConnectError::NoSuchSandbox(id)); }
        let s = std::net::TcpStream::connect(("127.0.0.1", port.get())).map_err(|_| ConnectError::PortNotOpen(port))?;
        s.set_nonblocking(true).unwrap(); s.set_nodelay(true).unwrap();
        Ok(GuestStream(mica_numa::rt::net::UnixStream::from_fd(s.into())))
    }

    /// Every template, with what this host made of it.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn templates(&self) -> Result<Vec<TemplateInfo>, ShardError> {
        Ok(Vec::new())
    }
}
