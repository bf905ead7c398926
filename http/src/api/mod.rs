//! The control plane: E2B's REST endpoints.
//!
//! Called by [`crate::serve`] for every request that is not for a sandbox. Refuses a request without
//! a key, except `GET /health` and the preflights of browsers.

mod create;
mod list;

use http::request::Parts;
use hyper::body::Incoming;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, CONTENT_TYPE, HeaderValue,
};
use hyper::{Method, Request, Response, StatusCode};
use mica_shards::{Host, SandboxInfo, TemplateInfo};
use mica_units::SandboxId;
use mica_wire::api::{Sandbox, SandboxDetail, SandboxState, Template};
use serde::Serialize;

use crate::body::{self, Body};
use crate::config::HttpConfig;
use crate::error::ApiError;
use crate::rfc3339;
use crate::route::{Route, route};
use list::ListQuery;

/// What `clientID` says. Sandbox ids are global, so it means nothing, and SDKs demand it.
const CLIENT_ID: &str = "mica";

/// Answers one request.
pub async fn answer(
    host: &Host,
    config: &HttpConfig,
    request: Request<Incoming>,
) -> Response<Body> {
    if request.method() == Method::OPTIONS {
        return preflight(&request);
    }
    let (parts, body) = request.into_parts();
    let mut body = Some(body);
    let outcome = handle(host, config, &parts, &mut body).await;
    if let Some(unread) = body {
        body::discard(&parts.headers, unread).await;
    }
    outcome.unwrap_or_else(ApiError::into_response)
}

/// Carries one request out. Takes `body` where the route has one.
async fn handle(
    host: &Host,
    config: &HttpConfig,
    request: &Parts,
    body: &mut Option<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let route = route(&request.method, request.uri.path())?;
    if route != Route::Health && !config.keys.admits(&request.headers) {
        return Err(ApiError::unauthorized());
    }
    match route {
        Route::Health => json(StatusCode::OK, &serde_json::json!({ "status": "ok" })),
        Route::Create(version) => {
            let body = read(body, config).await?;
            let wanted = create::create_request(version, &body, &config.limits)?;
            json(StatusCode::CREATED, &sandbox(config, host.create(wanted).await?))
        }
        Route::List(version) => {
            let query = request.uri.query().unwrap_or_default();
            list(host, ListQuery::parse(version, query)?).await
        }
        Route::Get(id) => {
            let info = host.get(sandbox_id(&id)?).await?;
            let token = info.access_token.clone();
            let detail = SandboxDetail { envd_access_token: token, ..detail(info) };
            json(StatusCode::OK, &detail)
        }
        Route::Kill(id) => {
            host.kill(sandbox_id(&id)?).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Route::SetTimeout(id) => {
            let id = sandbox_id(&id)?;
            let body = read(body, config).await?;
            host.set_timeout(id, create::timeout(&body, &config.limits)?).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Route::Connect(version, id) => {
            let id = sandbox_id(&id)?;
            let body = read(body, config).await?;
            let life = create::connect_timeout(version, &body, &config.limits)?;
            json(StatusCode::OK, &sandbox(config, host.extend(id, life).await?))
        }
        Route::Templates => {
            let templates: Vec<_> = host.templates().await?.into_iter().map(template).collect();
            json(StatusCode::OK, &templates)
        }
    }
}

async fn read(body: &mut Option<Incoming>, config: &HttpConfig) -> Result<Vec<u8>, ApiError> {
    match body.take() {
        Some(body) => body::read(body, &config.limits).await,
        None => Ok(Vec::new()),
    }
}

fn sandbox(config: &HttpConfig, info: SandboxInfo) -> Sandbox {
    Sandbox {
        template_id: info.template_id,
        sandbox_id: info.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        envd_version: info.envd_version,
        alias: Some(info.template_name.to_string()),
        envd_access_token: info.access_token,
        domain: config.domain.clone(),
    }
}

async fn list(host: &Host, query: ListQuery) -> Result<Response<Body>, ApiError> {
    let page = query.page(host.list().await?);
    let entries: Vec<_> = page.entries.into_iter().map(detail).collect();
    let mut response = json(StatusCode::OK, &entries)?;
    let headers = response.headers_mut();
    headers.insert("x-total-running", HeaderValue::from(page.total_running));
    if let Some(token) = page.next_token.and_then(|token| HeaderValue::try_from(token).ok()) {
        headers.insert("x-next-token", token);
    }
    Ok(response)
}

/// The id of a path. What E2B calls an id but we never draw is unknown, not invalid.
fn sandbox_id(text: &str) -> Result<SandboxId, ApiError> {
    let id = crate::ids::without_client(text);
    if !crate::ids::is_e2b_id(id) {
        return Err(ApiError::invalid_sandbox_id());
    }
    id.parse().map_err(|_| ApiError::no_such_sandbox(&id.chars().take(64).collect::<String>()))
}

fn detail(info: SandboxInfo) -> SandboxDetail {
    SandboxDetail {
        template_id: info.template_id,
        sandbox_id: info.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        alias: Some(info.template_name.to_string()),
        started_at: rfc3339::format(info.started_at),
        end_at: rfc3339::format(info.end_at),
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        state: SandboxState::Running,
        envd_version: info.envd_version,
        metadata: info.metadata,
        envd_access_token: None,
    }
}

fn template(info: TemplateInfo) -> Template {
    let created_at = rfc3339::format(info.created_at);
    Template {
        build_id: info.id.clone(),
        template_id: info.id,
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        public: true,
        aliases: vec![info.name.to_string()],
        names: vec![info.name.to_string()],
        updated_at: created_at.clone(),
        created_at,
        created_by: None,
        last_spawned_at: info.last_spawned_at.map(rfc3339::format),
        spawn_count: info.spawn_count,
        build_count: 1,
        envd_version: info.envd_version,
        build_status: "ready".to_owned(),
    }
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn json(status: StatusCode, value: &impl Serialize) -> Result<Response<Body>, ApiError> {
    let bytes = serde_json::to_vec(value).map_err(|error| {
        tracing::error!(%error, "an answer does not encode as JSON");
        ApiError::internal()
    })?;
    let mut response = Response::new(Body::full(bytes));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, json);
    Ok(response)
}

/// Browsers ask before they send a key. Anything is allowed: the key is the guard, not the origin.
fn preflight(request: &Request<Incoming>) -> Response<Body> {
    let mut response = status(StatusCode::NO_CONTENT);
    let any = HeaderValue::from_static("*");
    // `*` does not cover Authorization, so what was asked for is named.
    let asked = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.unwrap_or(any));
    let methods = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200"));
    response
}
