//! Bytes to wire types to shards: E2B's REST endpoints and the sandbox proxy, on every shard.
//!
//! Called by the binary, which runs [`serve`] once on each shard. Refuses to hold any state that
//! outlives a connection: what a sandbox is, its shard knows.
//!
//! ```text
//!  conn    one connection: hyper, deadlines, the answers hyper does not give
//!   └ serve   whom is it for? ──▶ api    control plane: route, key, body ──▶ TenantHost ──▶ Host
//!                            └──▶ proxy  stream into a guest, bodies both ways ──▶ Host::connect
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod api;
mod body;
mod builds;
mod config;
mod conn;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod ids;
mod keys;
mod openapi;
mod ops;
mod percent;
mod proxy;
mod rfc3339;
mod route;
mod serve;
mod snapshot_name;
mod tenant;
mod ui;

pub use config::{HttpConfig, Limits, Tls};
pub use keys::{ApiKey, KeyError, KeyGrant, KeyHash, KeyLimits, Keys};
pub use ops::families;
pub use rfc3339::{format as rfc3339, parse as parse_rfc3339};
pub use serve::{ListenError, serve};
