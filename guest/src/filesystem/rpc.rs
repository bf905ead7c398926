//! `filesystem.Filesystem` on the router.
//!
//! Called by the agent through [`super::register`]. Refuses watching (`unimplemented`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::entry::EntryInfo;
use super::identity::{self, Kind};
use super::{operations, path};
use crate::connect::json::uint32;
use crate::connect::{Code, ConnectError, Context, StreamSender, server_stream, unary};
use crate::http::Router;
use crate::http::error::chain;
use crate::users::User;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct PathRequest {
    path: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct ListRequest {
    path: String,
    #[serde(with = "uint32")]
    depth: u32,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct MoveRequest {
    source: String,
    destination: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct EntryReply {
    entry: EntryInfo,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct ListReply {
    entries: Vec<EntryInfo>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Empty {}

/// Adds the methods.
pub fn add_methods(router: &mut Router) {
    unary(
        router,
        "filesystem.Filesystem/Stat",
        |context: Context, request: PathRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let entry = as_user(&user, move || operations::stat(&path)).await?;
            Ok(EntryReply { entry: entry.for_client(context.is_legacy_sdk()) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/MakeDir",
        |context: Context, request: PathRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let entry = as_user(&user, move || operations::make_dir(&path)).await?;
            Ok(EntryReply { entry: entry.for_client(context.is_legacy_sdk()) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/Move",
        |context: Context, request: MoveRequest| async move {
            let user = context.user()?;
            let from = target(&context, &request.source)?;
            let to = target(&context, &request.destination)?;
            let entry = as_user(&user, move || operations::rename(&from, &to)).await?;
            Ok(EntryReply { entry: entry.for_client(context.is_legacy_sdk()) })
        },
    );
    unary(
        router,
        "filesystem.Filesystem/ListDir",
        |context: Context, request: ListRequest| async move {
            let (user, path) = (context.user()?, target(&context, &request.path)?);
            let listed = as_user(&user, move || operations::list(&path, request.depth)).await?;
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
            as_user(&user, move || operations::remove(&path)).await?;
            Ok(Empty {})
        },
    );
    for method in ["CreateWatcher", "GetWatcherEvents", "RemoveWatcher"] {
        let method = format!("filesystem.Filesystem/{method}");
        unary(router, &method, |_: Context, _: serde_json::Value| async move {
            Err::<Empty, _>(no_watching())
        });
    }
    let none: Option<fn() -> Empty> = None;
    server_stream(
        router,
        "filesystem.Filesystem/WatchDir",
        none,
        |_: Context, _: serde_json::Value, _: StreamSender<Empty>| async move { Err(no_watching()) },
    );
}

fn no_watching() -> ConnectError {
    ConnectError::new(Code::Unimplemented, "watching directories is not implemented in this agent")
}

fn target(context: &Context, given: &str) -> Result<PathBuf, ConnectError> {
    let user = context.user()?;
    path::resolve(&context.sandbox, &user, given)
        .map_err(|error| ConnectError::invalid_argument(error.to_string()))
}

async fn as_user<T, F>(user: &User, work: F) -> Result<T, ConnectError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, ConnectError> + Send + 'static,
{
    identity::run(user, Kind::Operation, work)
        .await
        .map_err(|error| ConnectError::internal(chain(&error)))?
}
