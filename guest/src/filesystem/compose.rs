//! Several files of the sandbox put together into one: `POST /files/compose`.
//!
//! Called by [`super::files`]. The bytes stay in the kernel. Refuses a source that is the destination
//! or no regular file before it writes anything; the sources go once the destination is in place.

use std::fs::File;
use std::path::{Path, PathBuf};

use http::StatusCode;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use serde::Deserialize;

use super::identity::{self, Kind};
use super::metadata::Metadata;
use super::post::{Written, upload_error};
use super::upload::{self, UploadError};
use super::{files, path};
use crate::http::error::chain;
use crate::http::{Call, HttpError, Response, json, read_bounded};

/// Longest request.
const REQUEST_BYTES_MAX: usize = 1024 * 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Compose {
    source_paths: Vec<String>,
    destination: String,
    username: Option<String>,
}

/// Answers a request.
pub async fn answer(call: Call) -> Result<Response, HttpError> {
    let body = read_bounded(call.request.into_body(), REQUEST_BYTES_MAX).await?;
    let request: Compose = serde_json::from_slice(&body)
        .map_err(|error| HttpError::bad_request(format!("invalid request body: {error}")))?;
    if request.source_paths.is_empty() {
        return Err(HttpError::bad_request("source_paths must not be empty"));
    }
    if request.destination.is_empty() {
        return Err(HttpError::bad_request("destination is required"));
    }
    let user = files::user(&call.sandbox, request.username.as_deref())?;
    let resolve = |given: &str| files::target(&call.sandbox, &user, given);
    let destination = resolve(&request.destination)?;
    let mut sources = Vec::new();
    for given in &request.source_paths {
        let source = resolve(given)?;
        if source == destination {
            return Err(HttpError::bad_request(format!(
                "source path {given:?} cannot be the same as destination"
            )));
        }
        sources.push(source);
    }
    let target = destination.clone();
    let composed = identity::run(&user, Kind::Transfer, move || compose(&sources, &target));
    composed.await.map_err(|error| HttpError::internal(&error))?.map_err(ComposeError::answer)?;
    json(StatusCode::OK, &Written::of(&destination, Metadata::new()))
}

/// Why files were not put together.
#[derive(Debug, thiserror::Error)]
enum ComposeError {
    #[error("source file not found: {0}")]
    NotFound(String),
    #[error("source path is not a regular file: {0}")]
    NotAFile(String),
    #[error("error reading the source '{path}'")]
    Source {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the files are put together, but the source '{path}' cannot be removed")]
    Remove {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Upload(#[from] UploadError),
}

impl ComposeError {
    fn answer(self) -> HttpError {
        let status = match &self {
            Self::Upload(error) => return upload_error(error),
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::NotAFile(_) => StatusCode::BAD_REQUEST,
            Self::Source { source, .. } | Self::Remove { source, .. } => {
                if source.kind() == std::io::ErrorKind::PermissionDenied {
                    StatusCode::FORBIDDEN
                } else {
                    StatusCode::INTERNAL_SERVER_ERROR
                }
            }
        };
        HttpError::new(status, chain(&self))
    }
}

/// Blocks. On a thread of `identity`.
fn compose(sources: &[PathBuf], destination: &Path) -> Result<(), ComposeError> {
    for source in sources {
        open(source)?;
    }
    // One that fails while it is read is not the destination's fault.
    let mut failed = None;
    let put = upload::put(destination, &Metadata::new(), |file| {
        for source in sources {
            let mut opened = open(source).map_err(|error| {
                failed = Some(error);
                UploadError::CutOff(destination.display().to_string())
            })?;
            std::io::copy(&mut opened, file)
                .map_err(|error| UploadError::of(destination, error))?;
        }
        Ok(())
    });
    if let Some(error) = failed {
        return Err(error);
    }
    put?;
    for source in sources {
        match std::fs::remove_file(source) {
            // It may have been named twice.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let path = path::name(source);
                return Err(ComposeError::Remove { path, source: error });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Opens a regular file, and nothing that would be the agent's own or would wait.
fn open(path: &Path) -> Result<File, ComposeError> {
    use rustix::io::Errno;
    let shown = path.display().to_string();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    let file = match opened {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Err(ComposeError::NotFound(shown)),
        Err(Errno::NXIO | Errno::LOOP) => return Err(ComposeError::NotAFile(shown)),
        Err(errno) => return Err(ComposeError::Source { path: shown, source: errno.into() }),
    };
    match file.metadata() {
        Ok(found) if found.is_file() => Ok(file),
        Ok(_) => Err(ComposeError::NotAFile(shown)),
        Err(source) => Err(ComposeError::Source { path: shown, source }),
    }
}
