//! Where the body of an answer ends, by its head (RFC 9112, 6.3).
//!
//! Called by [`super::head`]. Refuses a length that is not one number, and a coding that is not `chunked`
//! alone: what else a body is coded with would be lost on this hop.

use hyper::header::{CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING};
use hyper::{HeaderMap, StatusCode, Version};

use super::Malformed;

/// Where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none, whatever the fields say.
    Nothing,
    /// After so many bytes.
    Length(u64),
    /// After the last chunk.
    Chunked,
    /// With the stream.
    UntilClosed,
}

/// The framing of an answer with this head. `to_head`: of one to a `HEAD`.
pub fn of(
    version: Version,
    status: StatusCode,
    fields: &HeaderMap,
    to_head: bool,
) -> Result<Framing, Malformed> {
    let bodyless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if to_head || bodyless || status.is_informational() {
        return Ok(Framing::Nothing);
    }
    if fields.contains_key(TRANSFER_ENCODING) {
        let mut codings = fields.get_all(TRANSFER_ENCODING).iter();
        let only = codings.next().filter(|_| codings.next().is_none());
        let is_chunked =
            only.is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
        // A server of HTTP/1.0 does not know chunks.
        let known = is_chunked && version == Version::HTTP_11;
        return if known { Ok(Framing::Chunked) } else { Err(Malformed::Length) };
    }
    let mut length = None;
    for value in fields.get_all(CONTENT_LENGTH) {
        for part in numbers(value)? {
            if length.is_some_and(|length| length != part) {
                return Err(Malformed::Length);
            }
            length = Some(part);
        }
    }
    Ok(length.map_or(Framing::UntilClosed, Framing::Length))
}

/// One number, or the same one several times, as a gateway that joins fields writes it.
fn numbers(value: &HeaderValue) -> Result<Vec<u64>, Malformed> {
    let text = value.to_str().map_err(|_| Malformed::Length)?;
    let number = |part: &str| {
        let digits = part.trim_matches([' ', '\t']);
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten().ok_or(Malformed::Length)
    };
    text.split(',').map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framing(fields: &[(&'static str, &'static str)]) -> Result<Framing, Malformed> {
        of(Version::HTTP_11, StatusCode::OK, &map(fields), false)
    }

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn a_body_has_one_length() {
        let length = |value| framing(&[("content-length", value)]);
        assert_eq!(length("12"), Ok(Framing::Length(12)));
        assert_eq!(length("12, 12"), Ok(Framing::Length(12)));
        for bad in ["", "+1", "-1", "0x1", "1 2", "12,13", "12,", "18446744073709551616", "1.0"] {
            assert_eq!(length(bad), Err(Malformed::Length), "{bad:?}");
        }
        let twice = |second| framing(&[("content-length", "5"), ("content-length", second)]);
        assert_eq!((twice("5"), twice("6")), (Ok(Framing::Length(5)), Err(Malformed::Length)));
        assert_eq!(framing(&[]), Ok(Framing::UntilClosed));
    }

    #[test]
    fn chunks_count_more_than_a_length_and_no_other_coding_passes() {
        let coded = |value| framing(&[("content-length", "5"), ("transfer-encoding", value)]);
        assert_eq!(coded("Chunked"), Ok(Framing::Chunked));
        for bad in ["gzip, chunked", "chunked, chunked", "identity", "", "chunked;q=1", "xchunked"]
        {
            assert_eq!(coded(bad), Err(Malformed::Length), "{bad:?}");
        }
        let twice = [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")];
        assert_eq!(framing(&twice), Err(Malformed::Length));
        let old = of(Version::HTTP_10, StatusCode::OK, &map(&twice[..1]), false);
        assert_eq!(old, Err(Malformed::Length));
    }

    #[test]
    fn some_answers_have_no_body_whatever_they_say() {
        let fields = map(&[("content-length", "5")]);
        let of = |status, to_head| {
            super::of(Version::HTTP_11, StatusCode::from_u16(status).unwrap(), &fields, to_head)
        };
        for (status, to_head) in [(200, true), (204, false), (304, false), (101, false)] {
            assert_eq!(of(status, to_head), Ok(Framing::Nothing), "{status}");
        }
    }
}
