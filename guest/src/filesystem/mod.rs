//! Files of the sandbox: the RPC service `filesystem.Filesystem` and the route `/files`.
//!
//! Called by the agent, which adds the routes to the router of port 49983. Every file operation
//! runs on a thread of its own ([`identity`]) that may do what root may, and whose new files and
//! directories are the requesting user's; nothing here checks permissions itself. Refuses what would
//! grow without bound: listings, watchers, queued events.
//!
//! ```text
//!  rpc ─────▶ operations ─▶ entry      unary: stat, list, make, move, remove
//!   └──▶ watch ─▶ tree ────▶ entry     inotify ──events──▶ stream, or a queue to be asked for
//!  files ───▶ download ─▶ conditional  GET:  thread ──chunks──▶ body
//!        ├──▶ post ──▶ upload          POST: body ──chunks──▶ thread, temporary name, rename
//!        └──▶ compose ─▶ upload        POST: several files into one
//!  entry, upload ──▶ metadata          extended attributes
//! ```

mod compose;
mod conditional;
mod download;
mod encoding;
mod entry;
mod files;
mod identity;
mod metadata;
pub mod multipart;
mod operations;
mod path;
mod post;
mod range;
mod rpc;
mod time;
mod upload;
mod watch;

pub use time::rfc3339;

use crate::http::{HttpError, Router};

/// Adds the file routes and the filesystem service.
pub fn register(router: &mut Router) {
    files::add_routes(router);
    rpc::add_methods(router);
}

/// As how many of the service's requests the bytes can be read: see [`crate::untrusted`].
pub(crate) fn decodes(codec: crate::connect::Codec, data: &[u8]) -> usize {
    rpc::decodes(codec, data) + watch::decodes(codec, data)
}

/// Bytes in the parts of a body with the boundary `fuzz` that comes in pieces of `step`.
pub(crate) fn multipart_bytes(body: &[u8], step: usize) -> Result<usize, HttpError> {
    let bad = |error: multipart::MultipartError| HttpError::bad_request(error.to_string());
    let mut splitter =
        multipart::Splitter::new("multipart/form-data; boundary=fuzz").map_err(bad)?;
    let mut bytes = 0;
    for piece in body.chunks(step) {
        splitter.push(piece);
        while let Some(piece) = splitter.next_piece().map_err(bad)? {
            if let multipart::Piece::Data(data) = piece {
                bytes += data.len();
            }
        }
    }
    splitter.finish().map_err(bad)?;
    Ok(bytes)
}

/// Whether the headers of a request to `/files` could be answered.
pub(crate) fn accepts(headers: &http::HeaderMap) -> bool {
    let validators = conditional::Validators { etag: "\"1\"", modified: 1 };
    let conditions = conditional::Conditions::of(headers);
    if let conditional::Verdict::Send(Some(range)) = conditions.check(validators)
        && range::parse(range, 10) == range::Part::Unsatisfiable
    {
        return false;
    }
    let encoding = files::text(headers, http::header::ACCEPT_ENCODING).unwrap_or("");
    encoding::accepted(encoding).is_some() && metadata::from_headers(headers).is_ok()
}
