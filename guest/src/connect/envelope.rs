//! Envelopes: how a stream's messages are told apart.
//!
//! Called by `rpc` and `incoming` for the request and by `stream` for the answer. Refuses compression,
//! lengths over the limit, and, of a server stream, a request of anything but one message.

use bytes::{Buf as _, BufMut, Bytes, BytesMut};

use super::{Code, ConnectError, MESSAGE_BYTES_MAX};

const HEADER_BYTES: usize = 5;
const COMPRESSED: u8 = 0b01;
const END: u8 = 0b10;

/// Wraps one message.
#[must_use]
pub fn message(payload: &[u8]) -> Bytes {
    wrap(0, payload)
}

/// The last envelope of a stream.
#[must_use]
pub fn end(error: Option<&ConnectError>) -> Bytes {
    #[derive(serde::Serialize)]
    struct End<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a ConnectError>,
    }
    // Two strings in structs always serialise; were it not so, an empty end is still an end.
    let payload = serde_json::to_vec(&End { error }).unwrap_or_else(|_| b"{}".to_vec());
    wrap(END, &payload)
}

fn wrap(flags: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_BYTES + payload.len());
    out.put_u8(flags);
    // What is sent is built here, far below 4 GiB; a message that were not would be cut off by
    // the client as out of form.
    out.put_u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    out.put_slice(payload);
    out.freeze()
}

/// One message of a client, as it was wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// A plain message.
    Message(Bytes),
    /// The end, which a client may say and need not.
    End,
}

/// Cuts a request's body into envelopes, however it arrives. Holds one envelope and what was pushed
/// last.
#[derive(Debug, Default)]
pub struct Decoder(BytesMut);

impl Decoder {
    /// Adds bytes of the body. Call when [`Decoder::take`] has no more envelopes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next envelope; `None` when more of the body is needed.
    ///
    /// # Errors
    /// `resource_exhausted` for one over the limit, told from its header alone; `unimplemented` for
    /// a compressed one.
    pub fn take(&mut self) -> Result<Option<Envelope>, ConnectError> {
        let Some(([flags, length @ ..], _)) = self.0.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let flags = *flags;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MESSAGE_BYTES_MAX {
            return Err(ConnectError::new(
                Code::ResourceExhausted,
                format!("a message of {length} bytes is over the limit of {MESSAGE_BYTES_MAX}"),
            ));
        }
        if flags & COMPRESSED != 0 {
            return Err(compressed());
        }
        if flags & !END != 0 {
            return Err(ConnectError::invalid_argument(format!(
                "an envelope has the flags {flags:#04x}; only 0x00 and 0x02 are known"
            )));
        }
        if self.0.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.0.advance(HEADER_BYTES);
        let payload = self.0.split_to(length).freeze();
        Ok(Some(if flags & END == 0 { Envelope::Message(payload) } else { Envelope::End }))
    }

    /// Whether the body may end here.
    ///
    /// # Errors
    /// `invalid_argument` inside an envelope.
    pub fn finish(&self) -> Result<(), ConnectError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(ConnectError::invalid_argument("the request ends inside an envelope"))
    }
}

/// The error for a message that came compressed.
#[must_use]
pub fn compressed() -> ConnectError {
    ConnectError::new(
        Code::Unimplemented,
        "compressed messages are not understood; send Connect-Content-Encoding: identity",
    )
}

/// Takes the one message out of a stream request's body.
///
/// # Errors
/// `invalid_argument` when the body is not exactly one plain envelope (an end envelope may follow),
/// and those of [`Decoder::take`].
pub fn single(body: &[u8]) -> Result<Bytes, ConnectError> {
    let mut decoder = Decoder::default();
    decoder.push(body);
    let not_one = || ConnectError::invalid_argument("the request must be exactly one message");
    let message = match decoder.take()? {
        Some(Envelope::Message(message)) => message,
        Some(Envelope::End) => return Err(not_one()),
        None => {
            decoder.finish()?;
            return Err(not_one());
        }
    };
    match decoder.take() {
        Ok(Some(Envelope::End) | None) if decoder.finish().is_ok() => Ok(message),
        _ => Err(not_one()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_goes_in_and_comes_out() {
        let wrapped = message(b"{\"a\":1}");
        assert_eq!(&wrapped[..5], [0, 0, 0, 0, 7]);
        assert_eq!(&single(&wrapped).unwrap()[..], b"{\"a\":1}");
        let with_end = [&wrapped[..], &end(None)[..]].concat();
        assert_eq!(&single(&with_end).unwrap()[..], b"{\"a\":1}");
    }

    #[test]
    fn the_end_says_why() {
        assert_eq!(&end(None)[..], b"\x02\0\0\0\x02{}");
        let error = ConnectError::not_found("x");
        let frame = end(Some(&error));
        assert_eq!(&frame[5..], br#"{"error":{"code":"not_found","message":"x"}}"#);
    }

    #[test]
    fn anything_else_is_refused() {
        let two = [&message(b"{}")[..], &message(b"{}")[..]].concat();
        let junk_after = [&message(b"{}")[..], b"xx"].concat();
        for (bad, code) in [
            (&b""[..], Code::InvalidArgument),
            (&b"\0\0\0\0"[..], Code::InvalidArgument),
            (&b"\0\0\0\0\x05{}"[..], Code::InvalidArgument),
            (&b"\0\xff\xff\xff\xff"[..], Code::ResourceExhausted),
            (&b"\x01\0\0\0\x02{}"[..], Code::Unimplemented),
            (&b"\x02\0\0\0\x02{}"[..], Code::InvalidArgument),
            (&b"\x80\0\0\0\x02{}"[..], Code::InvalidArgument),
            (&two[..], Code::InvalidArgument),
            (&junk_after[..], Code::InvalidArgument),
        ] {
            assert_eq!(single(bad).unwrap_err().code, code, "{bad:?}");
        }
    }

    #[test]
    fn envelopes_are_the_same_however_the_body_is_cut() {
        let body =
            [&message(b"one")[..], &message(b"")[..], &message(b"three")[..], &end(None)[..]];
        let body = body.concat();
        for step in 1..=body.len() {
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for piece in body.chunks(step) {
                decoder.push(piece);
                while let Some(envelope) = decoder.take().unwrap() {
                    found.push(envelope);
                }
            }
            decoder.finish().unwrap();
            let text = |text: &'static [u8]| Envelope::Message(Bytes::from_static(text));
            assert_eq!(found, [text(b"one"), text(b""), text(b"three"), Envelope::End], "{step}");
        }
    }

    #[test]
    fn a_length_over_the_limit_is_told_from_its_header_alone() {
        let mut decoder = Decoder::default();
        decoder.push(b"\0\xff\xff\xff");
        assert_eq!(decoder.take().unwrap(), None);
        assert_eq!(decoder.finish().unwrap_err().code, Code::InvalidArgument);
        decoder.push(b"\xff");
        assert_eq!(decoder.take().unwrap_err().code, Code::ResourceExhausted);
    }
}
