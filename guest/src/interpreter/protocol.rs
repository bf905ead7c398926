//! The Jupyter messaging protocol: signed frames to typed messages and back.
//!
//! Called by [`super::kernel`]. Does no input or output. Refuses a message whose signature does
//! not match the key of the connection, whose frames are missing or too large, and whose header
//! is not JSON of the expected form. Everything a kernel sends may have been written by user
//! code, so a field that is absent or of another type becomes an empty value, never a panic.

use bytes::Bytes;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::Sha256;

/// Separates routing frames from the message.
const DELIMITER: &[u8] = b"<IDS|MSG>";

/// Most routing frames in front of the delimiter.
const ROUTING_FRAMES_MAX: usize = 8;

/// Most bytes of one message, all frames together.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Protocol version we announce.
const VERSION: &str = "5.3";

/// Why a message could not be read
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("a kernel message has no delimiter among its first {ROUTING_FRAMES_MAX} frames")]
    NoDelimiter,
    #[error("a kernel message ends before its content frame")]
    TooShort,
    #[error("a kernel message of {bytes} bytes is over the limit of {MESSAGE_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error("the signature of a kernel message does not match its key")]
    BadSignature,
    #[error("the header of a kernel message is not in form")]
    Header(#[source] serde_json::Error),
}

/// The shared secret of one kernel connection, as the hexadecimal text in its connection file.
#[derive(Clone)]
pub struct Key(String);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Wraps the text; the text's bytes are the key, as Jupyter has it.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text for the connection file.
    pub fn text(&self) -> &str {
        &self.0
    }

    fn mac<'a>(&self, frames: impl Iterator<Item = &'a [u8]>) -> Hmac<Sha256> {
        // An HMAC takes a key of any length: the error arm of the constructor is never reached,
        // and an empty key would fail verification at the kernel, not pass it.
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.as_bytes())
            .unwrap_or_else(|_| Hmac::<Sha256>::new(&Default::default()));
        for frame in frames {
            mac.update(frame);
        }
        mac
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    msg_id: String,
    #[serde(default)]
    session: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    date: String,
    msg_type: String,
    #[serde(default)]
    version: String,
}

/// What to send on the shell channel.
#[derive(Debug)]
pub enum Request<'a> {
    /// Asks whether the kernel is up.
    KernelInfo,
    /// Asks it, on the control channel, to give up its cell.
    Interrupt,
    /// Runs code as a cell, numbered unless it is `unnumbered`; `orders` are for our own part of the
    /// kernel, which carries them out around the cell.
    Execute { code: &'a str, unnumbered: bool, orders: &'a Value },
    /// Runs code that leaves no trace in the history and publishes no result.
    Silent { code: &'a str },
}

/// The frames of a request, and the date text is the caller's so that this stays pure.
pub fn encode(
    request: &Request<'_>,
    msg_id: &str,
    session: &str,
    date: &str,
    key: &Key,
) -> Vec<Bytes> {
    let nothing = || json!({});
    let (msg_type, metadata, content) = match request {
        Request::KernelInfo => ("kernel_info_request", nothing(), nothing()),
        Request::Interrupt => ("interrupt_request", nothing(), nothing()),
        Request::Execute { code, unnumbered, orders } => {
            let content = execute_content(code, false, !unnumbered);
            ("execute_request", json!({ "mica": orders }), content)
        }
        Request::Silent { code } => {
            ("execute_request", nothing(), execute_content(code, true, false))
        }
    };
    let header = json!({
        "msg_id": msg_id,
        "session": session,
        "username": "mica",
        "date": date,
        "msg_type": msg_type,
        "version": VERSION,
    });
    let body: Vec<Bytes> = [header, nothing(), metadata, content]
        .iter()
        .map(|part| Bytes::from(part.to_string()))
        .collect();
    let signature = hex(&key.mac(body.iter().map(Bytes::as_ref)).finalize().into_bytes());
    let mut frames = vec![Bytes::from_static(DELIMITER), Bytes::from(signature)];
    frames.extend(body);
    frames
}

fn execute_content(code: &str, silent: bool, store_history: bool) -> Value {
    json!({
        "code": code,
        "silent": silent,
        "store_history": store_history,
        "user_expressions": {},
        "allow_stdin": false,
        // Our own queue decides what runs next; the kernel must not drop requests behind a
        // failed one, or the request that restores the environment would be lost.
        "stop_on_error": false,
    })
}

/// A message from the kernel.
#[derive(Debug, PartialEq)]
pub struct Incoming {
    /// The request this answers; empty when there is none.
    pub parent_id: String,
    /// When the kernel made it, ISO 8601.
    pub date: String,
    pub body: Body,
}

