//! RPC handlers on the router: content type, codec, deadline and errors in one place.
//!
//! Called by the services to register their methods. Refuses a content type of no codec (415) and
//! lets nothing but the protocol's own error forms out.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use mica_wire::guest::InitRequest;
use tokio::time::Instant;

use super::stream::{self, Pace};
use super::{Code, Codec, ConnectError, Json, MESSAGE_BYTES_MAX, Message, StreamSender};
use super::{codec, envelope};
use crate::http::{Access, Call, HttpError, Response, Router, access, full, read_bounded};
use crate::sandbox::Sandbox;
use crate::users::{User, UserError};

/// Between keepalives when the client names no interval.
const KEEPALIVE_SECONDS: u64 = 90;

/// What a handler knows of its call besides the message.
#[derive(Clone, Debug)]
pub struct Context {
    /// The sandbox.
    pub sandbox: Arc<Sandbox>,
    /// Who it was when the call came.
    pub identity: Arc<InitRequest>,
    /// The request's headers.
    pub headers: HeaderMap,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
}

impl Context {
    /// Whom the client wants to be.
    ///
    /// # Errors
    /// [`UserError`], which converts into the RPC's error.
    pub fn user(&self) -> Result<User, UserError> {
        self.sandbox.user(access::basic_user(&self.headers).as_deref())
    }

    /// `true` for the old Python client that fails on fields it does not know.
    #[must_use]
    pub fn is_legacy_sdk(&self) -> bool {
        self.headers.get(header::USER_AGENT).is_some_and(|agent| agent == "connect-python")
    }
}

/// Registers a unary method, as `package.Service/Method`.
pub fn unary<Req, Res, F, Fut>(router: &mut Router, method: &str, handler: F)
where
    Req: Message,
    Res: Message,
    F: Fn(Context, Req) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ConnectError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    router.add(Method::POST, &format!("/{method}"), Access::Token, move |call| {
        let handler = Arc::clone(&handler);
        async move {
            if !has_type(&call, Json::UNARY) {
                return Ok(unsupported(Json::UNARY));
            }
            Ok(answer_unary(call, &*handler).await.unwrap_or_else(|error| unary_error(&error)))
        }
    });
}

async fn answer_unary<Req, Res, F, Fut>(call: Call, handler: &F) -> Result<Response, ConnectError>
where
    Req: Message,
    Res: Message,
    F: Fn(Context, Req) -> Fut,
    Fut: Future<Output = Result<Res, ConnectError>>,
{
    let context = context(&call);
    let deadline = context.deadline;
    let work = async move {
        let body = read(call).await?;
        handler(context, Json.decode(&body)?).await
    };
    let message = match deadline {
        Some(at) => tokio::time::timeout_at(at, work).await.map_err(|_| {
            ConnectError::new(Code::DeadlineExceeded, "context deadline exceeded")
        })??,
        None => work.await?,
    };
    Ok(reply(StatusCode::OK, Json::UNARY, full(Json.encode(&message)?)))
}

/// Registers a method that streams its answer. `keepalive` is the message that fills silence.
///
/// The handler runs as a task of its own: it sees a client that goes away as a failed send or
/// through [`StreamSender::closed`], and is never cut off in the middle.
pub fn server_stream<Req, Res, F, Fut>(
    router: &mut Router,
    method: &str,
    keepalive: Option<fn() -> Res>,
    handler: F,
) where
    Req: Message,
    Res: Message,
    F: Fn(Context, Req, StreamSender<Res>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), ConnectError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    router.add(Method::POST, &format!("/{method}"), Access::Token, move |call| {
        let handler = Arc::clone(&handler);
        async move {
            if !has_type(&call, Json::STREAM) {
                return Ok(unsupported(Json::STREAM));
            }
            let answered = answer_stream(call, keepalive, &*handler).await;
            let mut response = answered.unwrap_or_else(|error| {
                reply(StatusCode::OK, Json::STREAM, full(envelope::end(Some(&error))))
            });
            // Tells nginx and its like to pass each frame on as it comes.
            response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
            Ok(response)
        }
    });
}

async fn answer_stream<Req, Res, F, Fut>(
    call: Call,
    keepalive: Option<fn() -> Res>,
    handler: &F,
) -> Result<Response, ConnectError>
where
    Req: Message,
    Res: Message,
    F: Fn(Context, Req, StreamSender<Res>) -> Fut,
    Fut: Future<Output = Result<(), ConnectError>> + Send + 'static,
{
    let context = context(&call);
    let pace = Pace {
        keepalive: match keepalive {
            Some(message) => Some(envelope::message(&Json.encode(&message())?)),
            None => None,
        },
        every: keepalive_interval(&context.headers),
        deadline: context.deadline,
    };
    let body = read(call).await?;
    let message = Json.decode(envelope::single(&body)?)?;
    let (sender, done, body) = stream::stream(pace);
    let running = handler(context, message, sender);
    tokio::spawn(async move {
        // The receiver is gone when the client is; then nobody wants the outcome.
        drop(done.send(running.await));
    });
    Ok(reply(StatusCode::OK, Json::STREAM, body.boxed_unsync()))
}

async fn read(call: Call) -> Result<bytes::Bytes, ConnectError> {
    read_bounded(call.request.into_body(), MESSAGE_BYTES_MAX).await.map_err(|error: HttpError| {
        let too_large = error.status() == StatusCode::PAYLOAD_TOO_LARGE;
        let code = if too_large { Code::ResourceExhausted } else { Code::InvalidArgument };
        ConnectError::new(code, error.to_string())
    })
}

fn context(call: &Call) -> Context {
    let headers = call.request.headers().clone();
    let deadline = number(&headers, "connect-timeout-ms")
        .filter(|ms| *ms > 0)
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
    Context {
        sandbox: Arc::clone(&call.sandbox),
        identity: Arc::clone(&call.identity),
        headers,
        deadline,
    }
}

fn keepalive_interval(headers: &HeaderMap) -> Duration {
    let seconds = number(headers, "keepalive-ping-interval").filter(|seconds| *seconds > 0);
    // A day is as good as for ever, and a timer can hold it.
    Duration::from_secs(seconds.unwrap_or(KEEPALIVE_SECONDS).min(86_400))
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

fn has_type(call: &Call, wanted: &str) -> bool {
    let given = call.request.headers().get(header::CONTENT_TYPE);
    given.and_then(|value| value.to_str().ok()).is_some_and(|given| codec::is_type(given, wanted))
}

fn unsupported(wanted: &'static str) -> Response {
    let mut response = crate::http::status(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    response.headers_mut().insert("accept-post", HeaderValue::from_static(wanted));
    response
}

fn unary_error(error: &ConnectError) -> Response {
    // A code and a string always serialise.
    let bytes = serde_json::to_vec(error).unwrap_or_default();
    reply(error.code.status(), Json::UNARY, full(bytes))
}

/// The content type stands alone: with a charset behind it, clients refuse a stream.
fn reply(status: StatusCode, content_type: &'static str, body: crate::http::Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let value = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}
