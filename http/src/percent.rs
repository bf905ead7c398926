//! Percent-encoding: paths segment by segment, and query strings.
//!
//! Called by the router and the list filters. Refuses a `%` that is not followed by two hex digits
//! and bytes that are not UTF-8 once decoded, instead of guessing what was meant.

/// Text that is not percent-encoded as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("percent-encoding must be `%` and two hex digits, and decode to UTF-8")]
pub struct PercentError;

/// Decodes one path segment. A `+` stays a `+`.
///
/// # Errors
/// See [`PercentError`].
pub fn decode_segment(text: &str) -> Result<String, PercentError> {
    decode(text, false)
}

/// Decodes one key or value of a query string. A `+` is a space.
///
/// # Errors
/// See [`PercentError`].
pub fn decode_query(text: &str) -> Result<String, PercentError> {
    decode(text, true)
}

/// Splits a query string into decoded pairs. A part without `=` has an empty value.
///
/// # Errors
/// See [`PercentError`].
pub fn query_pairs(query: &str) -> Result<Vec<(String, String)>, PercentError> {
    query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            Ok((decode_query(key)?, decode_query(value)?))
        })
        .collect()
}

fn decode(text: &str, plus_is_space: bool) -> Result<String, PercentError> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let high = bytes.next().and_then(hex_value).ok_or(PercentError)?;
                let low = bytes.next().and_then(hex_value).ok_or(PercentError)?;
                high << 4 | low
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).map_err(|_| PercentError)
}

fn hex_value(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_once_and_only_once() {
        assert_eq!(decode_segment("ns%2Ft%3Av1").as_deref(), Ok("ns/t:v1"));
        assert_eq!(decode_segment("a%2520b+c").as_deref(), Ok("a%20b+c"));
        assert_eq!(decode_query("a+b%2B").as_deref(), Ok("a b+"));
        assert_eq!(decode_segment("%c3%A9").as_deref(), Ok("\u{e9}"));
    }

    #[test]
    fn refuses_what_is_out_of_form() {
        for bad in ["%", "%2", "%zz", "%+1", "a%", "%ff", "%\u{e9}1"] {
            assert_eq!(decode_segment(bad), Err(PercentError), "{bad:?}");
        }
    }

    #[test]
    fn pairs() {
        let pairs = query_pairs("a=1&&b&c=%3D%26=x").unwrap();
        let expected = [("a", "1"), ("b", ""), ("c", "=&=x")];
        assert!(pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).eq(expected));
    }
}
