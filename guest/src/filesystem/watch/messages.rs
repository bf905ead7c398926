//! The messages of watching, of both codecs: see `process/messages.rs` for how they are written.
//!
//! Called by the service and, for the kinds of events, by the tree. Unknown fields are let through.

use prost::{Enumeration, Message, Oneof};
use serde::{Deserialize, Serialize};

use crate::connect::Nothing;
use crate::connect::json::{Named, Names, or_default};
use crate::filesystem::entry::EntryInfo;

/// `WatchDir` and `CreateWatcher`.
#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WatchRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    pub path: String,
    #[prost(bool, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    pub recursive: bool,
    /// Each event says what the entry is, where it is still there.
    #[prost(bool, tag = "3")]
    #[serde(alias = "include_entry", deserialize_with = "or_default")]
    pub include_entry: bool,
    /// Directories of network file systems are watched too, though not every event is seen there.
    #[prost(bool, tag = "4")]
    #[serde(alias = "allow_network_mounts", deserialize_with = "or_default")]
    pub allow_network_mounts: bool,
}

/// What can happen; the names are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum EventType {
    Unspecified = 0,
    Create = 1,
    Write = 2,
    Remove = 3,
    Rename = 4,
    Chmod = 5,
}

impl Named for EventType {
    const NAMES: &'static [(Self, &'static str)] = &[
        (Self::Unspecified, "EVENT_TYPE_UNSPECIFIED"),
        (Self::Create, "EVENT_TYPE_CREATE"),
        (Self::Write, "EVENT_TYPE_WRITE"),
        (Self::Remove, "EVENT_TYPE_REMOVE"),
        (Self::Rename, "EVENT_TYPE_RENAME"),
        (Self::Chmod, "EVENT_TYPE_CHMOD"),
    ];
}

/// One thing that happened.
#[derive(Clone, PartialEq, Message, Serialize)]
pub struct FilesystemEvent {
    /// Relative to the watched directory.
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(enumeration = "EventType", tag = "2")]
    #[serde(rename = "type", with = "Names::<EventType>")]
    pub kind: i32,
    #[prost(message, optional, boxed, tag = "3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<Box<EntryInfo>>,
}

/// What `WatchDir` streams.
#[derive(Clone, PartialEq, Message, Serialize)]
pub struct WatchReply {
    #[prost(oneof = "WatchEvent", tags = "1, 2, 3")]
    #[serde(flatten)]
    pub event: Option<WatchEvent>,
}

/// One message of the stream.
#[derive(Clone, PartialEq, Oneof, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum WatchEvent {
    /// From here on nothing is missed.
    #[prost(message, tag = "1")]
    Start(Nothing),
    #[prost(message, tag = "2")]
    Filesystem(FilesystemEvent),
    #[prost(message, tag = "3")]
    Keepalive(Nothing),
}

impl From<WatchEvent> for WatchReply {
    fn from(event: WatchEvent) -> Self {
        Self { event: Some(event) }
    }
}

/// A watcher's name: the answer of `CreateWatcher`, and the request of what is done with it.
#[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WatcherId {
    #[prost(string, tag = "1")]
    #[serde(alias = "watcher_id", deserialize_with = "or_default")]
    pub watcher_id: String,
}

/// The answer of `GetWatcherEvents`.
#[derive(Clone, PartialEq, Message, Serialize)]
pub struct EventsReply {
    #[prost(message, repeated, tag = "1")]
    pub events: Vec<FilesystemEvent>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Codec;

    #[test]
    fn messages_are_the_protocols() {
        let event = FilesystemEvent { name: "a/b".into(), kind: 4, entry: None };
        let reply = WatchReply::from(WatchEvent::Filesystem(event));
        assert_eq!(
            serde_json::to_string(&reply).unwrap(),
            r#"{"filesystem":{"name":"a/b","type":"EVENT_TYPE_RENAME"}}"#
        );
        assert_eq!(&Codec::Proto.encode(&reply).unwrap()[..], b"\x12\x07\x0a\x03a/b\x10\x04");
        let start = WatchReply::from(WatchEvent::Start(Nothing {}));
        assert_eq!(serde_json::to_string(&start).unwrap(), r#"{"start":{}}"#);
        assert_eq!(&Codec::Proto.encode(&start).unwrap()[..], b"\x0a\0");
        let text = br#"{"path":"/x","recursive":true,"includeEntry":true,"later":1}"#;
        let from_json: WatchRequest = Codec::Json.decode(text).unwrap();
        let from_proto: WatchRequest = Codec::Proto.decode(b"\x0a\x02/x\x10\x01\x18\x01").unwrap();
        assert_eq!(from_json, from_proto);
        let nulls =
            br#"{"path":null,"recursive":null,"includeEntry":null,"allowNetworkMounts":null}"#;
        assert_eq!(Codec::Json.decode::<WatchRequest>(nulls).unwrap(), WatchRequest::default());
        let null = br#"{"watcherId":null}"#;
        assert_eq!(Codec::Json.decode::<WatcherId>(null).unwrap(), WatcherId::default());
        let id: WatcherId = Codec::Json.decode(br#"{"watcherId":"w1"}"#).unwrap();
        assert_eq!(id.watcher_id, "w1");
    }
}
