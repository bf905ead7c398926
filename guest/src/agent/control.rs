//! The control exchange: the host tells the sandbox who it is.
//!
//! Called by the gateway. Refuses a line over the limit, a second identity, and, outside a guest,
//! to touch the machine's host name and clock.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mica_wire::guest::{CONTROL_LINE_BYTES_MAX, ENVD_VERSION, InitReply, InitRequest};
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::io::BufReader;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt};

use crate::http::error::chain;
use crate::sandbox::Sandbox;

/// How long the host may take for its line.
const LINE_LIMIT: Duration = Duration::from_secs(30);

/// Longest host name that Linux takes.
const HOSTNAME_BYTES_MAX: usize = 64;

/// Whether this machine is ours to set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// A guest: all of it is the sandbox's.
    Guest,
    /// Somebody's machine.
    Foreign,
}

/// Why an identity was not taken on.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("the line is not an init request")]
    Form(#[source] serde_json::Error),
    #[error(transparent)]
    Again(#[from] crate::sandbox::AlreadyInitialised),
    #[error("cannot {what}")]
    Os {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Reads one request and answers it.
///
/// # Errors
/// When the host breaks off.
pub async fn exchange<S>(
    stream: S,
    sandbox: &Arc<Sandbox>,
    surroundings: Surroundings,
) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    let limit = u64::try_from(CONTROL_LINE_BYTES_MAX).unwrap_or(u64::MAX);
    let mut bounded = (&mut stream).take(limit);
    tokio::time::timeout(LINE_LIMIT, bounded.read_until(b'\n', &mut line)).await??;
    let error = init(&line, sandbox, surroundings).err().map(|error| chain(&error));
    if let Some(error) = &error {
        eprintln!("mica-guest: cannot initialise the sandbox: {error}");
    }
    let reply = InitReply { envd_version: ENVD_VERSION.to_owned(), error };
    let mut bytes = serde_json::to_vec(&reply).map_err(std::io::Error::other)?;
    bytes.push(b'\n');
    stream.write_all(&bytes).await?;
    stream.shutdown().await
}

fn init(line: &[u8], sandbox: &Arc<Sandbox>, surroundings: Surroundings) -> Result<(), InitError> {
    let request: InitRequest = serde_json::from_slice(line).map_err(InitError::Form)?;
    let is_first = sandbox.set_identity(request.clone())?;
    if is_first && surroundings == Surroundings::Guest {
        set_clock(request.wall_clock_unix_ns)?;
        set_names(&request)?;
    }
    Ok(())
}

fn set_clock(unix_ns: u64) -> Result<(), InitError> {
    let os = |source| InitError::Os { what: "set the clock", source };
    let out_of_range = |_| os(std::io::ErrorKind::InvalidInput.into());
    let time = Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).map_err(out_of_range)?,
        tv_nsec: i64::try_from(unix_ns % 1_000_000_000).map_err(out_of_range)?,
    };
    clock_settime(ClockId::Realtime, time).map_err(|errno| os(errno.into()))
}

/// The host name, its entry in `/etc/hosts` (without it `sudo` complains at every call), and the
/// files that tell programs without our environment which sandbox this is.
fn set_names(request: &InitRequest) -> Result<(), InitError> {
    let os = |what| move |source| InitError::Os { what, source };
    let id = &request.sandbox_id;
    let name = id.get(..HOSTNAME_BYTES_MAX).unwrap_or(id);
    rustix::system::sethostname(name.as_bytes())
        .map_err(|errno| os("set the host name")(errno.into()))?;
    add_host(Path::new("/etc/hosts"), name).map_err(os("write /etc/hosts"))?;
    let directory = Path::new("/run/e2b");
    std::fs::create_dir_all(directory).map_err(os("make /run/e2b"))?;
    let files = [
        (".E2B_SANDBOX", "true"),
        (".E2B_SANDBOX_ID", id),
        (".E2B_TEMPLATE_ID", &request.template_id),
    ];
    for (file, text) in files {
        std::fs::write(directory.join(file), text).map_err(os("write to /run/e2b"))?;
    }
    Ok(())
}

fn add_host(path: &Path, name: &str) -> std::io::Result<()> {
    let held = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            "127.0.0.1 localhost\n::1 localhost\n".to_owned()
        }
        Err(error) => return Err(error),
    };
    let newline = if held.is_empty() || held.ends_with('\n') { "" } else { "\n" };
    std::fs::write(path, format!("{held}{newline}127.0.1.1 {name}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::TemplateSettings;

    fn line(id: &str) -> Vec<u8> {
        let request = InitRequest {
            sandbox_id: id.to_owned(),
            template_id: "t".to_owned(),
            access_token: None,
            env_vars: std::collections::BTreeMap::new(),
            wall_clock_unix_ns: 1,
        };
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        line
    }

    async fn answer(sandbox: &Arc<Sandbox>, sent: &[u8]) -> InitReply {
        let (mut host, agent) = tokio::io::duplex(CONTROL_LINE_BYTES_MAX);
        let ours = exchange(agent, sandbox, Surroundings::Foreign);
        let theirs = async {
            host.write_all(sent).await.unwrap();
            let mut reply = Vec::new();
            host.read_to_end(&mut reply).await.unwrap();
            serde_json::from_slice(&reply).unwrap()
        };
        tokio::join!(ours, theirs).1
    }

    #[tokio::test]
    async fn one_identity_and_the_same_again() {
        let sandbox = Arc::new(Sandbox::new(TemplateSettings::default(), true));
        for (sent, wrong) in [
            (&b"{\n"[..], Some("not an init request")),
            (&line("a")[..], None),
            (&line("a")[..], None),
            (&line("b")[..], Some("initialised once")),
        ] {
            let reply = answer(&sandbox, sent).await;
            assert_eq!(reply.envd_version, ENVD_VERSION);
            match (wrong, &reply.error) {
                (None, None) => {}
                (Some(wrong), Some(error)) => assert!(error.contains(wrong), "{error}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_line_without_end_is_bounded() {
        let sandbox = Arc::new(Sandbox::new(TemplateSettings::default(), true));
        let reply = answer(&sandbox, &vec![b' '; CONTROL_LINE_BYTES_MAX]).await;
        assert!(reply.error.is_some());
        assert!(sandbox.identity().is_none());
    }

    #[test]
    fn a_host_entry_is_added_on_its_own_line() {
        let path = std::env::temp_dir().join(format!("mica-hosts-{}", std::process::id()));
        std::fs::write(&path, "127.0.0.1 localhost").unwrap();
        add_host(&path, "box").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "127.0.0.1 localhost\n127.0.1.1 box\n");
    }
}
