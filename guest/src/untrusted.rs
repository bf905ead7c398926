//! Every decoder that a client's bytes reach before anything is known about them, as a function of
//! bytes alone.
//!
//! Called by fuzz targets, and by the test here that shows each of them at work. Refuses nothing
//! itself: whatever comes back is fine, and a panic or a hang is the finding.

use crate::connect::envelope::{self, Decoder};
use crate::connect::{Codec, ConnectError, Request};
use crate::filesystem;
use crate::http::{FileAction, HttpError, Query, access};
use crate::process;

/// The envelopes of a stream's request, in pieces of the size of the first byte: how many there are.
///
/// # Errors
/// What a client would be told.
pub fn connect_frames(data: &[u8]) -> Result<usize, ConnectError> {
    let Some((step, body)) = data.split_first() else { return Ok(0) };
    let mut decoder = Decoder::default();
    let mut count = 0;
    for piece in body.chunks(usize::from(*step).max(1)) {
        decoder.push(piece);
        while decoder.take()?.is_some() {
            count += 1;
        }
    }
    decoder.finish()?;
    Ok(count)
}

/// The one envelope of a server stream's request: the length of its message.
///
/// # Errors
/// What a client would be told.
pub fn connect_single(data: &[u8]) -> Result<usize, ConnectError> {
    envelope::single(data).map(|message| message.len())
}

/// A message as every request of both services, in both codecs: how many of them it could be.
#[must_use]
pub fn connect_messages(data: &[u8]) -> usize {
    [Codec::Json, Codec::Proto]
        .into_iter()
        .map(|codec| process::decodes(codec, data) + filesystem::decodes(codec, data))
        .sum()
}

/// 1 when the bytes are the message.
pub(crate) fn decodes<T: Request>(codec: Codec, data: &[u8]) -> usize {
    usize::from(codec.decode::<T>(data).is_ok())
}

/// A multipart body in pieces of the size of the first byte: how many bytes its parts have.
///
/// # Errors
/// What a client would be told.
pub fn multipart(data: &[u8]) -> Result<usize, HttpError> {
    let Some((step, body)) = data.split_first() else { return Ok(0) };
    filesystem::multipart_bytes(body, usize::from(*step).max(1))
}

/// The query string of a signed URL, against a token.
///
/// # Errors
/// What a client would be told.
pub fn signature(data: &[u8]) -> Result<(), HttpError> {
    let query = Query::parse(&String::from_utf8_lossy(data));
    access::check_signature(FileAction::Read, "token", &query, 1_000)
}

/// The metadata, conditions and coding of a request to `/files`, one header a line.
#[must_use]
pub fn file_headers(data: &[u8]) -> bool {
    let mut headers = http::HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(100) {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let name = http::HeaderName::from_bytes(halves.next().unwrap_or(b""));
        let value = http::HeaderValue::from_bytes(halves.next().unwrap_or(b""));
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    filesystem::accepts(&headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_decoder_takes_what_is_in_form_and_survives_what_is_not() {
        assert_eq!(connect_frames(b"\x02\0\0\0\0\x02{}\x02\0\0\0\x02{}"), Ok(2));
        assert_eq!(connect_single(b"\0\0\0\0\x02{}"), Ok(2));
        // In JSON nothing is missing from any message; in binary it is no message at all.
        let all = connect_messages(b"{}");
        assert!(all > 10, "{all}");
        assert!(connect_messages(b"\x0a\x00") > 10);
        assert_eq!(multipart(b"\x03--fuzz\r\n\r\nabc\r\n--fuzz--"), Ok(3));
        assert_eq!(signature(b"").unwrap_err().status(), 401);
        assert!(file_headers(b"X-Metadata-A: b\nRange: bytes=0-1\nAccept-Encoding: gzip"));
        assert!(!file_headers(b"X-Metadata-A: \xff"));

        // Every byte string of up to two bytes, and long runs of each byte.
        let short = (0..=u8::MAX).flat_map(|a| (0..=u8::MAX).map(move |b| vec![a, b]));
        let long = (0..=u8::MAX).map(|byte| vec![byte; 3000]);
        for data in short.chain(long).chain([Vec::new()]) {
            drop(connect_frames(&data));
            drop(connect_single(&data));
            assert!(connect_messages(&data) < 100);
            drop(multipart(&data));
            drop(signature(&data));
            std::hint::black_box(file_headers(&data));
        }
    }
}
