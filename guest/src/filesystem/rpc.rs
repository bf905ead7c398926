//! `filesystem.Filesystem` on the router.
//!
//! Called by the agent through [`super::register`]. Refuses what [`operations`] and [`watch`] refuse.

use std::path::PathBuf;

use prost::Message;
use serde::{Deserialize, Serialize};

use super::entry::EntryInfo;
use super::identity::{self, Kind};
use super::{operations, path, watch};
use crate::connect::json::{or_default, uint32};
use crate::connect::{ConnectError, Context, Nothing, unary};
use crate::http::Router;
use crate::http::error::chain;
use crate::users::User;

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct PathRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    path: String,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct ListRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    path: String,
    #[prost(uint32, tag = "2")]
    #[serde(with = "uint32")]
    depth: u32,
}

#[derive(Clone, PartialEq, Message, Deserialize)]
#[serde(default)]
struct MoveRequest {
    #[prost(string, tag = "1")]
    #[serde(deserialize_with = "or_default")]
    source: String,
    #[prost(string, tag = "2")]
    #[serde(deserialize_with = "or_default")]
    destination: String,
}

#[derive(Clone, PartialEq, Message, Serialize)]
struct EntryReply {
    #[prost(message, optional, tag = "1")]
    entry: Option<EntryInfo>,
}

#[derive(Clone, PartialEq, Message, Serialize)]
struct ListReply {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<EntryInfo>,
}

/// Adds the methods.
pub fn add_methods(router: &mut Router) {
    unary(
        router,
        "filesystem.Filesystem/Stat",
        |context: Context, request: PathRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let entry = for_user(&user, move || operations::stat(&path)).await?;
            Ok(EntryReply { entry: Some(entry.for_client(context.is_legacy_sdk())) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/MakeDir",
        |context: Context, request: PathRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let entry = for_user(&user, move || operations::make_dir(&path)).await?;
            Ok(EntryReply { entry: Some(entry.for_client(context.is_legacy_sdk())) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/Move",
        |context: Context, request: MoveRequest| async move {
            let user = context.user()?;
            let from = target(&context, &request.source)?;
            let to = target(&context, &request.destination)?;
            let entry = for_user(&user, move || operations::rename(&from, &to)).await?;
            Ok(EntryReply { entry: Some(entry.for_client(context.is_legacy_sdk())) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/ListDir",
        |context: Context, request: ListRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let listed = for_user(&user, move || operations::list(&path, request.depth)).await?;
            let is_legacy = context.is_legacy_sdk();
            let entries = listed.into_iter().map(|entry| entry.for_client(is_legacy)).collect();
            Ok(ListReply { entries })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/Remove",
        |context: Context, request: PathRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            for_user(&user, move || operations::remove(&path)).await?;
            Ok(Nothing {})
        },
    );
    watch::add_methods(router);
}

pub(super) fn target(context: &Context, given: &str) -> Result<PathBuf, ConnectError> {
    let user = context.user()?;
    path::resolve(&context.sandbox, &user, given)
        .map_err(|error| ConnectError::invalid_argument(error.to_string()))
}

pub(super) async fn for_user<T, F>(user: &User, work: F) -> Result<T, ConnectError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, ConnectError> + Send + 'static,
{
    identity::run(user, Kind::Operation, work)
        .await
        .map_err(|error| ConnectError::internal(chain(&error)))?
}

/// As how many of these requests the bytes can be read.
pub(super) fn decodes(codec: crate::connect::Codec, data: &[u8]) -> usize {
    use crate::untrusted::decodes;
    decodes::<PathRequest>(codec, data)
        + decodes::<ListRequest>(codec, data)
        + decodes::<MoveRequest>(codec, data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{Codec, Request};

    fn is_default<T: Request + PartialEq>(text: &str) -> bool {
        Codec::Json.decode::<T>(text.as_bytes()).unwrap() == T::default()
    }

    #[test]
    fn null_is_the_default_of_every_field() {
        assert!(is_default::<PathRequest>(r#"{"path":null}"#));
        assert!(is_default::<ListRequest>(r#"{"path":null,"depth":null}"#));
        assert!(is_default::<MoveRequest>(r#"{"source":null,"destination":null}"#));
    }
}
