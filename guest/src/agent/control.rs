//! The control exchange: the host has the services warmed, and tells the sandbox who it is.
//!
//! Called by the gateway. Before a pause without memory it has the disk written, too. Refuses a line over
//! the limit, a machine id out of form, and, outside a guest, to touch the machine's clock, names and memory.
//!
//! An identity is taken on in one go, with nothing in between that could let another task run, and
//! answered when all of it holds: from then on the former token opens nothing, every process that
//! starts has the new environment, and names and clock are right. Only the kernels of the
//! interpreter are left for later: each is brought up to date before its next cell, because a
//! sandbox whose kernel is never used should neither wait for it nor pay for the memory it would
//! touch.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mica_wire::guest::{
    CONTROL_LINE_BYTES_MAX, ControlReply, ControlRequest, ENVD_VERSION, InitRequest,
};
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::io::BufReader;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt};

use super::kept::{self, KeptError};
use super::memory::{self, MemoryError};
use super::names::{self, NamesError};
use crate::http::error::chain;
use crate::interpreter::{ContextError, Interpreter};
use crate::sandbox::Sandbox;

/// How long the host may take for its line.
const LINE_LIMIT: Duration = Duration::from_secs(30);

/// Whether this machine is ours to set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// A guest: all of it is the sandbox's.
    Guest,
    /// Somebody's machine.
    Foreign,
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error("the line is not a control request")]
    Form(#[source] serde_json::Error),
    #[error("the machine id is not 32 characters of 0-9 and a-f")]
    MachineId,
    #[error("cannot {what}")]
    Os {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Names(#[from] NamesError),
    #[error("the code interpreter cannot run a cell")]
    Interpreter(#[source] ContextError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error("a step ended before it was done")]
    Ended(#[source] tokio::task::JoinError),
    #[error("the services are not warm after {0} ms")]
    Late(u64),
}

/// What control acts on.
#[derive(Debug)]
pub struct Control {
    sandbox: Arc<Sandbox>,
    surroundings: Surroundings,
    interpreter: Option<Arc<Interpreter>>,
}

impl Control {
    /// Control of one sandbox and its services.
    pub fn new(
        sandbox: Arc<Sandbox>,
        surroundings: Surroundings,
        interpreter: Option<Arc<Interpreter>>,
    ) -> Self {
        Self { sandbox, surroundings, interpreter }
    }

    /// Reads one request and answers it.
    ///
    /// # Errors
    /// When the host breaks off.
    pub async fn exchange<S>(&self, stream: S) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        let limit = u64::try_from(CONTROL_LINE_BYTES_MAX).unwrap_or(u64::MAX);
        let mut bounded = (&mut stream).take(limit);
        tokio::time::timeout(LINE_LIMIT, bounded.read_until(b'\n', &mut line)).await??;
        let error = self.carry_out(&line).await.err().map(|error| chain(&error));
        if let Some(error) = &error {
            eprintln!("mica-guest: cannot do what the host asks: {error}");
        }
        let reply = ControlReply { envd_version: ENVD_VERSION.to_owned(), error };
        let mut bytes = serde_json::to_vec(&reply).map_err(std::io::Error::other)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        stream.shutdown().await
    }

    async fn carry_out(&self, line: &[u8]) -> Result<(), ControlError> {
        match serde_json::from_slice(line).map_err(ControlError::Form)? {
            ControlRequest::Warm { deadline_ms } => {
                let limit = Duration::from_millis(deadline_ms);
                let warmed = tokio::time::timeout(limit, self.warm()).await;
                warmed.unwrap_or(Err(ControlError::Late(deadline_ms)))
            }
            ControlRequest::Init(request) => self.init(request),
            ControlRequest::Sync => self.sync().await,
        }
    }

    /// Runs every service once as a client would.
    async fn warm(&self) -> Result<(), ControlError> {
        if let Some(interpreter) = &self.interpreter {
            interpreter.rehearse().await.map_err(ControlError::Interpreter)?;
        }
        if self.surroundings == Surroundings::Foreign {
            return Ok(());
        }
        if self.sandbox.identity().is_none() {
            names::rehearse(Path::new("/"))?;
        }
        tokio::task::spawn_blocking(memory::give_back).await.map_err(ControlError::Ended)??;
        Ok(())
    }

    /// What the memory alone has goes to the disk, and the disk to the host.
    async fn sync(&self) -> Result<(), ControlError> {
        if self.surroundings == Surroundings::Foreign {
            return Ok(());
        }
        let defaults = self.sandbox.defaults();
        let sync = move || {
            kept::write(Path::new(kept::DEFAULTS), defaults.as_ref())?;
            rustix::fs::sync();
            Ok::<(), KeptError>(())
        };
        Ok(tokio::task::spawn_blocking(sync).await.map_err(ControlError::Ended)??)
    }

    /// The identity is taken first: whatever fails after it, the former token opens nothing.
    fn init(&self, request: InitRequest) -> Result<(), ControlError> {
        if !names::is_machine_id(&request.machine_id) {
            return Err(ControlError::MachineId);
        }
        let (former, is_new) = self.sandbox.set_identity(request.clone());
        if self.surroundings == Surroundings::Foreign {
            return Ok(());
        }
        set_clock(request.wall_clock_unix_ns)?;
        if is_new {
            let name = names::host_name(&request.sandbox_id);
            let failed = |source| ControlError::Os { what: "set the host name", source };
            rustix::system::sethostname(name.as_bytes()).map_err(|errno| failed(errno.into()))?;
            names::write(Path::new("/"), &request, former.as_deref())?;
        }
        Ok(())
    }
}

/// The guest's clock stood still while its state was saved, and is right again only now.
fn set_clock(unix_ns: u64) -> Result<(), ControlError> {
    let os = |source| ControlError::Os { what: "set the clock", source };
    let out_of_range = |_| os(std::io::ErrorKind::InvalidInput.into());
    let time = Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).map_err(out_of_range)?,
        tv_nsec: i64::try_from(unix_ns % 1_000_000_000).map_err(out_of_range)?,
    };
    clock_settime(ClockId::Realtime, time).map_err(|errno| os(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::TemplateSettings;

    fn line(id: &str, machine_id: &str) -> Vec<u8> {
        let request = ControlRequest::Init(InitRequest {
            sandbox_id: id.to_owned(),
            template_id: "t".to_owned(),
            machine_id: machine_id.to_owned(),
            access_token: None,
            env_vars: std::collections::BTreeMap::new(),
            wall_clock_unix_ns: 1,
            new_sandbox: true,
            defaults: None,
        });
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        line
    }

    fn control() -> Control {
        let sandbox = Arc::new(Sandbox::new(TemplateSettings::default(), true));
        Control::new(sandbox, Surroundings::Foreign, None)
    }

    async fn answer(control: &Control, sent: &[u8]) -> ControlReply {
        let (mut host, agent) = tokio::io::duplex(CONTROL_LINE_BYTES_MAX);
        let ours = control.exchange(agent);
        let theirs = async {
            host.write_all(sent).await.unwrap();
            let mut reply = Vec::new();
            host.read_to_end(&mut reply).await.unwrap();
            serde_json::from_slice(&reply).unwrap()
        };
        tokio::join!(ours, theirs).1
    }

    #[tokio::test]
    async fn the_last_identity_in_form_counts() {
        let (control, id) = (control(), "0".repeat(32));
        for (sent, wrong, holds) in [
            (&b"{\n"[..], Some("not a control request"), None),
            (b"{\"init\":{}}\n", Some("not a control request"), None),
            (b"{\"warm\":{\"deadline_ms\":0}}\n", None, None),
            (&line("a", &id), None, Some("a")),
            (&line("a", &id), None, Some("a")),
            (&line("b", &id), None, Some("b")),
            (&line("c", "../../etc"), Some("machine id"), Some("b")),
            (b"{\"warm\":{\"deadline_ms\":1000}}\n", None, Some("b")),
            (b"\"sync\"\n", None, Some("b")),
        ] {
            let reply = answer(&control, sent).await;
            assert_eq!(reply.envd_version, ENVD_VERSION);
            match (wrong, &reply.error) {
                (None, None) => {}
                (Some(wrong), Some(error)) => assert!(error.contains(wrong), "{error}"),
                other => panic!("{other:?}"),
            }
            let held = control.sandbox.identity();
            assert_eq!(held.as_ref().map(|held| held.sandbox_id.as_str()), holds);
        }
    }

    #[tokio::test]
    async fn a_line_without_end_is_bounded() {
        let control = control();
        let reply = answer(&control, &vec![b' '; CONTROL_LINE_BYTES_MAX]).await;
        assert!(reply.error.is_some());
        assert!(control.sandbox.identity().is_none());
    }
}
