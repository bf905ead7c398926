//! The messages of `process.Process`, as proto3 JSON has them.
//!
//! Called by the service. Unknown fields are let through: a newer client may say more than this
//! agent does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::connect::json;

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessConfig {
    /// Program: a path, or a name to look up in `PATH`.
    pub cmd: String,
    /// Its arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Variables on top of the sandbox's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub envs: BTreeMap<String, String>,
    /// Where; the template's directory when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// Columns and rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PtySize {
    /// Columns.
    pub cols: u32,
    /// Rows.
    pub rows: u32,
}

/// A pseudo-terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pty {
    /// Its size.
    pub size: Option<PtySize>,
}

/// `Start`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartRequest {
    /// What to run.
    pub process: ProcessConfig,
    /// Runs it on a terminal.
    pub pty: Option<Pty>,
    /// A name to find it by.
    pub tag: Option<String>,
    /// `false` gives it no standard input; absent means a pipe, as old clients expect.
    pub stdin: Option<bool>,
}

/// Which process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Selector {
    /// By process id.
    Pid(#[serde(with = "json::uint32")] u32),
    /// By the tag it was started with.
    Tag(String),
}

/// Requests that only say which process: `Connect`, `CloseStdin`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SelectRequest {
    /// Which.
    pub process: Selector,
}

/// One event of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// It runs.
    Start {
        /// Its process id.
        pid: u32,
    },
    /// It wrote.
    Data(Data),
    /// It ended.
    End(End),
    /// Nothing happened.
    Keepalive {},
}

/// What a process wrote, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Data {
    /// Standard output.
    Stdout(#[serde(with = "json::base64")] Vec<u8>),
    /// Standard error.
    Stderr(#[serde(with = "json::base64")] Vec<u8>),
    /// Its terminal.
    Pty(#[serde(with = "json::base64")] Vec<u8>),
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// Its exit code; -1 when a signal ended it.
    pub exit_code: i32,
    /// It exited by itself.
    pub exited: bool,
    /// In words: `exit status 3`, `signal: killed`.
    pub status: String,
    /// The same words when it did not end with 0.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// What `Start` and `Connect` stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventResponse {
    /// The event.
    pub event: Event,
}

/// `List`, `CloseStdin` and others answer nothing or are asked nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

/// `List`'s answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListResponse {
    /// Every running process that was started through the service.
    pub processes: Vec<ProcessInfo>,
}

/// One process in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// What it runs.
    pub config: ProcessConfig,
    /// Its process id.
    pub pid: u32,
    /// Its tag.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tag: Option<String>,
}

/// Bytes for a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Input {
    /// To its standard input.
    Stdin(#[serde(with = "json::base64")] Vec<u8>),
    /// To its terminal.
    Pty(#[serde(with = "json::base64")] Vec<u8>),
}

/// `SendInput`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SendInputRequest {
    /// Which process.
    pub process: Selector,
    /// What to write.
    pub input: Input,
}

/// The signals that can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SignalName {
    /// Ask it to end.
    #[serde(rename = "SIGNAL_SIGTERM")]
    Term,
    /// End it.
    #[serde(rename = "SIGNAL_SIGKILL")]
    Kill,
}

/// `SendSignal`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SendSignalRequest {
    /// Which process.
    pub process: Selector,
    /// Which signal.
    pub signal: SignalName,
}

/// `Update`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// Which process.
    pub process: Selector,
    /// Its terminal's new size.
    pub pty: Option<Pty>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_clients_send_them() {
        let text = r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","echo hi"],
            "envs":{"A":"1"},"cwd":"/tmp"},"stdin":false,"later":1}"#;
        let request: StartRequest = serde_json::from_str(text).unwrap();
        assert_eq!(request.process.args.len(), 3);
        assert_eq!(request.stdin, Some(false));
        let text = r#"{"process":{"cmd":"sh"},"pty":{"size":{"cols":80,"rows":24}},"tag":"t"}"#;
        let request: StartRequest = serde_json::from_str(text).unwrap();
        assert_eq!(request.pty.unwrap().size, Some(PtySize { cols: 80, rows: 24 }));
        let text = r#"{"process":{"tag":"t"},"input":{"stdin":"aGk="}}"#;
        let request: SendInputRequest = serde_json::from_str(text).unwrap();
        assert_eq!(request.process, Selector::Tag("t".to_owned()));
        assert_eq!(request.input, Input::Stdin(b"hi".to_vec()));
        assert!(serde_json::from_str::<SelectRequest>(r#"{"process":{}}"#).is_err());
    }

    #[test]
    fn events_are_written_as_clients_read_them() {
        let text = |event| serde_json::to_string(&EventResponse { event }).unwrap();
        assert_eq!(text(Event::Start { pid: 42 }), r#"{"event":{"start":{"pid":42}}}"#);
        assert_eq!(
            text(Event::Data(Data::Stdout(b"hi".to_vec()))),
            r#"{"event":{"data":{"stdout":"aGk="}}}"#
        );
        assert_eq!(text(Event::Keepalive {}), r#"{"event":{"keepalive":{}}}"#);
    }
}
