//! What only benchmarks and tests ask of a host: to look at a sandbox from outside.
//!
//! Called by the lab's engine benchmark, which writes into guest memory as a guest would. Refuses
//! nothing that a process of root could not do by itself; no client reaches it.

use mica_units::SandboxId;

use super::{Host, out_of_form};
use crate::event::{Operation, Reply};
use crate::{SandboxProcess, ShardError};

impl Host {
    /// The VM process of a running sandbox, and where its guest's memory lies. For benchmarks and tests.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn bench_process_of(&self, id: SandboxId) -> Result<SandboxProcess, ShardError> {
        match self.ask(self.owner(id), Operation::ProcessOf(id)).await? {
            Reply::Process(result) => result,
            other => Err(out_of_form(&other)),
        }
    }
}
