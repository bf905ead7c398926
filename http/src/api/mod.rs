//! The control plane: E2B's REST endpoints.
//!
//! Called by [`crate::serve`] for every request that is not for a sandbox. Refuses a request without
//! a key, except `GET /health`, `GET /openapi.json`, the files of the dashboard and the preflights of browsers.

mod create;
pub mod json;
mod life;
mod list;
mod logs;
mod network;
mod once;
mod operate;
mod sandbox;
pub mod show;
mod snapshots;
mod spelling;
mod templates;
mod usage;

use std::cell::Cell;

use http::request::Parts;
use hyper::body::Incoming;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue,
};
use hyper::{Method, Request, Response, StatusCode, Uri};
use mica_shards::Host;
use mica_units::TenantId;
use mica_wire::api::Health;

use crate::body::{self, Body};
use crate::builds;
use crate::builds::route::BuildRoute;
use crate::config::HttpConfig;
use crate::error::ApiError;
use crate::keys::Caller;
use crate::ops::Served;
use crate::route::{Route, missing, route};
use crate::tenant::TenantHost;
use crate::{openapi, ops, ui};
use list::ListQuery;
pub use list::{Cursor, PAGE_ENTRIES_MAX, page_limit};
use snapshots::{Of, SnapshotQuery};
use spelling::Spelling;

/// Answers one request, and says at `served` what it was for.
pub async fn answer(
    host: &Host,
    config: &HttpConfig,
    request: Request<Incoming>,
    served: &Cell<Served>,
) -> Response<Body> {
    if request.method() == Method::OPTIONS {
        return preflight(&request);
    }
    let (parts, body) = request.into_parts();
    let mut body = Some(body);
    let open = || config.keys.admit(&parts.headers).is_some();
    let outcome = match ui::answer(&parts.method, parts.uri.path(), &parts.headers, open) {
        Some(page) => page,
        None => match route(&parts.method, parts.uri.path()) {
            Ok((place, route)) => {
                served.set(Served::Endpoint(place));
                handle(host, config, &mut body, &parts, route).await
            }
            Err(error) => Err(error),
        },
    };
    if let Some(unread) = body {
        body::discard(&parts.headers, unread).await;
    }
    outcome.unwrap_or_else(ApiError::into_response)
}

/// One request on its way through the handlers.
pub struct Call<'a> {
    /// The host as the caller may see it. There is no way from here to what is another tenant's.
    pub host: &'a TenantHost<'a>,
    pub config: &'a HttpConfig,
    /// What its numbers mean.
    spelling: Spelling,
    /// Taken where the route has one.
    pub body: &'a mut Option<Incoming>,
}

impl Call<'_> {
    /// The body, whole.
    ///
    /// # Errors
    /// See [`body::read`].
    pub async fn read(&mut self) -> Result<Vec<u8>, ApiError> {
        match self.body.take() {
            Some(body) => body::read(body, &self.config.limits).await,
            None => Ok(Vec::new()),
        }
    }
}

