//! Files of the sandbox: the RPC service `filesystem.Filesystem` and the route `/files`.
//!
//! Called by the agent, which adds the routes to the router of port 49983. Every file operation
//! runs on a thread of its own that has become the requesting user ([`identity`]), so the kernel
//! decides what that user may do; nothing here checks permissions itself. Refuses watching, which
//! is answered `unimplemented`.
//!
//! ```text
//!  rpc ─────▶ operations ─▶ entry      unary: stat, list, make, move, remove
//!  files ───▶ download                 GET:  thread ──chunks──▶ body
//!        └──▶ upload ─▶ multipart      POST: body ──chunks──▶ thread, temporary name, rename
//! ```

mod download;
mod encoding;
mod entry;
mod files;
mod identity;
mod multipart;
mod operations;
mod path;
mod range;
mod rpc;
mod time;
mod upload;

pub use time::rfc3339;

use crate::http::Router;

/// Adds the file routes and the filesystem service.
pub fn register(router: &mut Router) {
    files::add_routes(router);
    rpc::add_methods(router);
}