/// What a message says, as far as we act on it.
#[derive(Debug, PartialEq)]
pub enum Body {
    Busy,
    Idle,
    Input {
        execution_count: u64,
    },
    Stdout(String),
    Stderr(String),
    Display(Map<String, Value>),
    MainResult(Map<String, Value>),
    Error {
        name: String,
        value: String,
        traceback: String,
    },
    ReplyOk,
    ReplyError {
        name: String,
        value: String,
        traceback: String,
    },
    ReplyAborted,
    KernelInfo,
    /// All output of the cell has come, of a kernel that says so: see `snippets`.
    Flushed,
    /// Content that is not JSON we can read, for example with half of a surrogate pair.
    Unreadable,
    /// A kind we do not act on.
    Other,
}

/// Checks and reads the frames of one message.
///
/// # Errors
/// See [`ProtocolError`].
pub fn decode(frames: &[Bytes], key: &Key) -> Result<Incoming, ProtocolError> {
    let bytes = frames.iter().fold(0_usize, |sum, frame| sum.saturating_add(frame.len()));
    if bytes > MESSAGE_BYTES_MAX {
        return Err(ProtocolError::TooLarge { bytes });
    }
    let at = frames
        .iter()
        .take(ROUTING_FRAMES_MAX + 1)
        .position(|frame| frame.as_ref() == DELIMITER)
        .ok_or(ProtocolError::NoDelimiter)?;
    let [signature, header, parent, metadata, content, ..] = frames.get(at + 1..).unwrap_or(&[])
    else {
        return Err(ProtocolError::TooShort);
    };
    let signed = [header, parent, metadata, content];
    let signature = unhex(signature).ok_or(ProtocolError::BadSignature)?;
    key.mac(signed.iter().map(|frame| frame.as_ref()))
        .verify_slice(&signature)
        .map_err(|_| ProtocolError::BadSignature)?;
    let header: Header = serde_json::from_slice(header).map_err(ProtocolError::Header)?;
    let parent: Value = serde_json::from_slice(parent).map_err(ProtocolError::Header)?;
    let parent_id = text(&parent, "msg_id");
    let body = match serde_json::from_slice::<Value>(content) {
        Ok(content) => body(&header.msg_type, content),
        Err(_) => Body::Unreadable,
    };
    Ok(Incoming { parent_id, date: header.date, body })
}

fn body(msg_type: &str, mut content: Value) -> Body {
    match msg_type {
        "status" => match content.get("execution_state").and_then(Value::as_str) {
            Some("busy") => Body::Busy,
            Some("idle") => Body::Idle,
            _ => Body::Other,
        },
        "execute_input" => Body::Input {
            execution_count: content.get("execution_count").and_then(Value::as_u64).unwrap_or(0),
        },
        "stream" => match content.get("name").and_then(Value::as_str) {
            Some("stdout") => Body::Stdout(text(&content, "text")),
            Some("stderr") => Body::Stderr(text(&content, "text")),
            _ => Body::Other,
        },
        "display_data" => Body::Display(data(&mut content)),
        "execute_result" => Body::MainResult(data(&mut content)),
        "error" => Body::Error {
            name: text(&content, "ename"),
            value: text(&content, "evalue"),
            traceback: traceback(&content),
        },
        "execute_reply" => match content.get("status").and_then(Value::as_str) {
            Some("ok") => Body::ReplyOk,
            Some("aborted" | "abort") => Body::ReplyAborted,
            _ => Body::ReplyError {
                name: text(&content, "ename"),
                value: text(&content, "evalue"),
                traceback: traceback(&content),
            },
        },
        "kernel_info_reply" => Body::KernelInfo,
        "mica_flushed" => Body::Flushed,
        _ => Body::Other,
    }
}

