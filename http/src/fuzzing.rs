//! The decoders of the front end, as functions of what a stranger sends.
//!
//! Called by the fuzz targets in `tests/fuzz`, and compiled for them alone. Refuses nothing itself: an
//! answer is fine whatever it is, and a panic, a hang or a broken rule is the finding.

use hyper::{HeaderMap, Method, Uri, Version};
use mica_units::SandboxId;

use crate::api::fuzzing as api;
use crate::proxy::target::Target;
use crate::{percent, proxy, route as routes};

/// The sandbox and the port that a request is for; `None` for the host itself.
///
/// # Errors
/// The status that the client is answered with.
pub fn target(
    version: Version,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    domain: Option<&str>,
) -> Result<Option<(SandboxId, u16)>, u16> {
    let target = proxy::target::target(version, method, uri, headers, domain);
    match target.map_err(|error| error.to_body().code)? {
        Target::ControlPlane | Target::SignedFile => Ok(None),
        Target::Sandbox(id, port) | Target::Path(id, port, _) => Ok(Some((id, port.get()))),
    }
}

/// Whether a path is one of the control plane's.
pub fn route(method: &Method, path: &str) -> bool {
    routes::route(method, path).is_ok()
}

/// Whether a path is a route of the agent that no client may use.
pub fn is_internal(path: &str) -> bool {
    proxy::is_internal(path)
}

/// Whether a query asks for a list of sandboxes.
pub fn list_query(query: &str) -> bool {
    api::list_query(query)
}

/// Whether a query asks for a list of snapshots.
pub fn snapshot_query(query: &str) -> bool {
    api::snapshot_query(query)
}

/// A query, taken apart.
pub fn query_pairs(query: &str) -> Option<Vec<(String, String)>> {
    percent::query_pairs(query).ok()
}

/// One segment of a path.
pub fn decode_segment(text: &str) -> Option<String> {
    percent::decode_segment(text).ok()
}
