//! The decoders of the front end, as functions of what a stranger sends.
//!
//! Called by the fuzz targets in `tests/fuzz`, and compiled for them alone. Refuses nothing itself: an
//! answer is fine whatever it is, and a panic, a hang or a broken rule is the finding.

use bytes::BytesMut;
use hyper::{HeaderMap, Method, Uri, Version};
use mica_units::SandboxId;

use crate::api::fuzzing as api;
use crate::proxy::answer::{BodyReader, HeadReader};
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
        Target::ControlPlane | Target::SignedFile | Target::TokenHolder => Ok(None),
        Target::Sandbox(id, port) | Target::Shared(id, port) | Target::Path(id, port, _) => {
            Ok(Some((id, port.get())))
        }
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

/// What was read of an answer.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    /// The status and the fields, once the head is whole.
    pub head: Option<(u16, HeaderMap)>,
    /// Whether the stream may carry another answer.
    pub may_go_on: bool,
    /// The content, as far as it came.
    pub content: Vec<u8>,
    /// The fields behind it.
    pub trailers: Option<HeaderMap>,
    /// How many bytes stood behind its end, if it came.
    pub behind: Option<usize>,
    /// Whether it was refused.
    pub is_refused: bool,
}

/// The answer of a server in a sandbox that comes in pieces of `step` bytes. `to_head`: one to a `HEAD`.
#[must_use]
pub fn answer(bytes: &[u8], step: usize, to_head: bool) -> Answer {
    let mut read = Answer::default();
    read.is_refused = take_answer(bytes, step.max(1), to_head, &mut read).is_none();
    read
}

fn take_answer(bytes: &[u8], step: usize, to_head: bool, read: &mut Answer) -> Option<()> {
    let (mut head, mut body, mut content) = (HeadReader::new(to_head), None, BytesMut::new());
    let mut behind = 0;
    let taken = bytes.chunks(step).try_for_each(|piece| {
        let mut rest = Vec::new();
        let piece = if body.is_some() {
            piece
        } else {
            let Some((whole, early)) = head.take(piece).ok()? else { return Some(()) };
            read.head = Some((whole.status.as_u16(), whole.fields));
            read.may_go_on = whole.may_go_on;
            body = Some(BodyReader::new(whole.framing));
            rest.extend_from_slice(&early);
            rest.as_slice()
        };
        let taken = body.as_mut()?.take(piece, &mut content).ok()?;
        behind += piece.len() - taken;
        Some(())
    });
    read.content = content.to_vec();
    taken?;
    let body = body.as_mut()?;
    body.close().ok()?;
    (read.trailers, read.behind) = (body.trailers(), Some(behind));
    Some(())
}
