//! The route `/files`: download and upload.
//!
//! Called by the agent through [`super::register`]. Refuses unknown users (401), paths that
//! cannot be (400), codings that it does not have (406), and an upload that stands still for
//! [`STILL_MAX`]. Nothing of a file is gathered in memory: chunks go through channels of
//! [`CHUNKS_AHEAD`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::download::{self, DownloadError, Head, Wanted};
use super::encoding::{self, Encoding, Gunzip};
use super::identity::{self, IdentityError, Kind};
use super::multipart::{Piece, Splitter};
use super::range::Part;
use super::upload::{self, Chunk, UploadError};
use super::{path, time};
use crate::http::error::chain;
use crate::http::{Access, Call, FileAction, HttpError, Response, Router, channel, empty, json};
use crate::users::{User, UserError};

/// Chunks between the connection and the thread that reads or writes the file.
const CHUNKS_AHEAD: usize = 4;

/// An upload that sends nothing for so long is given up.
const STILL_MAX: Duration = Duration::from_secs(300);

/// How much of an upload is still read after it has failed, so that the client gets to read why.
const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// One file of the answer to an upload.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
}

/// Adds the routes.
pub fn add_routes(router: &mut Router) {
    let read = Access::TokenOrSignature(FileAction::Read);
    router.add(Method::GET, "/files", read, get);
    let write = Access::TokenOrSignature(FileAction::Write);
    router.add(Method::POST, "/files", write, post);
}

fn user(call: &Call) -> Result<User, HttpError> {
    call.sandbox.user(call.query.get("username")).map_err(|error| match error {
        UserError::Unknown(_) => HttpError::unauthorized(error.to_string()),
        UserError::Read { .. } => HttpError::internal(&error),
    })
}

