//! `PUT /build-files/{token}`: a file for a COPY step.
//!
//! Called by the API without a key: the token is the right to upload one file, once. Refuses a body without
//! a length, over the limit, or that stops coming. What is in it nobody here looks at.

use std::time::Duration;

use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::CONTENT_LENGTH;
use hyper::{Response, StatusCode};
use mica_shards::rt::{self, time};
use mica_shards::{BuildStore, BuildStoreError, Host, Upload};

use crate::body::Body;
use crate::config::Limits;
use crate::error::ApiError;

/// Bytes that are written at once.
const PIECE_BYTES: usize = 1 << 20;
/// How long a client may pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Takes one upload.
///
/// # Errors
/// 404 for a link that does not work, 411, 413; 400 for a body that is cut off.
pub async fn take(
    host: &Host,
    limits: &Limits,
    request: &Parts,
    token: &str,
    body: &mut Option<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let bytes = length(request, limits)?;
    let asked = token.to_owned();
    let grant = host.with_builds(move |builds| Ok(builds.grant_of(&asked)?)).await??;
    let unknown =
        || ApiError::not_found("this upload link does not work any more; ask for another");
    let grant = grant.ok_or_else(unknown)?;
    let tenant_bytes_max = limits.upload_tenant_bytes_max;
    let begin = move |builds: &BuildStore| builds.begin_upload(&grant, bytes, tenant_bytes_max);
    let mut taking = Taking { host: host.clone(), upload: Some(host.with_builds(begin).await??) };
    let body = body.take().ok_or_else(ApiError::internal)?;
    receive(&mut taking, body, bytes).await?;
    let upload = taking.upload.take().ok_or_else(ApiError::internal)?;
    let token = token.to_owned();
    host.with_builds(move |builds| {
        upload.finish()?;
        Ok(builds.end_grant(&token)?)
    })
    .await??;
    Ok(Response::new(Body::empty()))
}

fn length(request: &Parts, limits: &Limits) -> Result<u64, ApiError> {
    let bytes = request.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let bytes: Option<u64> = bytes.and_then(|text| text.parse().ok());
    match bytes {
        None => Err(ApiError::with_status(
            StatusCode::LENGTH_REQUIRED,
            "an upload needs a Content-Length",
        )),
        Some(bytes) if bytes > limits.upload_bytes_max => {
            let most = limits.upload_bytes_max;
            let text = format!(
                "a file of {bytes} bytes is more than the {most} this host takes; copy less"
            );
            Err(ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, text))
        }
        Some(bytes) => Ok(bytes),
    }
}

/// A file on its way. Dropped early, it is removed by a thread that may block.
struct Taking {
    host: Host,
    upload: Option<Upload>,
}

impl Drop for Taking {
    fn drop(&mut self) {
        let Some(upload) = self.upload.take() else { return };
        let host = self.host.clone();
        rt::spawn(async move {
            let removed = host.with_builds(move |_| {
                drop(upload);
                Ok(())
            });
            if let Err(error) = removed.await {
                tracing::debug!(%error, "an upload was removed on its shard");
            }
        })
        .detach();
    }
}

impl Taking {
    async fn write(&mut self, bytes: Vec<u8>) -> Result<(), ApiError> {
        let mut upload = self.upload.take().ok_or_else(ApiError::internal)?;
        let write = move |_: &BuildStore| {
            let written = upload.write(&bytes);
            Ok((upload, written))
        };
        let (upload, written) = self.host.with_builds(write).await??;
        self.upload = Some(upload);
        Ok(written.map_err(BuildStoreError::from)?)
    }
}

/// Writes a body as it comes, and no faster.
async fn receive(taking: &mut Taking, mut body: Incoming, bytes: u64) -> Result<(), ApiError> {
    let mut piece = Vec::new();
    let mut left = bytes;
    loop {
        let frame = time::timeout(PAUSE_MAX, body.frame()).await;
        let frame = frame.map_err(|_| ApiError::body_too_slow())?;
        let done = frame.is_none();
        if let Some(frame) = frame {
            let frame = frame.map_err(|error| {
                ApiError::bad_request(format!("the upload was cut off ({error}); send it whole"))
            })?;
            let data = frame.into_data().unwrap_or_default();
            left = left.saturating_sub(u64::try_from(data.len()).unwrap_or(u64::MAX));
            piece.extend_from_slice(&data);
        }
        if piece.len() >= PIECE_BYTES || done && !piece.is_empty() {
            taking.write(std::mem::take(&mut piece)).await?;
        }
        if done {
            break;
        }
    }
    if left > 0 {
        return Err(ApiError::bad_request("the upload ended early; send it whole"));
    }
    Ok(())
}
