//! RPC handlers on the router: content type, codec, deadline and errors in one place.
//!
//! Called by the services to register their methods: one handler each, whatever the codec. Refuses a
//! content type of no codec (415), compression, another version of the protocol, and lets nothing
//! but the protocol's own error forms out.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming as Body;
use mica_wire::guest::InitRequest;
use tokio::time::Instant;

use super::envelope;
use super::stream::{self, Pace};
use super::{Code, Codec, ConnectError, Incoming, MESSAGE_BYTES_MAX, Reply, Request, StreamSender};
use crate::http::body::RequestBody;
use crate::http::{Access, Call, HttpError, Response, Router, access, full, read_bounded};
use crate::sandbox::Sandbox;
use crate::users::{User, UserError};

/// Between keepalives when the client names no interval.
const KEEPALIVE_SECONDS: u64 = 90;

/// Most digits of `Connect-Timeout-Ms`, by the protocol.
const TIMEOUT_DIGITS_MAX: usize = 10;

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
        is_legacy_sdk(&self.headers)
    }
}

fn is_legacy_sdk(headers: &HeaderMap) -> bool {
    headers.get(header::USER_AGENT).is_some_and(|agent| agent == "connect-python")
}

/// Registers a unary method, as `package.Service/Method`.
pub fn unary<Req, Res, F, Fut>(router: &mut Router, method: &str, handler: F)
where
    Req: Request,
    Res: Reply,
    F: Fn(Context, Req) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ConnectError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    router.add(Method::POST, &format!("/{method}"), Access::Token, move |call| {
        let handler = Arc::clone(&handler);
        async move {
            let Some(codec) = Codec::of_unary(content_type(&call)) else {
                return Ok(unsupported(call, Codec::UNARY_TYPES));
            };
            let is_legacy = is_legacy_sdk(call.request.headers());
            let answered = answer_unary(call, codec, &*handler).await;
            let response = answered.unwrap_or_else(|error| unary_error(&error));
            Ok(marked(response, is_legacy))
        }
    });
}

async fn answer_unary<Req, Res, F, Fut>(
    call: Call,
    codec: Codec,
    handler: &F,
) -> Result<Response, ConnectError>
where
    Req: Request,
    Res: Reply,
    F: Fn(Context, Req) -> Fut,
    Fut: Future<Output = Result<Res, ConnectError>>,
{
    let (context, body) = admit(call, header::CONTENT_ENCODING.as_str())?;
    let deadline = context.deadline;
    let work = async move {
        let body = read(body).await?;
        handler(context, codec.decode(&body)?).await
    };
    let message = until(deadline, work).await?;
    Ok(reply(StatusCode::OK, codec.unary_type(), full(codec.encode(&message)?)))
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
    Req: Request,
    Res: Reply,
    F: Fn(Context, Req, StreamSender<Res>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), ConnectError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    router.add(Method::POST, &format!("/{method}"), Access::Token, move |call| {
        let handler = Arc::clone(&handler);
        async move {
            let Some(codec) = Codec::of_stream(content_type(&call)) else {
                return Ok(unsupported(call, Codec::STREAM_TYPES));
            };
            let is_legacy = is_legacy_sdk(call.request.headers());
            let answered = answer_stream(call, codec, keepalive, &*handler).await;
            Ok(marked(answered.unwrap_or_else(|error| stream_error(codec, &error)), is_legacy))
        }
    });
}

async fn answer_stream<Req, Res, F, Fut>(
    call: Call,
    codec: Codec,
    keepalive: Option<fn() -> Res>,
    handler: &F,
) -> Result<Response, ConnectError>
where
    Req: Request,
    Res: Reply,
    F: Fn(Context, Req, StreamSender<Res>) -> Fut,
    Fut: Future<Output = Result<(), ConnectError>> + Send + 'static,
{
    let (context, body) = admit(call, "connect-content-encoding")?;
    let pace = Pace {
        keepalive: match keepalive {
            Some(message) => Some(envelope::message(&codec.encode(&message())?)),
            None => None,
        },
        every: keepalive_interval(&context.headers),
        deadline: context.deadline,
    };
    let body = until(context.deadline, read(body)).await?;
    let message = codec.decode(&envelope::single(&body)?)?;
    let (sender, done, body) = stream::stream(codec, pace);
    let running = handler(context, message, sender);
    tokio::spawn(async move {
        // The receiver is gone when the client is; then nobody wants the outcome.
        drop(done.send(running.await));
    });
    Ok(stream_reply(codec, body.boxed_unsync()))
}