/// Carries one request out. What takes much room while it waits is in a box: every request would have
/// that room otherwise.
async fn handle(
    host: &Host,
    config: &HttpConfig,
    body: &mut Option<Incoming>,
    request: &Parts,
    route: Route,
) -> Result<Response<Body>, ApiError> {
    match &route {
        Route::Health => {
            let sandboxes = match config.keys.admit(&request.headers) {
                // What is counted anyway: a probe that asked every shard would cost more the more there are.
                Some(Caller { grant: Some(grant), .. }) => grant.account.live(),
                Some(Caller { grant: None, .. }) => host.sandboxes_shown(),
                None => 0,
            };
            return json::answer(StatusCode::OK, &Health { status: "ok".to_owned(), sandboxes });
        }
        Route::OpenApi => return Ok(openapi::answer()),
        // Whoever has the URL was given it by somebody with a key.
        Route::Build(BuildRoute::Upload(token)) => {
            return Box::pin(builds::upload(host, &config.limits, request, token, body)).await;
        }
        _ => {}
    }
    let caller = config.keys.admit(&request.headers).ok_or_else(ApiError::unauthorized)?;
    if route.is_operators() {
        return operators(host, config, &caller, &route, &request.uri).await;
    }
    let host = TenantHost::new(host, &caller);
    let spelling = Spelling::of(&request.headers);
    let call = &mut Call { host: &host, config, spelling, body };
    let query = request.uri.query().unwrap_or_default();
    match route {
        // Answered above.
        Route::Health
        | Route::OpenApi
        | Route::Metrics
        | Route::MetricsOfSandboxes
        | Route::HostState
        | Route::Profile(_) => Err(missing(request.uri.path())),
        Route::Create(version) => Box::pin(once::create(call, version, &request.headers)).await,
        Route::List(version) => list(call.host, ListQuery::parse(version, query)?).await,
        Route::Sandbox(id, action) => Box::pin(sandbox::act(call, &id, action, query)).await,
        Route::SandboxesMetrics => usage::of_many(call.host, query).await,
        Route::Snapshots => snapshots(call.host, SnapshotQuery::parse(query)?).await,
        Route::Templates(version) => templates::list(call.host, version, query).await,
        Route::DefaultTemplates => templates::defaults(call.host).await,
        Route::Template(id) => templates::get(call.host, &id, query).await,
        Route::TemplateAlias(alias) => templates::find_alias(call.host, &alias).await,
        Route::UpdateTemplate(id) => {
            let body = call.read().await?;
            match builds::update(call.host.builder(), &id, &body).await? {
                Some(updated) => Ok(updated),
                None => templates::update(call.host, &id, &body).await,
            }
        }
        Route::SetTemplateAlias(id) => {
            let body = call.read().await?;
            match builds::rename(call.host.builder(), &id, &body).await? {
                Some(renamed) => Ok(renamed),
                None => templates::set_alias(call.host, &id, &body).await,
            }
        }
        Route::DeleteTemplate(id) => {
            if let Some(deleted) = templates::delete_beside_build(call.host, &id).await? {
                return Ok(deleted);
            }
            match builds::delete(call.host.builder(), &id).await? {
                Some(deleted) => Ok(deleted),
                None => templates::delete(call.host, &id).await,
            }
        }
        Route::Build(route) => Box::pin(builds::answer(call, request, route)).await,
        Route::NotOffered(what) => Err(ApiError::not_offered(what)),
    }
}

/// Answers what only the operator may see.
async fn operators(
    host: &Host,
    config: &HttpConfig,
    caller: &Caller,
    route: &Route,
    uri: &Uri,
) -> Result<Response<Body>, ApiError> {
    let is_operator = caller.tenant == TenantId::default();
    if !is_operator || (route.needs_metrics() && !config.metrics) {
        // To others there is nothing.
        return Err(missing(uri.path()));
    }
    let query = uri.query().unwrap_or_default();
    match route {
        Route::HostState => ops::state(host, query).await,
        Route::MetricsOfSandboxes => ops::sandbox_metrics(host).await,
        Route::Profile(form) => ops::profile(*form, query).await,
        _ => ops::metrics(host).await,
    }
}

async fn list(host: &TenantHost<'_>, query: ListQuery) -> Result<Response<Body>, ApiError> {
    let page = query.page(host.list().await?);
    let entries: Vec<_> = page.entries.into_iter().map(show::listed).collect();
    let mut response = json::answer(StatusCode::OK, &entries)?;
    let running = HeaderValue::from(page.total_running);
    response.headers_mut().insert("x-total-running", running);
    Ok(with_next(response, page.next_token))
}

async fn snapshots(
    host: &TenantHost<'_>,
    query: SnapshotQuery,
) -> Result<Response<Body>, ApiError> {
    let all = match query.of() {
        Of::All => host.snapshots(None).await?,
        Of::One(id) => host.snapshots(Some(id)).await?,
        Of::Nobody => Vec::new(),
    };
    let (entries, next_token) = query.page(all);
    let entries: Vec<_> = entries.into_iter().map(show::snapshot).collect();
    Ok(with_next(json::answer(StatusCode::OK, &entries)?, next_token))
}

/// Says where the next page starts, if there is one.
pub fn with_next(mut response: Response<Body>, token: Option<String>) -> Response<Body> {
    if let Some(token) = token.and_then(|token| HeaderValue::try_from(token).ok()) {
        response.headers_mut().insert("x-next-token", token);
    }
    response
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
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

/// The queries of lists, for fuzz targets.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::{ListQuery, SnapshotQuery};
    use crate::route::Version;

    /// Whether a query asks for a list of sandboxes, of either version.
    pub fn list_query(query: &str) -> bool {
        let of = |version| ListQuery::parse(version, query).is_ok();
        of(Version::V1) & of(Version::V2)
    }

    /// Whether a query asks for a list of snapshots.
    pub fn snapshot_query(query: &str) -> bool {
        SnapshotQuery::parse(query).is_ok()
    }
}
