//! The seam between messages and their bytes: the two codecs of the protocol, by content type.
//!
//! Called by `rpc`, `stream` and `incoming`, which carry the codec of the request to its answer.
//! Refuses bytes that are not the message's type, and takes unknown fields for what a newer client
//! may say.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ConnectError;

/// What both codecs need of a message that comes in. One Rust type serves both: `prost` has its
/// field numbers, `serde` its proto3 JSON.
pub trait Request: DeserializeOwned + prost::Message + Default + 'static {}

impl<T: DeserializeOwned + prost::Message + Default + 'static> Request for T {}

/// What both codecs need of a message that goes out.
pub trait Reply: Serialize + prost::Message + 'static {}

impl<T: Serialize + prost::Message + 'static> Reply for T {}

/// A message without fields: asks nothing, or answers that it is done.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message, Serialize, Deserialize)]
pub struct Nothing {}

/// One way to write messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// proto3 JSON.
    Json,
    /// Binary protobuf.
    Proto,
}

impl Codec {
    /// Content types of unary calls, for a client that sent another.
    pub const UNARY_TYPES: &'static str = "application/json, application/proto";

    /// Content types of streams, for a client that sent another.
    pub const STREAM_TYPES: &'static str = "application/connect+json, application/connect+proto";

    const ALL: [Self; 2] = [Self::Json, Self::Proto];

    /// Content type of a unary request and answer.
    #[must_use]
    pub const fn unary_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Proto => "application/proto",
        }
    }

    /// Content type of a stream's request and answer.
    #[must_use]
    pub const fn stream_type(self) -> &'static str {
        match self {
            Self::Json => "application/connect+json",
            Self::Proto => "application/connect+proto",
        }
    }

    /// The codec of a unary request with this content type.
    #[must_use]
    pub fn of_unary(content_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| is_type(content_type, codec.unary_type()))
    }

    /// The codec of a stream with this content type.
    #[must_use]
    pub fn of_stream(content_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| is_type(content_type, codec.stream_type()))
    }

    /// Reads a message.
    ///
    /// # Errors
    /// `invalid_argument` when the bytes are not one.
    pub fn decode<T: Request>(self, bytes: &[u8]) -> Result<T, ConnectError> {
        let wrong = |error: &dyn std::fmt::Display| {
            ConnectError::invalid_argument(format!("the request is not the message: {error}"))
        };
        match self {
            // A message without any field set may be sent as nothing at all.
            Self::Json if bytes.is_empty() => Ok(T::default()),
            Self::Json => serde_json::from_slice(bytes).map_err(|error| wrong(&error)),
            Self::Proto => T::decode(bytes).map_err(|error| wrong(&error)),
        }
    }

    /// Writes a message.
    ///
    /// # Errors
    /// `internal` when it does not serialise: a fault of ours.
    pub fn encode<T: Reply>(self, message: &T) -> Result<Bytes, ConnectError> {
        match self {
            Self::Json => serde_json::to_vec(message).map(Bytes::from).map_err(|error| {
                ConnectError::internal(format!("cannot write the answer's message: {error}"))
            }),
            Self::Proto => Ok(Bytes::from(message.encode_to_vec())),
        }
    }
}

/// `true` when a request's content type is `wanted`, whatever parameters follow it.
fn is_type(given: &str, wanted: &str) -> bool {
    given.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Code;

    #[derive(Clone, PartialEq, prost::Message, serde::Serialize, serde::Deserialize)]
    #[serde(default)]
    struct Small {
        #[prost(uint32, tag = "1")]
        a: u32,
        #[prost(string, tag = "2")]
        b: String,
    }

    fn small(a: u32) -> Small {
        Small { a, b: String::new() }
    }

    #[test]
    fn unknown_fields_are_let_through_and_wrong_types_are_not() {
        let json = |bytes: &[u8]| Codec::Json.decode::<Small>(bytes);
        assert_eq!(json(br#"{"a":1,"later":[]}"#).unwrap(), small(1));
        assert_eq!(json(b"").unwrap(), small(0));
        for bad in [&b"{"[..], br#"{"a":"x"}"#, b"[1,2]", b"null", b"{} {}"] {
            assert_eq!(json(bad).unwrap_err().code, Code::InvalidArgument, "{bad:?}");
        }

        let proto = |bytes: &[u8]| Codec::Proto.decode::<Small>(bytes);
        // Field 1 is 1; field 15, which nobody knows, is bytes; field 14 is a number.
        assert_eq!(proto(b"\x08\x01\x7a\x02xx\x70\x05").unwrap(), small(1));
        assert_eq!(proto(b"").unwrap(), small(0));
        for bad in [
            // A cut number, a field number of zero, a length beyond the end, another wire type,
            // a number that never ends, text that is not UTF-8.
            &b"\x08"[..],
            b"\x00\x01",
            b"\x12\xff\xff\xff\xff\x0f",
            b"\x0a\x01x",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x12\x01\xff",
        ] {
            assert_eq!(proto(bad).unwrap_err().code, Code::InvalidArgument, "{bad:?}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for codec in Codec::ALL {
            let bytes = codec.encode(&small(7)).unwrap();
            assert_eq!(codec.decode::<Small>(&bytes).unwrap(), small(7));
        }
        assert_eq!(&Codec::Proto.encode(&small(7)).unwrap()[..], b"\x08\x07");
    }

    #[test]
    fn content_types_may_carry_parameters() {
        assert_eq!(Codec::of_unary("application/json"), Some(Codec::Json));
        assert_eq!(Codec::of_unary("Application/JSON; charset=utf-8"), Some(Codec::Json));
        assert_eq!(Codec::of_unary("application/proto"), Some(Codec::Proto));
        assert_eq!(Codec::of_stream("application/connect+proto"), Some(Codec::Proto));
        assert_eq!(Codec::of_unary("application/connect+json"), None);
        assert_eq!(Codec::of_stream("application/json"), None);
        assert_eq!(Codec::of_unary("application/jsonx"), None);
        assert_eq!(Codec::of_unary(""), None);
    }
}