/// Registers a method whose client streams and which answers once. The handler is cut off when the
/// client goes away or its deadline passes.
pub fn client_stream<Req, Res, F, Fut>(router: &mut Router, method: &str, handler: F)
where
    Req: Request,
    Res: Reply,
    F: Fn(Context, Incoming<Req>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ConnectError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    router.add(Method::POST, &format!("/{method}"), Access::Token, move |call| {
        let handler = Arc::clone(&handler);
        async move {
            let Some(codec) = Codec::of_stream(content_type(&call)) else {
                return Ok(unsupported(call, Codec::STREAM_TYPES));
            };
            let is_legacy = is_legacy_sdk(call.request.headers());
            let answered = answer_client_stream(call, codec, &*handler).await;
            Ok(marked(answered.unwrap_or_else(|error| stream_error(codec, &error)), is_legacy))
        }
    });
}

async fn answer_client_stream<Req, Res, F, Fut>(
    call: Call,
    codec: Codec,
    handler: &F,
) -> Result<Response, ConnectError>
where
    Req: Request,
    Res: Reply,
    F: Fn(Context, Incoming<Req>) -> Fut,
    Fut: Future<Output = Result<Res, ConnectError>>,
{
    let (context, body) = admit(call, "connect-content-encoding")?;
    let incoming = Incoming::new(body, codec);
    let message = until(context.deadline, handler(context, incoming)).await?;
    let frames = [envelope::message(&codec.encode(&message)?), envelope::end(None)].concat();
    Ok(stream_reply(codec, full(frames)))
}

/// Gives `work` up at the deadline.
async fn until<T>(
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let Some(at) = deadline else { return work.await };
    let too_late = |_| ConnectError::new(Code::DeadlineExceeded, "context deadline exceeded");
    tokio::time::timeout_at(at, work).await.map_err(too_late)?
}

async fn read(body: Body) -> Result<bytes::Bytes, ConnectError> {
    read_bounded(body, MESSAGE_BYTES_MAX).await.map_err(|error: HttpError| {
        let too_large = error.status() == StatusCode::PAYLOAD_TOO_LARGE;
        let code = if too_large { Code::ResourceExhausted } else { Code::InvalidArgument };
        ConnectError::new(code, error.to_string())
    })
}

/// What a call is about, and its body; `encoding` names the header of the messages' coding.
fn admit(call: Call, encoding: &str) -> Result<(Context, Body), ConnectError> {
    let checked = check_protocol(call.request.headers(), encoding).and_then(|()| context(&call));
    let body = call.request.into_body();
    match checked {
        Ok(context) => Ok((context, body)),
        Err(error) => {
            drop(RequestBody::new(body));
            Err(error)
        }
    }
}

/// Refuses a protocol version other than ours and messages in a coding, named by `encoding`.
fn check_protocol(headers: &HeaderMap, encoding: &str) -> Result<(), ConnectError> {
    if let Some(version) = headers.get("connect-protocol-version")
        && version != "1"
    {
        let text = format!("connect-protocol-version must be \"1\": got {version:?}");
        return Err(ConnectError::invalid_argument(text));
    }
    match headers.get(encoding) {
        Some(coding) if coding != "identity" && !coding.is_empty() => Err(ConnectError::new(
            Code::Unimplemented,
            format!("{encoding}: {coding:?} is not understood; send {encoding}: identity"),
        )),
        _ => Ok(()),
    }
}

