//! The messages of `process.Process`: one type each for proto3 JSON and for binary protobuf.
//!
//! Called by the service. Unknown fields are let through: a newer client may say more than this
//! agent does. The field numbers are those of the public protocol.

use std::collections::BTreeMap;

use prost::{Enumeration, Message, Oneof};
use serde::{Deserialize, Serialize};

use crate::connect::{ConnectError, Nothing, json};

/// What to run.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessConfig {
    /// Program: a path, or a name to look up in `PATH`.
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "json::or_default")]
    pub cmd: String,
    /// Its arguments.
    #[prost(string, repeated, tag = "2")]
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "json::or_default")]
    pub args: Vec<String>,
    /// Variables on top of the sandbox's.
    #[prost(btree_map = "string, string", tag = "3")]
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "json::or_default")]
    pub envs: BTreeMap<String, String>,
    /// Where; the template's directory when absent.
    #[prost(string, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// Columns and rows.
#[derive(Clone, Copy, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct PtySize {
    /// Columns.
    #[prost(uint32, tag = "1")]
    #[serde(with = "json::uint32")]
    pub cols: u32,
    /// Rows.
    #[prost(uint32, tag = "2")]
    #[serde(with = "json::uint32")]
    pub rows: u32,
}

/// A pseudo-terminal.
#[derive(Clone, Copy, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct Pty {
    /// Its size.
    #[prost(message, optional, tag = "1")]
    pub size: Option<PtySize>,
}

/// `Start`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct StartRequest {
    /// What to run.
    #[prost(message, optional, tag = "1")]
    pub process: Option<ProcessConfig>,
    /// Runs it on a terminal.
    #[prost(message, optional, tag = "2")]
    pub pty: Option<Pty>,
    /// A name to find it by.
    #[prost(string, optional, tag = "3")]
    pub tag: Option<String>,
    /// `false` gives it no standard input; absent means a pipe, as old clients expect.
    #[prost(bool, optional, tag = "4")]
    pub stdin: Option<bool>,
}

/// Which process.
#[derive(Clone, PartialEq, Eq, Oneof, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Selector {
    /// By process id.
    #[prost(uint32, tag = "1")]
    Pid(#[serde(serialize_with = "json::uint32::serialize")] u32),
    /// By the tag it was started with.
    #[prost(string, tag = "2")]
    Tag(String),
}

/// Which process, as a message around [`Selector`].
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(try_from = "SelectorFields")]
pub struct ProcessSelector {
    /// Which.
    #[prost(oneof = "Selector", tags = "1, 2")]
    #[serde(flatten)]
    pub selector: Option<Selector>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SelectorFields {
    #[serde(deserialize_with = "json::uint32::optional")]
    pid: Option<u32>,
    tag: Option<String>,
}

impl TryFrom<SelectorFields> for ProcessSelector {
    type Error = &'static str;

    fn try_from(fields: SelectorFields) -> Result<Self, Self::Error> {
        let selector = match (fields.pid, fields.tag) {
            (Some(_), Some(_)) => return Err("send `pid` or `tag`, not both"),
            (pid, tag) => pid.map(Selector::Pid).or(tag.map(Selector::Tag)),
        };
        Ok(Self { selector })
    }
}

/// The process that a request names.
///
/// # Errors
/// `invalid_argument` when it names none.
pub fn named(process: Option<&ProcessSelector>) -> Result<&Selector, ConnectError> {
    process.and_then(|process| process.selector.as_ref()).ok_or_else(|| {
        ConnectError::invalid_argument("the request names no process; send its pid or its tag")
    })
}

/// Requests that only say which process: `Connect`, `CloseStdin`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct SelectRequest {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub process: Option<ProcessSelector>,
}

/// One event of a process.
#[derive(Clone, PartialEq, Eq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// It runs.
    #[prost(message, tag = "1")]
    Start(StartEvent),
    /// It wrote.
    #[prost(message, tag = "2")]
    Data(DataEvent),
    /// It ended.
    #[prost(message, tag = "3")]
    End(End),
    /// Nothing happened.
    #[prost(message, tag = "4")]
    Keepalive(Nothing),
}

/// A process runs.
#[derive(Clone, Copy, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct StartEvent {
    /// Its process id.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
}

/// What a process wrote, and where.
#[derive(Clone, PartialEq, Eq, Oneof, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Data {
    /// Standard output.
    #[prost(bytes = "vec", tag = "1")]
    Stdout(#[serde(with = "json::base64")] Vec<u8>),
    /// Standard error.
    #[prost(bytes = "vec", tag = "2")]
    Stderr(#[serde(with = "json::base64")] Vec<u8>),
    /// Its terminal.
    #[prost(bytes = "vec", tag = "3")]
    Pty(#[serde(with = "json::base64")] Vec<u8>),
}

/// A process wrote.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct DataEvent {
    /// What.
    #[prost(oneof = "Data", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub output: Option<Data>,
}

/// How a process ended.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct End {
    /// Its exit code; -1 when a signal ended it.
    #[prost(sint32, tag = "1")]
    pub exit_code: i32,
    /// It exited by itself.
    #[prost(bool, tag = "2")]
    pub exited: bool,
    /// In words: `exit status 3`, `signal: killed`.
    #[prost(string, tag = "3")]
    pub status: String,
    /// The same words when it did not end with 0.
    #[prost(string, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The message around [`Event`].
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessEvent {
    /// The event.
    #[prost(oneof = "Event", tags = "1, 2, 3, 4")]
    #[serde(flatten)]
    pub event: Option<Event>,
}

/// What `Start` and `Connect` stream.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct EventResponse {
    /// The event.
    #[prost(message, optional, tag = "1")]
    pub event: Option<ProcessEvent>,
}

