//! The upload: `POST /files`.
//!
//! Called by [`super::files`]. Refuses what is neither multipart nor plain bytes, codings other than
//! gzip, metadata that cannot be kept, and an upload that stands still for [`STILL_MAX`]. Nothing of
//! a file is gathered in memory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::encoding::Gunzip;
use super::files::{self, CHUNKS_AHEAD, text};
use super::identity::{self, IdentityError, Kind};
use super::metadata::{self, Metadata};
use super::multipart::{Piece, Splitter};
use super::path;
use super::upload::{self, Chunk, UploadError};
use crate::http::body::RequestBody;
use crate::http::error::chain;
use crate::http::{Call, HttpError, Query, Response, json};
use crate::sandbox::Sandbox;
use crate::users::User;

/// An upload that sends nothing for so long is given up.
const STILL_MAX: Duration = Duration::from_secs(300);

/// One file of the answer to an upload.
#[derive(Debug, Serialize)]
pub struct Written {
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Metadata::is_empty")]
    metadata: Metadata,
}

impl Written {
    /// The file at `path`.
    pub fn of(path: &Path, metadata: Metadata) -> Self {
        let (shown, name) = (path.display().to_string(), path::name(path));
        Self { path: shown, name, kind: "file", metadata }
    }
}

/// Answers an upload.
pub async fn answer(call: Call) -> Result<Response, HttpError> {
    let Call { sandbox, query, request, .. } = call;
    let (head, body) = request.into_parts();
    let body = RequestBody::new(body);
    let mut source = Source { body, gunzip: None, input: Bytes::new() };
    json(StatusCode::OK, &receive(&sandbox, &query, &head.headers, &mut source).await?)
}

async fn receive(
    sandbox: &Sandbox,
    query: &Query,
    headers: &HeaderMap,
    source: &mut Source,
) -> Result<Vec<Written>, HttpError> {
    let user = files::user(sandbox, query.get("username"))?;
    let metadata = metadata::from_headers(headers)
        .map_err(|error| HttpError::bad_request(error.to_string()))?;
    source.gunzip = match text(headers, header::CONTENT_ENCODING).unwrap_or("identity").trim() {
        "gzip" => Some(Gunzip::new()),
        "" | "identity" => None,
        other => {
            return Err(HttpError::bad_request(format!(
                "error decompressing request body: unsupported Content-Encoding: {other}, \
                 supported: [gzip]"
            )));
        }
    };
    let resolve = |given: &str| files::target(sandbox, &user, given);
    let receiver = Receiver { user: user.clone(), metadata };
    let content_type = text(headers, header::CONTENT_TYPE).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    match (media_type.as_str(), query.get("path")) {
        ("application/octet-stream", Some(given)) => raw(source, &receiver, resolve(given)?).await,
        ("application/octet-stream", None) => {
            Err(HttpError::bad_request("path query parameter is required for raw body upload"))
        }
        (kind, given) if kind.starts_with("multipart/") => {
            let splitter = Splitter::new(content_type)
                .map_err(|error| HttpError::bad_request(error.to_string()))?;
            parts(source, splitter, &receiver, given, &resolve).await
        }
        _ => Err(HttpError::bad_request(format!(
            "unsupported content type: {content_type}, expected multipart/form-data or \
             application/octet-stream"
        ))),
    }
}

/// Whose files an upload makes, and with what.
struct Receiver {
    user: User,
    metadata: Metadata,
}

async fn raw(
    source: &mut Source,
    receiver: &Receiver,
    path: PathBuf,
) -> Result<Vec<Written>, HttpError> {
    let mut file = Receiving::start(receiver, path);
    while let Some(data) = source.next().await? {
        file.put(data).await?;
    }
    Ok(vec![file.end().await?])
}

async fn parts(
    source: &mut Source,
    mut splitter: Splitter,
    receiver: &Receiver,
    given: Option<&str>,
    resolve: &impl Fn(&str) -> Result<PathBuf, HttpError>,
) -> Result<Vec<Written>, HttpError> {
    let bad = |error: super::multipart::MultipartError| HttpError::bad_request(error.to_string());
    let mut written: Vec<Written> = Vec::new();
    let mut open: Option<Receiving> = None;
    while let Some(data) = source.next().await? {
        splitter.push(&data);
        while let Some(piece) = splitter.next_piece().map_err(bad)? {
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
                    open = Some(Receiving::start(receiver, path));
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
    body: RequestBody,
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
}

/// A file that is being written.
struct Receiving {
    path: PathBuf,
    metadata: Metadata,
    chunks: mpsc::Sender<Chunk>,
    work: JoinHandle<Result<Result<(), UploadError>, IdentityError>>,
}

impl Receiving {
    fn start(receiver: &Receiver, path: PathBuf) -> Self {
        let (chunks, mut received) = mpsc::channel(CHUNKS_AHEAD);
        let (user, target) = (receiver.user.clone(), path.clone());
        let metadata = receiver.metadata.clone();
        let kept = metadata.clone();
        let work = tokio::spawn(async move {
            let work = move || upload::receive(&target, &kept, &mut received);
            identity::run(&user, Kind::Transfer, work).await
        });
        Self { path, metadata, chunks, work }
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
        Ok(Written::of(&self.path, self.metadata))
    }
}

/// The answer to an upload that failed.
pub fn upload_error(error: &UploadError) -> HttpError {
    let status = match error {
        UploadError::Directory(_)
        | UploadError::NotAFile(_)
        | UploadError::Path(_)
        | UploadError::NoMetadata(_)
        | UploadError::CutOff(_) => StatusCode::BAD_REQUEST,
        UploadError::Denied(_) => StatusCode::FORBIDDEN,
        UploadError::NoSpace(_) => StatusCode::INSUFFICIENT_STORAGE,
        UploadError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    HttpError::new(status, chain(error))
}