fn context(call: &Call) -> Result<Context, ConnectError> {
    let headers = call.request.headers().clone();
    let deadline = timeout(&headers)?.and_then(|limit| Instant::now().checked_add(limit));
    Ok(Context {
        sandbox: Arc::clone(&call.sandbox),
        identity: Arc::clone(&call.identity),
        headers,
        deadline,
    })
}

/// `Connect-Timeout-Ms`; 0 is no limit, as it is to E2B.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, ConnectError> {
    let Some(value) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let digits = value.as_bytes();
    let is_number = digits.iter().all(u8::is_ascii_digit) && !digits.is_empty();
    match number(headers, "connect-timeout-ms") {
        Some(ms) if is_number && digits.len() <= TIMEOUT_DIGITS_MAX => {
            Ok(Some(Duration::from_millis(ms)).filter(|limit| !limit.is_zero()))
        }
        _ => Err(ConnectError::invalid_argument(format!(
            "Connect-Timeout-Ms: {value:?} is not a number of at most {TIMEOUT_DIGITS_MAX} digits"
        ))),
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

fn content_type(call: &Call) -> &str {
    let given = call.request.headers().get(header::CONTENT_TYPE);
    given.and_then(|value| value.to_str().ok()).unwrap_or("")
}

fn unsupported(call: Call, wanted: &'static str) -> Response {
    drop(RequestBody::new(call.request.into_body()));
    let mut response = crate::http::status(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    response.headers_mut().insert("accept-post", HeaderValue::from_static(wanted));
    response
}

/// JSON, whatever the codec.
fn unary_error(error: &ConnectError) -> Response {
    // A code and a string always serialise.
    let bytes = serde_json::to_vec(error).unwrap_or_default();
    reply(error.code.status(), Codec::Json.unary_type(), full(bytes))
}

fn stream_error(codec: Codec, error: &ConnectError) -> Response {
    stream_reply(codec, full(envelope::end(Some(error))))
}

fn stream_reply(codec: Codec, body: crate::http::Body) -> Response {
    let mut response = reply(StatusCode::OK, codec.stream_type(), body);
    // Tells nginx and its like to pass each frame on as it comes.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Tells the old Python client that what it does not know was left out.
fn marked(mut response: Response, is_legacy: bool) -> Response {
    if is_legacy {
        response.headers_mut().insert("x-e2b-legacy-sdk", HeaderValue::from_static("true"));
    }
    response
}

/// The content type stands alone: with a charset behind it, clients refuse a stream.
fn reply(status: StatusCode, content_type: &'static str, body: crate::http::Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let value = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn a_timeout_is_a_number_of_milliseconds() {
        let of = |value| timeout(&headers("connect-timeout-ms", value)).map_err(|e| e.code);
        assert_eq!(timeout(&HeaderMap::new()), Ok(None));
        assert_eq!(of("0"), Ok(None));
        assert_eq!(of("1500"), Ok(Some(Duration::from_millis(1500))));
        assert_eq!(of("9999999999"), Ok(Some(Duration::from_millis(9_999_999_999))));
        for bad in ["", "-1", "+1", "1s", "12345678901"] {
            assert_eq!(of(bad), Err(Code::InvalidArgument), "{bad}");
        }
    }

    #[test]
    fn keepalives_come_at_the_clients_interval() {
        let of = |value| keepalive_interval(&headers("keepalive-ping-interval", value)).as_secs();
        assert_eq!(keepalive_interval(&HeaderMap::new()).as_secs(), 90);
        assert_eq!((of("50"), of("0"), of("x"), of("999999999")), (50, 90, 90, 86_400));
    }

    #[test]
    fn other_versions_and_codings_are_refused() {
        let of = |name, value| {
            check_protocol(&headers(name, value), "content-encoding").map_err(|error| error.code)
        };
        assert_eq!(of("connect-protocol-version", "1"), Ok(()));
        assert_eq!(of("connect-protocol-version", "2"), Err(Code::InvalidArgument));
        assert_eq!(of("content-encoding", "identity"), Ok(()));
        assert_eq!(of("content-encoding", "gzip"), Err(Code::Unimplemented));
        assert_eq!(of("connect-content-encoding", "gzip"), Ok(()), "is for streams");
    }
}