fn text(value: &Value, field: &str) -> String {
    value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn data(content: &mut Value) -> Map<String, Value> {
    match content.get_mut("data").map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// E2B hands the lines of a traceback on as one text without anything between them.
fn traceback(content: &Value) -> String {
    let lines = content.get("traceback").and_then(Value::as_array);
    lines.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|n| u8::try_from(n).ok());
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks_exact(2)
        .map(|pair| match pair {
            [high, low] => Some(nibble(*high)? << 4 | nibble(*low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key::new("a0436f6c-1916-498b-8eb9-e81ab9368e84".to_owned())
    }

    fn signed(header: &str, parent: &str, content: &str) -> Vec<Bytes> {
        let parts: Vec<Bytes> = [header, parent, "{}", content]
            .iter()
            .map(|part| Bytes::copy_from_slice(part.as_bytes()))
            .collect();
        let signature = hex(&key().mac(parts.iter().map(Bytes::as_ref)).finalize().into_bytes());
        let mut frames = vec![
            Bytes::from_static(b"kernel.x.stream"),
            Bytes::from_static(DELIMITER),
            Bytes::from(signature),
        ];
        frames.extend(parts);
        frames
    }

    fn read(msg_type: &str, content: &str) -> Body {
        let header = json!({"msg_id": "k1", "msg_type": msg_type, "date": "2026-01-02T03:04:05Z"});
        let parent = json!({"msg_id": "p1"});
        let frames = signed(&header.to_string(), &parent.to_string(), content);
        let message = decode(&frames, &key()).unwrap();
        assert_eq!(message.parent_id, "p1");
        assert_eq!(message.date, "2026-01-02T03:04:05Z");
        message.body
    }

    #[test]
    fn signature_is_hmac_sha256_as_rfc_4231_has_it() {
        // RFC 4231 test case 2.
        let mac = Key::new("Jefe".to_owned())
            .mac([&b"what do ya want "[..], &b"for nothing?"[..]].into_iter());
        assert_eq!(
            hex(&mac.finalize().into_bytes()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn requests_are_read_back_by_the_same_rules() {
        let frames = encode(
            &Request::Execute { code: "1+1", unnumbered: false, orders: &Value::Null },
            "m1",
            "s1",
            "2026-01-02T03:04:05Z",
            &key(),
        );
        assert_eq!(frames.len(), 6);
        let content: Value = serde_json::from_slice(&frames[5]).unwrap();
        assert_eq!(content["code"], "1+1");
        assert_eq!(content["store_history"], true);
        assert_eq!(content["allow_stdin"], false);
        // Our own kind is one that we do not act on, and its signature holds.
        assert_eq!(decode(&frames, &key()).unwrap().body, Body::Other);
        let silent = encode(&Request::Silent { code: "x" }, "m2", "s1", "", &key());
        let content: Value = serde_json::from_slice(&silent[5]).unwrap();
        assert_eq!(content["silent"], true);
        assert_eq!(content["store_history"], false);
    }

    #[test]
    fn every_kind_of_message_is_mapped() {
        assert_eq!(read("status", r#"{"execution_state":"busy"}"#), Body::Busy);
        assert_eq!(read("status", r#"{"execution_state":"idle"}"#), Body::Idle);
        assert_eq!(
            read("execute_input", r#"{"code":"1","execution_count":7}"#),
            Body::Input { execution_count: 7 }
        );
        assert_eq!(
            read("stream", r#"{"name":"stdout","text":"a\n"}"#),
            Body::Stdout("a\n".to_owned())
        );
        assert_eq!(read("stream", r#"{"name":"stderr","text":"b"}"#), Body::Stderr("b".to_owned()));
        let Body::MainResult(data) =
            read("execute_result", r#"{"data":{"text/plain":"2"},"execution_count":1}"#)
        else {
            panic!("not a main result")
        };
        assert_eq!(data["text/plain"], "2");
        assert_eq!(
            read("error", r#"{"ename":"E","evalue":"v","traceback":["a","b"]}"#),
            Body::Error { name: "E".into(), value: "v".into(), traceback: "ab".into() }
        );
        assert_eq!(read("execute_reply", r#"{"status":"ok"}"#), Body::ReplyOk);
        assert_eq!(read("execute_reply", r#"{"status":"aborted"}"#), Body::ReplyAborted);
        assert_eq!(read("kernel_info_reply", "{}"), Body::KernelInfo);
        assert_eq!(read("mica_flushed", "{}"), Body::Flushed);
        assert_eq!(read("comm_open", "{}"), Body::Other);
    }

    #[test]
    fn content_of_the_wrong_shape_is_not_a_panic() {
        assert_eq!(read("stream", "[]"), Body::Other);
        assert_eq!(read("display_data", r#"{"data":3}"#), Body::Display(Map::new()));
        assert_eq!(
            read("error", r#"{"traceback":[1,{}]}"#),
            Body::Error { name: String::new(), value: String::new(), traceback: String::new() }
        );
        assert_eq!(read("stream", r#"{"name":"stdout","text":"\ud800"}"#), Body::Unreadable);
    }

    #[test]
    fn hostile_frames_are_refused() {
        let good = signed(r#"{"msg_id":"a","msg_type":"status"}"#, "{}", "{}");
        assert!(decode(&good, &key()).is_ok());
        for missing in 3..good.len() {
            let short = &good[..missing];
            assert!(matches!(decode(short, &key()), Err(ProtocolError::TooShort)), "{missing}");
        }
        assert!(matches!(decode(&[], &key()), Err(ProtocolError::NoDelimiter)));
        let other = Key::new("other".to_owned());
        assert!(matches!(decode(&good, &other), Err(ProtocolError::BadSignature)));
        for at in 2..good.len() {
            let mut changed = good.clone();
            changed[at] = Bytes::from_static(b"{ }");
            assert!(
                matches!(decode(&changed, &key()), Err(ProtocolError::BadSignature)),
                "frame {at}"
            );
        }
        let bad_header = signed("[]", "{}", "{}");
        assert!(matches!(decode(&bad_header, &key()), Err(ProtocolError::Header(_))));
    }
}