impl From<Event> for EventResponse {
    fn from(event: Event) -> Self {
        Self { event: Some(ProcessEvent { event: Some(event) }) }
    }
}

/// `List`'s answer.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct ListResponse {
    /// Every running process that was started through the service.
    #[prost(message, repeated, tag = "1")]
    pub processes: Vec<ProcessInfo>,
}

/// One process in a list.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// What it runs.
    #[prost(message, optional, tag = "1")]
    pub config: Option<ProcessConfig>,
    /// Its process id.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// Its tag.
    #[prost(string, optional, tag = "3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// Bytes for a process.
#[derive(Clone, PartialEq, Eq, Oneof, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Input {
    /// To its standard input.
    #[prost(bytes = "vec", tag = "1")]
    Stdin(#[serde(serialize_with = "json::base64::serialize")] Vec<u8>),
    /// To its terminal.
    #[prost(bytes = "vec", tag = "2")]
    Pty(#[serde(serialize_with = "json::base64::serialize")] Vec<u8>),
}

/// The message around [`Input`].
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(try_from = "InputFields")]
pub struct ProcessInput {
    /// The bytes.
    #[prost(oneof = "Input", tags = "1, 2")]
    #[serde(flatten)]
    pub input: Option<Input>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct InputFields {
    #[serde(deserialize_with = "json::base64::optional")]
    stdin: Option<Vec<u8>>,
    #[serde(deserialize_with = "json::base64::optional")]
    pty: Option<Vec<u8>>,
}

impl TryFrom<InputFields> for ProcessInput {
    type Error = &'static str;

    fn try_from(fields: InputFields) -> Result<Self, Self::Error> {
        let input = match (fields.stdin, fields.pty) {
            (Some(_), Some(_)) => return Err("send `stdin` or `pty`, not both"),
            (stdin, pty) => stdin.map(Input::Stdin).or(pty.map(Input::Pty)),
        };
        Ok(Self { input })
    }
}

/// The bytes that a request brings.
///
/// # Errors
/// `invalid_argument` when there are none.
pub fn brought(input: Option<&ProcessInput>) -> Result<&Input, ConnectError> {
    input.and_then(|input| input.input.as_ref()).ok_or_else(|| {
        ConnectError::invalid_argument("the request has no input; send `stdin` or `pty`")
    })
}

/// `SendInput`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct SendInputRequest {
    /// Which process.
    #[prost(message, optional, tag = "1")]
    pub process: Option<ProcessSelector>,
    /// What to write.
    #[prost(message, optional, tag = "2")]
    pub input: Option<ProcessInput>,
}

/// `StreamInput`: the process first, then input for it.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(try_from = "StreamInputFields")]
pub struct StreamInputRequest {
    /// What the client says.
    #[prost(oneof = "InputEvent", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub event: Option<InputEvent>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamInputFields {
    start: Option<SelectRequest>,
    data: Option<InputData>,
    keepalive: Option<Nothing>,
}

impl TryFrom<StreamInputFields> for StreamInputRequest {
    type Error = &'static str;

    fn try_from(fields: StreamInputFields) -> Result<Self, Self::Error> {
        let start = fields.start.map(InputEvent::Start);
        let data = fields.data.map(InputEvent::Data);
        let keepalive = fields.keepalive.map(InputEvent::Keepalive);
        let mut events = [start, data, keepalive].into_iter().flatten();
        match (events.next(), events.next()) {
            (_, Some(_)) => Err("send one of `start`, `data` and `keepalive` in a message"),
            (event, None) => Ok(Self { event }),
        }
    }
}

/// One message of a [`StreamInputRequest`].
#[derive(Clone, PartialEq, Eq, Oneof, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum InputEvent {
    /// Which process the input is for, from here on.
    #[prost(message, tag = "1")]
    Start(SelectRequest),
    /// Input.
    #[prost(message, tag = "2")]
    Data(InputData),
    /// Keeps the connection.
    #[prost(message, tag = "3")]
    Keepalive(Nothing),
}

/// Input in a stream. Its field number is 2, as in `SendInput`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct InputData {
    /// What to write.
    #[prost(message, optional, tag = "2")]
    pub input: Option<ProcessInput>,
}

/// The signals that can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum SignalName {
    /// None was named.
    Unspecified = 0,
    /// End it.
    Kill = 9,
    /// Ask it to end.
    Term = 15,
}

impl json::Named for SignalName {
    const NAMES: &'static [(Self, &'static str)] = &[
        (Self::Unspecified, "SIGNAL_UNSPECIFIED"),
        (Self::Kill, "SIGNAL_SIGKILL"),
        (Self::Term, "SIGNAL_SIGTERM"),
    ];
}

/// `SendSignal`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct SendSignalRequest {
    /// Which process.
    #[prost(message, optional, tag = "1")]
    pub process: Option<ProcessSelector>,
    /// Which signal.
    #[prost(enumeration = "SignalName", tag = "2")]
    #[serde(with = "json::Names::<SignalName>")]
    pub signal: i32,
}

/// `Update`.
#[derive(Clone, PartialEq, Eq, Message, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateRequest {
    /// Which process.
    #[prost(message, optional, tag = "1")]
    pub process: Option<ProcessSelector>,
    /// Its terminal's new size.
    #[prost(message, optional, tag = "2")]
    pub pty: Option<Pty>,
}

#[cfg(test)]
mod tests;
