//! The routes of port 49999.
//!
//! Called by the agent, which gives the router. Refuses bodies over [`BODY_BYTES_MAX`] and requests
//! that name both a context and a language. Errors are plain text, as the SDKs show them.
//!
//! `GET /health` is 200 `"OK"` while the default kernel can run a cell, and 503 with the reason
//! while it starts or could not be started.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ::http::{HeaderValue, Method, StatusCode, header};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::contexts::{ContextError, Interpreter};
use super::events::Event;
use super::session::State;
use crate::http::{Access, Call, HttpError, Response, Router, channel, full, json, read_bounded};

/// Longest request body: a cell and its variables.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest request for a new context. Anyone may ask for one, without the sandbox's token.
const CREATE_BYTES_MAX: usize = 16 * 1024;

/// A stream that has been silent this long says that it is alive.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);

/// Lines that may wait in the connection; the session gathers the rest.
const LINES_AHEAD: usize = 16;

#[derive(Debug, Deserialize)]
struct ExecuteRequest {
    code: String,
    context_id: Option<String>,
    language: Option<String>,
    env_vars: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
struct CreateRequest {
    language: Option<String>,
    cwd: Option<String>,
}

/// Adds the interpreter's routes.
pub fn add_routes(router: &mut Router, interpreter: &Arc<Interpreter>) {
    let held = || Arc::clone(interpreter);
    let it = held();
    router.add(Method::GET, "/health", Access::Open, move |_| {
        let answer = health(&it);
        async move { answer }
    });
    let it = held();
    router.add(Method::POST, "/execute", Access::Token, move |call| execute(Arc::clone(&it), call));
    let it = held();
    router.add(Method::GET, "/contexts", Access::Open, move |_| {
        let list = it.list();
        async move { json(StatusCode::OK, &list) }
    });
    let it = held();
    router.add(Method::POST, "/contexts", Access::Open, move |call| create(Arc::clone(&it), call));
    let it = held();
    router.add(Method::DELETE, "/contexts/{}", Access::Open, move |call: Call| {
        let removed = call.params.first().map_or(Ok(()), |id| it.remove(id));
        async move { done(removed) }
    });
    let it = held();
    router.add(Method::POST, "/contexts/{}/restart", Access::Open, move |call: Call| {
        let it = Arc::clone(&it);
        async move {
            let id = call.params.first().map_or("", String::as_str);
            done(it.restart(id).await)
        }
    });
}

fn health(interpreter: &Interpreter) -> Result<Response, HttpError> {
    match interpreter.default_state() {
        State::Ready => json(StatusCode::OK, &"OK"),
        State::Starting => {
            Ok(text(StatusCode::SERVICE_UNAVAILABLE, "the Python kernel is starting"))
        }
        State::Failed(reason) => Ok(text(
            StatusCode::SERVICE_UNAVAILABLE,
            &format!("the Python kernel did not start: {reason}"),
        )),
    }
}

async fn execute(interpreter: Arc<Interpreter>, call: Call) -> Result<Response, HttpError> {
    let body = read_bounded(call.request.into_body(), BODY_BYTES_MAX).await?;
    let request: ExecuteRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return Ok(malformed(&error)),
    };
    if request.context_id.is_some() && request.language.is_some() {
        return Ok(text(
            StatusCode::BAD_REQUEST,
            "Only one of context_id or language can be provided",
        ));
    }
    if let Some(name) = request.env_vars.iter().flat_map(BTreeMap::keys).find(|name| unfit(name)) {
        return Ok(text(
            StatusCode::BAD_REQUEST,
            &format!("'{name}' cannot be the name of an environment variable"),
        ));
    }
    let events = interpreter.execute(
        request.code,
        request.env_vars.unwrap_or_default(),
        request.context_id.as_deref(),
        request.language.as_deref(),
    );
    match events {
        Ok(events) => Ok(stream(events)),
        Err(error) => Ok(refused(&error)),
    }
}

/// `os.environ` raises on these, and then none of the variables would be set.
fn unfit(name: &str) -> bool {
    name.is_empty() || name.contains('=') || name.contains('\0')
}

fn stream(mut events: mpsc::Receiver<Event>) -> Response {
    let (sender, body) = channel(LINES_AHEAD);
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                // The receiver is dropped with this task, and that is what interrupts the cell.
                () = sender.closed() => return,
                event = timeout(KEEPALIVE_EVERY, events.recv()) => event,
            };
            let event = match event {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(_) => Event::Keepalive,
            };
            if sender.send(event.line()).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn create(interpreter: Arc<Interpreter>, call: Call) -> Result<Response, HttpError> {
    let body = read_bounded(call.request.into_body(), CREATE_BYTES_MAX).await?;
    let request = if body.is_empty() {
        CreateRequest::default()
    } else {
        match serde_json::from_slice(&body) {
            Ok(request) => request,
            Err(error) => return Ok(malformed(&error)),
        }
    };
    match interpreter.create(request.language.as_deref(), request.cwd.as_deref()).await {
        Ok(info) => json(StatusCode::OK, &info),
        Err(error) => Ok(refused(&error)),
    }
}

fn done(outcome: Result<(), ContextError>) -> Result<Response, HttpError> {
    match outcome {
        Ok(()) => json(StatusCode::OK, &serde_json::Value::Null),
        Err(error) => Ok(refused(&error)),
    }
}

fn refused(error: &ContextError) -> Response {
    let status = match error {
        ContextError::NotFound(_) => StatusCode::NOT_FOUND,
        ContextError::Language { .. } | ContextError::Cwd(_) => StatusCode::BAD_REQUEST,
        ContextError::TooMany | ContextError::Busy => StatusCode::TOO_MANY_REQUESTS,
        ContextError::Kernel(_) | ContextError::User(_) | ContextError::Id(_) => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    text(status, &error.to_string())
}

fn malformed(error: &serde_json::Error) -> Response {
    text(StatusCode::BAD_REQUEST, &format!("the request body is not in form: {error}"))
}

fn text(status: StatusCode, message: &str) -> Response {
    let mut response = Response::new(full(message.to_owned()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
