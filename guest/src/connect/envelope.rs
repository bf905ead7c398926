//! Envelopes: how a stream's messages are told apart.
//!
//! Called by `rpc` for the request and by `stream` for the answer. Refuses compression, lengths
//! over the limit, and a request of anything but one message.

use bytes::{BufMut, Bytes, BytesMut};

use super::{ConnectError, MESSAGE_BYTES_MAX};

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

/// Takes the one message out of a stream request's body.
///
/// # Errors
/// `invalid_argument` when the body is not exactly one plain envelope (an end envelope may follow).
pub fn single(body: &[u8]) -> Result<&[u8], ConnectError> {
    let (flags, payload, rest) = split(body)?;
    if flags & COMPRESSED != 0 {
        return Err(ConnectError::new(
            super::Code::Unimplemented,
            "compressed messages are not understood; send Connect-Content-Encoding: identity",
        ));
    }
    let ended = match split(rest) {
        Ok((flags, _, after)) => flags & END != 0 && after.is_empty(),
        Err(_) => rest.is_empty(),
    };
    if flags & END != 0 || !ended {
        return Err(ConnectError::invalid_argument("the request must be exactly one message"));
    }
    Ok(payload)
}

fn split(body: &[u8]) -> Result<(u8, &[u8], &[u8]), ConnectError> {
    let Some(([flags, length @ ..], rest)) = body.split_first_chunk::<HEADER_BYTES>() else {
        return Err(ConnectError::invalid_argument("the request ends inside an envelope's header"));
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if length > MESSAGE_BYTES_MAX {
        return Err(ConnectError::new(
            super::Code::ResourceExhausted,
            format!("a message of {length} bytes is over the limit of {MESSAGE_BYTES_MAX}"),
        ));
    }
    match rest.split_at_checked(length) {
        Some((payload, rest)) => Ok((*flags, payload, rest)),
        None => Err(ConnectError::invalid_argument("the request ends inside a message")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Code;

    #[test]
    fn one_message_goes_in_and_comes_out() {
        let wrapped = message(b"{\"a\":1}");
        assert_eq!(&wrapped[..5], [0, 0, 0, 0, 7]);
        assert_eq!(single(&wrapped).unwrap(), b"{\"a\":1}");
        let with_end = [&wrapped[..], &end(None)[..]].concat();
        assert_eq!(single(&with_end).unwrap(), b"{\"a\":1}");
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
            (&two[..], Code::InvalidArgument),
            (&junk_after[..], Code::InvalidArgument),
        ] {
            assert_eq!(single(bad).unwrap_err().code, code, "{bad:?}");
        }
    }
}
