//! A small client of QEMU's control socket (QMP).
//!
//! `push-template` plugs drives with it, `down` quits with it. One connection at a time, one
//! command at a time; events are skipped.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const ANSWER_MAX: Duration = Duration::from_secs(20);
/// QEMU's longest answers are a few kilobytes.
const LINE_MAX: u64 = 1 << 20;

#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to QEMU at {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_MAX)).context("set the read timeout")?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        let greeting = qmp.message()?;
        if greeting.get("QMP").is_none() {
            bail!("{} is no QMP socket: it greets with {greeting}", socket.display());
        }
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns what it returns.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": name, "arguments": arguments}));
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("send {name} to QEMU"))?;
        loop {
            let message = self.message().with_context(|| format!("QEMU's answer to {name}"))?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {name}: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
        }
    }

    /// Waits for an event whose data has `key` equal to `value`.
    pub fn wait_event(&mut self, event: &str, key: &str, value: &str) -> Result<()> {
        let deadline = Instant::now() + ANSWER_MAX;
        while Instant::now() < deadline {
            let message = self.message().with_context(|| format!("wait for QEMU's {event}"))?;
            if message["event"] == event && message["data"][key] == value {
                return Ok(());
            }
        }
        bail!("QEMU sent no {event} for {value} in {ANSWER_MAX:?}")
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self.reader.by_ref().take(LINE_MAX).read_line(&mut line).context("read")?;
        if count == 0 {
            bail!("QEMU closed its control socket");
        }
        serde_json::from_str(&line).context("QEMU sent a line that is not JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// A stand-in QEMU that says `lines` and reads as many commands as it answers.
    fn scripted(test: &str, lines: &'static [&'static str]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("mica-qmp-{test}-{}", std::process::id()));
        crate::host::state::remove(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(lines.join("\n").as_bytes()).unwrap();
            stream.write_all(b"\n").unwrap();
            let mut rest = String::new();
            stream.read_to_string(&mut rest).unwrap();
        });
        path
    }

    #[test]
    fn answers_are_found_among_events_and_errors_carry_the_reason() {
        let path = scripted(
            "talk",
            &[
                r#"{"QMP":{}}"#,
                r#"{"return":{}}"#,
                r#"{"event":"RESUME","data":{}}"#,
                r#"{"return":{"status":"running"}}"#,
                r#"{"error":{"class":"GenericError","desc":"no such bus"}}"#,
                r#"{"event":"DEVICE_DELETED","data":{"device":"a"}}"#,
            ],
        );
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.command("query-status", json!({})).unwrap()["status"], "running");
        let error = qmp.command("device_add", json!({})).unwrap_err().to_string();
        assert!(error.contains("no such bus"), "{error}");
        qmp.wait_event("DEVICE_DELETED", "device", "a").unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn something_else_on_the_socket_is_refused() {
        let path = scripted("other", &[r#"{"hello":1}"#]);
        assert!(Qmp::connect(&path).unwrap_err().to_string().contains("no QMP socket"));
        std::fs::remove_file(&path).unwrap();
    }
}
