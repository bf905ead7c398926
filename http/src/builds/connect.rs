//! The little of the Connect protocol that a build speaks: frames, and the events of a process.
//!
//! Called by [`super::guest`]. Every byte it reads is a guest's, and hostile: refuses a frame that is longer
//! than [`FRAME_BYTES_MAX`] before it is there.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

/// The longest frame that is taken.
const FRAME_BYTES_MAX: usize = 4 << 20;
const HEADER_BYTES: usize = 5;
/// Set in the first byte of the last frame.
const END_OF_STREAM: u8 = 0b10;

/// What a guest said out of form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame that nobody has room for.
    #[error("the agent announces a message of {0} bytes")]
    TooLong(usize),
    /// Not what the protocol has there.
    #[error("the agent's answer is out of form: {0}")]
    Form(String),
    /// The call failed, in the agent's words.
    #[error("{0}")]
    Failed(String),
}

/// One event of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It wrote.
    Output {
        /// To standard error.
        is_error: bool,
        /// What.
        bytes: Vec<u8>,
    },
    /// It ended.
    Ended {
        /// Its exit code.
        code: i32,
        /// In words.
        status: String,
    },
    /// Nothing that matters here.
    Other,
}

/// A message as one frame.
pub fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut framed = Vec::with_capacity(HEADER_BYTES + message.len());
    framed.push(0);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

/// Bytes of a stream on their way to becoming events.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: Vec<u8>,
    /// What has become events already. Let go when more comes, and not for every frame: a guest may send
    /// many short ones at once.
    used: usize,
}

impl Frames {
    /// Takes bytes as they come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..std::mem::take(&mut self.used));
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event. `None`: more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is of no use then.
    pub fn next(&mut self) -> Result<Option<ProcessEvent>, FrameError> {
        let unused = &self.buffer[self.used..];
        let Some((&[flags, a, b, c, d], rest)) = unused.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let event =
            if flags & END_OF_STREAM == 0 { event(message) } else { end_of_stream(message) };
        self.used += HEADER_BYTES + length;
        event.map(Some)
    }
}

#[derive(Deserialize)]
struct EventMessage {
    event: EventJson,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct EventJson {
    data: Option<DataJson>,
    end: Option<EndJson>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DataJson {
    stdout: Option<String>,
    stderr: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct EndJson {
    exit_code: i32,
    status: String,
}

#[derive(Deserialize)]
struct EndOfStream {
    error: Option<ErrorJson>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ErrorJson {
    code: String,
    message: String,
}

fn event(message: &[u8]) -> Result<ProcessEvent, FrameError> {
    let form = |error: &dyn std::fmt::Display| FrameError::Form(error.to_string());
    let EventMessage { event } = serde_json::from_slice(message).map_err(|e| form(&e))?;
    if let Some(EndJson { exit_code, status }) = event.end {
        return Ok(ProcessEvent::Ended { code: exit_code, status });
    }
    let Some(DataJson { stdout, stderr }) = event.data else { return Ok(ProcessEvent::Other) };
    let is_error = stderr.is_some();
    let Some(text) = stderr.or(stdout) else { return Ok(ProcessEvent::Other) };
    let bytes = BASE64_STANDARD.decode(text).map_err(|e| form(&e))?;
    Ok(ProcessEvent::Output { is_error, bytes })
}

fn end_of_stream(message: &[u8]) -> Result<ProcessEvent, FrameError> {
    let end: EndOfStream =
        serde_json::from_slice(message).map_err(|error| FrameError::Form(error.to_string()))?;
    match end.error {
        Some(ErrorJson { code, message }) => Err(FrameError::Failed(match message.is_empty() {
            true => code,
            false => message,
        })),
        None => Ok(ProcessEvent::Other),
    }
}

/// What an answer that is no stream says went wrong.
pub fn refusal(body: &[u8]) -> Option<String> {
    let error: ErrorJson = serde_json::from_slice(body).ok()?;
    Some(error.message).filter(|message| !message.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(bytes: &[u8], piece: usize) -> Result<Vec<ProcessEvent>, FrameError> {
        let (mut frames, mut seen) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            frames.push(piece);
            while let Some(event) = frames.next()? {
                seen.push(event);
            }
        }
        Ok(seen)
    }

    #[test]
    fn events_come_whole_however_the_bytes_do() {
        let mut bytes = frame(br#"{"event":{"start":{"pid":7}}}"#);
        bytes.extend(frame(br#"{"event":{"data":{"stdout":"aGkK"}}}"#));
        bytes.extend(frame(br#"{"event":{"data":{"stderr":"IQ=="}}}"#));
        bytes.extend(frame(
            br#"{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3"}}}"#,
        ));
        let output =
            |is_error, bytes: &[u8]| ProcessEvent::Output { is_error, bytes: bytes.to_vec() };
        let wanted = [
            ProcessEvent::Other,
            output(false, b"hi\n"),
            output(true, b"!"),
            ProcessEvent::Ended { code: 3, status: "exit status 3".to_owned() },
        ];
        for piece in [1, 3, 7, 10_000] {
            assert_eq!(events(&bytes, piece).unwrap(), wanted, "{piece}");
        }
    }

    #[test]
    fn what_a_guest_says_out_of_form_is_an_error() {
        let too_long = [0, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(events(&too_long, 5), Err(FrameError::TooLong(_))));
        for bad in [&b"{"[..], b"[]", br#"{"event":{"data":{"stdout":"?"}}}"#] {
            assert!(matches!(events(&frame(bad), 9), Err(FrameError::Form(_))), "{bad:?}");
        }
        let mut end =
            frame(br#"{"error":{"code":"invalid_argument","message":"cwd is not there"}}"#);
        end[0] = END_OF_STREAM;
        assert_eq!(events(&end, 9), Err(FrameError::Failed("cwd is not there".to_owned())));
    }
}