fn target(call: &Call, user: &User, given: &str) -> Result<PathBuf, HttpError> {
    path::resolve(&call.sandbox, user, given)
        .map_err(|error| HttpError::bad_request(error.to_string()))
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

async fn get(call: Call) -> Result<Response, HttpError> {
    let user = user(&call)?;
    let path = target(&call, &user, call.query.get("path").unwrap_or(""))?;
    let headers = call.request.headers();
    let encoding = encoding::accepted(text(headers, header::ACCEPT_ENCODING).unwrap_or(""));
    let Some(encoding) = encoding else {
        return Err(HttpError::new(
            StatusCode::NOT_ACCEPTABLE,
            "no acceptable encoding found, supported: [identity, gzip]",
        ));
    };
    let wanted = Wanted {
        range: text(headers, header::RANGE).map(str::to_owned),
        gzip: encoding == Encoding::Gzip,
    };
    let (body_sender, body) = channel(CHUNKS_AHEAD);
    let (head_sender, head) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let sent = path.clone();
    let sending = tokio::spawn(async move {
        let work = move || download::send(&sent, &wanted, head_sender, body_sender, &runtime);
        identity::run(&user, Kind::Transfer, work).await
    });
    let head = match head.await {
        Ok(head) => head.map_err(|error| download_error(&error))?,
        Err(_) => return Err(gone_wrong(sending).await),
    };
    let mut response = if head.size == Some(0) && head.part == Part::Whole {
        // The length of an empty body must be told, and a stream's is not known.
        Response::new(empty())
    } else {
        Response::new(body)
    };
    describe(&mut response, &path, head);
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

fn download_error(error: &DownloadError) -> HttpError {
    let status = match error {
        DownloadError::NotFound(_) => StatusCode::NOT_FOUND,
        DownloadError::Directory(_) | DownloadError::NotAFile(_) => StatusCode::BAD_REQUEST,
        DownloadError::Denied(_) => StatusCode::FORBIDDEN,
        DownloadError::Range { .. } => StatusCode::RANGE_NOT_SATISFIABLE,
        DownloadError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    HttpError::new(status, chain(error))
}

fn describe(response: &mut Response, path: &Path, head: Head) {
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
    set(response, header::VARY, "Accept-Encoding");
    set(response, header::LAST_MODIFIED, &time::http_date(head.modified));
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

async fn post(call: Call) -> Result<Response, HttpError> {
    let user = user(&call)?;
    let given = call.query.get("path").map(str::to_owned);
    let headers = call.request.headers();
    let gunzip = match text(headers, header::CONTENT_ENCODING).unwrap_or("identity").trim() {
        "gzip" => Some(Gunzip::new()),
        "" | "identity" => None,
        other => {
            return Err(HttpError::bad_request(format!(
                "error decompressing request body: unsupported Content-Encoding: {other}, \
                 supported: [gzip]"
            )));
        }
    };
    let content_type = text(headers, header::CONTENT_TYPE).unwrap_or("").to_owned();
    let media_type = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    let resolve = {
        let (sandbox, user) = (call.sandbox.clone(), user.clone());
        move |given: &str| {
            path::resolve(&sandbox, &user, given)
                .map_err(|error| HttpError::bad_request(error.to_string()))
        }
    };
    let mut source = Source { body: call.request.into_body(), gunzip, input: Bytes::new() };
    let written = match media_type.as_str() {
        "application/octet-stream" => match given {
            Some(given) => raw(&mut source, &user, resolve(&given)?).await,
            None => {
                Err(HttpError::bad_request("path query parameter is required for raw body upload"))
            }
        },
        "multipart/form-data" => {
            let splitter = Splitter::new(&content_type)
                .map_err(|error| HttpError::bad_request(error.to_string()))?;
            parts(&mut source, splitter, &user, given.as_deref(), &resolve).await
        }
        _ => Err(HttpError::bad_request(format!(
            "unsupported content type: {content_type}, expected multipart/form-data or \
             application/octet-stream"
        ))),
    };
    match written {
        Ok(written) => json(StatusCode::OK, &written),
        Err(error) => {
            source.drain().await;
            Err(error)
        }
    }
}

async fn raw(source: &mut Source, user: &User, path: PathBuf) -> Result<Vec<Written>, HttpError> {
    let mut file = Receiving::start(user, path);
    while let Some(data) = source.next().await? {
        file.put(data).await?;
    }
    Ok(vec![file.end().await?])
}

async fn parts(
    source: &mut Source,
    mut splitter: Splitter,
    user: &User,
    given: Option<&str>,
    resolve: &impl Fn(&str) -> Result<PathBuf, HttpError>,
) -> Result<Vec<Written>, HttpError> {
    let bad = |error: super::multipart::MultipartError| HttpError::bad_request(error.to_string());
    let mut written: Vec<Written> = Vec::new();
    let mut open: Option<Receiving> = None;
    while let Some(data) = source.next().await? {
        splitter.push(&data);
        while let Some(piece) = splitter.next().map_err(bad)? {
            match piece {
                // Fields of other names are not files.
                Piece::Begin(head) if head.name.as_deref() != Some("file") => {}
                Piece::Begin(head) => {
                    let Some(named) = given.or(head.filename.as_deref()) else {
                        return Err(HttpError::bad_request(
                            "a file has neither a filename nor a path query parameter",
                        ));
                    };
                    let path = resolve(named)?;
                    let shown = path.display().to_string();
                    if written.iter().any(|file| file.path == shown) {
                        return Err(HttpError::bad_request(format!(
                            "you cannot upload multiple files to the same path '{shown}' in one \
                             upload request, only the first specified file was uploaded"
                        )));
                    }
                    open = Some(Receiving::start(user, path));
                }
                Piece::Data(data) => {
                    if let Some(file) = &mut open {
                        file.put(data).await?;
                    }
                }
                Piece::End => {
                    if let Some(file) = open.take() {
                        written.push(file.end().await?);
                    }
                }
                Piece::Done => {}
            }
        }
    }
    splitter.finish().map_err(bad)?;
    Ok(written)
}

/// The body of an upload, decoded.
struct Source {
    body: Incoming,
    gunzip: Option<Gunzip>,
    /// What came in and is not decoded yet.
    input: Bytes,
}

impl Source {
    async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        let broken = |error: std::io::Error| {
            HttpError::bad_request(format!("error decompressing request body: {error}"))
        };
        loop {
            if let Some(gunzip) = self.gunzip.as_mut().filter(|_| !self.input.is_empty()) {
                let output = gunzip.decode(&mut self.input).map_err(broken)?;
                if !output.is_empty() {
                    return Ok(Some(output));
                }
                continue;
            }
            match (self.read().await?, &mut self.gunzip) {
                (Some(data), Some(_)) => self.input = data,
                (Some(data), None) => return Ok(Some(data)),
                (None, Some(gunzip)) => {
                    let rest = gunzip.finish().map_err(broken)?;
                    self.gunzip = None;
                    return Ok(Some(rest).filter(|rest| !rest.is_empty()));
                }
                (None, None) => return Ok(None),
            }
        }
    }

    async fn read(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            let frame = match timeout(STILL_MAX, self.body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    let text = format!("the upload was cut off: {}", chain(&error));
                    return Err(HttpError::bad_request(text));
                }
                Err(_) => {
                    let seconds = STILL_MAX.as_secs();
                    let text = format!("the upload has sent nothing for {seconds} s");
                    return Err(HttpError::new(StatusCode::REQUEST_TIMEOUT, text));
                }
            };
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }

    /// Reads on for a while. A connection that is closed with bytes unread is reset, and takes
    /// the answer with it.
    async fn drain(&mut self) {
        let read_on = async {
            let mut left = DRAIN_BYTES_MAX;
            while let Ok(Some(data)) = self.read().await {
                left = left.saturating_sub(data.len());
                if left == 0 {
                    return;
                }
            }
        };
        // Too slow is as good as too much: the connection is closed either way.
        timeout(DRAIN_TIME_MAX, read_on).await.unwrap_or_default();
    }
}

/// A file that is being written.
struct Receiving {
    path: PathBuf,
    chunks: mpsc::Sender<Chunk>,
    work: JoinHandle<Result<Result<(), UploadError>, IdentityError>>,
}

impl Receiving {
    fn start(user: &User, path: PathBuf) -> Self {
        let (chunks, mut receiver) = mpsc::channel(CHUNKS_AHEAD);
        let (user, target) = (user.clone(), path.clone());
        let work = tokio::spawn(async move {
            let work = move || upload::receive(&target, &mut receiver);
            identity::run(&user, Kind::Transfer, work).await
        });
        Self { path, chunks, work }
    }

    async fn put(&mut self, data: Bytes) -> Result<(), HttpError> {
        if self.chunks.send(Chunk::Data(data)).await.is_ok() {
            return Ok(());
        }
        // The thread has stopped, and its outcome says why.
        Err(match self.outcome().await {
            Err(error) => error,
            Ok(()) => HttpError::internal(&IdentityError::Stopped),
        })
    }

    async fn outcome(&mut self) -> Result<(), HttpError> {
        match (&mut self.work).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(upload_error(&error)),
            Ok(Err(error)) => Err(HttpError::internal(&error)),
            Err(error) => Err(HttpError::internal(&error)),
        }
    }

    async fn end(mut self) -> Result<Written, HttpError> {
        // When the thread has stopped already, its outcome says why.
        drop(self.chunks.send(Chunk::End).await);
        self.outcome().await?;
        Ok(Written {
            path: self.path.display().to_string(),
            name: path::name(&self.path),
            kind: "file",
        })
    }
}

fn upload_error(error: &UploadError) -> HttpError {
    let status = match error {
        UploadError::Directory(_)
        | UploadError::NotAFile(_)
        | UploadError::Path(_)
        | UploadError::CutOff(_) => StatusCode::BAD_REQUEST,
        UploadError::Denied(_) => StatusCode::FORBIDDEN,
        UploadError::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
        UploadError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    HttpError::new(status, chain(error))
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
