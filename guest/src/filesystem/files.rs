//! The routes below `/files`, and the download.
//!
//! Called by the agent through [`super::register`]. Refuses unknown users (401), paths that
//! cannot be (400), and codings that it does not have (406). Nothing of a file is gathered in
//! memory: chunks go through channels of [`CHUNKS_AHEAD`].

use std::path::{Path, PathBuf};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::conditional::Conditions;
use super::download::{self, DownloadError, Head, Wanted};
use super::encoding::{self, Encoding};
use super::identity::{self, IdentityError, Kind};
use super::range::Part;
use super::{compose, path, post, time};
use crate::http::error::chain;
use crate::http::{Access, Call, FileAction, HttpError, Response, Router, channel, empty};
use crate::sandbox::Sandbox;
use crate::users::{User, UserError};

/// Chunks between the connection and the thread that reads or writes the file.
pub const CHUNKS_AHEAD: usize = 4;

/// Adds the routes.
pub fn add_routes(router: &mut Router) {
    let read = Access::TokenOrSignature(FileAction::Read);
    router.add(Method::GET, "/files", read, get);
    let write = Access::TokenOrSignature(FileAction::Write);
    router.add(Method::POST, "/files", write, post::answer);
    router.add(Method::POST, "/files/compose", Access::Token, compose::answer);
}

/// The user that a request names, or the template's.
pub fn user(sandbox: &Sandbox, named: Option<&str>) -> Result<User, HttpError> {
    sandbox.user(named).map_err(|error| match error {
        UserError::Unknown(_) => HttpError::unauthorized(error.to_string()),
        UserError::Read { .. } => HttpError::internal(&error),
    })
}

/// The path that a request means.
pub fn target(sandbox: &Sandbox, user: &User, given: &str) -> Result<PathBuf, HttpError> {
    path::resolve(sandbox, user, given).map_err(|error| HttpError::bad_request(error.to_string()))
}

/// A header as text.
pub fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

async fn get(call: Call) -> Result<Response, HttpError> {
    let user = user(&call.sandbox, call.query.get("username"))?;
    let path = target(&call.sandbox, &user, call.query.get("path").unwrap_or(""))?;
    let headers = call.request.headers();
    let accepts = text(headers, header::ACCEPT_ENCODING).unwrap_or("");
    let (encoding, identity) = (encoding::accepted(accepts), encoding::takes_identity(accepts));
    let Some(encoding) = encoding else {
        return Err(HttpError::new(
            StatusCode::NOT_ACCEPTABLE,
            "no acceptable encoding found, supported: [identity, gzip]",
        ));
    };
    let conditions = Conditions::of(headers);
    let gzip = encoding == Encoding::Gzip && !conditions.any();
    let wanted = Wanted { conditions, gzip, identity };
    let (body_sender, body) = channel(CHUNKS_AHEAD);
    let (head_sender, head) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let sent = path.clone();
    let sending = tokio::spawn(async move {
        let work = move || download::send(&sent, &wanted, head_sender, body_sender, &runtime);
        identity::run(&user, Kind::Transfer, work).await
    });
    let head = match head.await {
        Ok(Ok(head)) => head,
        Ok(Err(error)) => return Ok(download_error(&error)),
        Err(_) => return Err(gone_wrong(sending).await),
    };
    if head.is_unmodified {
        return Ok(unmodified(&head));
    }
    let mut response = if head.size == Some(0) && head.part == Part::Whole {
        // The length of an empty body must be told, and a stream's is not known.
        Response::new(empty())
    } else {
        Response::new(body)
    };
    describe(&mut response, &path, &head);
    Ok(response)
}

/// The thread went away without a head: why.
async fn gone_wrong(work: JoinHandle<Result<(), IdentityError>>) -> HttpError {
    match work.await {
        Ok(Err(error)) => HttpError::internal(&error),
        Ok(Ok(())) => HttpError::internal(&IdentityError::Stopped),
        Err(error) => HttpError::internal(&error),
    }
}

fn download_error(error: &DownloadError) -> Response {
    let status = match error {
        DownloadError::NotFound(_) => StatusCode::NOT_FOUND,
        DownloadError::Directory(_) | DownloadError::NotAFile(_) => StatusCode::BAD_REQUEST,
        DownloadError::Denied(_) => StatusCode::FORBIDDEN,
        DownloadError::Condition(_) => StatusCode::PRECONDITION_FAILED,
        DownloadError::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
        DownloadError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = HttpError::new(status, chain(error)).into_response();
    if let DownloadError::Range { size } = error {
        set(&mut response, header::CONTENT_RANGE, &format!("bytes */{size}"));
    }
    response
}

/// 304: nothing but what tells the file apart.
fn unmodified(head: &Head) -> Response {
    let mut response = crate::http::status(StatusCode::NOT_MODIFIED);
    validate(&mut response, head);
    response
}

fn validate(response: &mut Response, head: &Head) {
    if let Some(etag) = head.etag.as_ref().filter(|_| !head.is_gzip) {
        set(response, header::ETAG, etag);
    }
    set(response, header::VARY, "Accept-Encoding");
    set(response, header::LAST_MODIFIED, &time::http_date(head.modified));
}

fn describe(response: &mut Response, path: &Path, head: &Head) {
    let length = match (head.part, head.size) {
        (Part::Range { first, last }, Some(size)) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let range = format!("bytes {first}-{last}/{size}");
            set(response, header::CONTENT_RANGE, &range);
            Some(last - first + 1)
        }
        (_, size) => size.filter(|_| !head.is_gzip),
    };
    if let Some(length) = length {
        set(response, header::CONTENT_LENGTH, &length.to_string());
    }
    if head.is_gzip {
        set(response, header::CONTENT_ENCODING, "gzip");
    } else {
        set(response, header::ACCEPT_RANGES, "bytes");
    }
    validate(response, head);
    set(response, header::CONTENT_TYPE, content_type(path));
    set(response, header::CONTENT_DISPOSITION, &disposition(&path::name(path)));
}

fn set(response: &mut Response, name: header::HeaderName, value: &str) {
    // All values here are made of printable ASCII.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// `inline; filename=name`, or the extended form for names that need it.
fn disposition(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    if name.bytes().all(plain) {
        return format!("inline; filename={name}");
    }
    let encoded: String = name
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    format!("inline; filename*=utf-8''{encoded}")
}

fn content_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
    match extension.to_ascii_lowercase().as_str() {
        "txt" | "log" | "md" | "py" | "rs" | "sh" | "toml" | "yaml" | "yml" => {
            "text/plain; charset=utf-8"
        }
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" => "application/json",
        "xml" => "text/xml; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "pdf" => "application/pdf",
        "zip" => "application/zip",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_when_they_must_be() {
        assert_eq!(disposition("a-b.txt"), "inline; filename=a-b.txt");
        assert_eq!(
            disposition("a b\"\r\nx: é"),
            "inline; filename*=utf-8''a%20b%22%0D%0Ax%3A%20%C3%A9"
        );
    }

    #[test]
    fn types_come_from_the_name() {
        assert_eq!(content_type(Path::new("/x/a.PNG")), "image/png");
        assert_eq!(content_type(Path::new("/x.png/a")), "application/octet-stream");
    }
}
