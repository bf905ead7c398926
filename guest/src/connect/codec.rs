//! The seam between messages and their bytes. JSON is the one codec; the binary one will be a
//! second type with the same trait.
//!
//! Called by `rpc` and `stream`, which are generic over it. Refuses bytes that are not the
//! message's type, and takes unknown fields for what a newer client may say.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ConnectError;

/// What a codec must be able to do with a message. A second codec adds its own bound here.
pub trait Message: Serialize + DeserializeOwned + Send + 'static {}

impl<T: Serialize + DeserializeOwned + Send + 'static> Message for T {}

/// One way to write messages.
pub trait Codec: Copy + Send + Sync + 'static {
    /// Content type of a unary request and answer.
    const UNARY: &'static str;
    /// Content type of a stream's request and answer.
    const STREAM: &'static str;

    /// Reads a message.
    ///
    /// # Errors
    /// `invalid_argument` when the bytes are not one.
    fn decode<T: Message>(self, bytes: &[u8]) -> Result<T, ConnectError>;

    /// Writes a message.
    ///
    /// # Errors
    /// `internal` when it does not serialise: a fault of ours.
    fn encode<T: Message>(self, message: &T) -> Result<Bytes, ConnectError>;
}

/// proto3 JSON.
#[derive(Clone, Copy, Debug)]
pub struct Json;

impl Codec for Json {
    const UNARY: &'static str = "application/json";
    const STREAM: &'static str = "application/connect+json";

    fn decode<T: Message>(self, bytes: &[u8]) -> Result<T, ConnectError> {
        // A message without any field set may be sent as nothing at all.
        let bytes = if bytes.is_empty() { b"{}" } else { bytes };
        serde_json::from_slice(bytes).map_err(|error| {
            ConnectError::invalid_argument(format!("the request is not the message: {error}"))
        })
    }

    fn encode<T: Message>(self, message: &T) -> Result<Bytes, ConnectError> {
        serde_json::to_vec(message).map(Bytes::from).map_err(|error| {
            ConnectError::internal(format!("cannot write the answer's message: {error}"))
        })
    }
}

/// `true` when a request's content type is `wanted`, whatever parameters follow it.
#[must_use]
pub fn is_type(given: &str, wanted: &str) -> bool {
    given.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Small {
        #[serde(default)]
        a: u32,
    }

    #[test]
    fn unknown_fields_are_let_through_and_wrong_types_are_not() {
        assert_eq!(Json.decode::<Small>(br#"{"a":1,"later":[]}"#).unwrap(), Small { a: 1 });
        assert_eq!(Json.decode::<Small>(b"").unwrap(), Small { a: 0 });
        for bad in [&b"{"[..], br#"{"a":"x"}"#, b"[1,2]", b"null", b"{} {}"] {
            let error = Json.decode::<Small>(bad).unwrap_err();
            assert_eq!(error.code, crate::connect::Code::InvalidArgument, "{bad:?}");
        }
    }

    #[test]
    fn content_types_may_carry_parameters() {
        assert!(is_type("application/json", Json::UNARY));
        assert!(is_type("Application/JSON; charset=utf-8", Json::UNARY));
        assert!(!is_type("application/jsonx", Json::UNARY));
        assert!(!is_type("", Json::UNARY));
    }
}
