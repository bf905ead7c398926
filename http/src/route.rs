//! From a method and a raw path to what is asked for.
//!
//! Called once for every control-plane request; the table is also what the OpenAPI document is checked
//! against. Refuses what it does not know (404) and a method
//! that a path does not have (405). Segments are split before they are decoded, so an encoded
//! slash never makes a new segment.

use hyper::Method;

use crate::builds::route::BuildRoute;
use crate::error::ApiError;
use crate::ops::Form;
use crate::percent;

/// Which version of an endpoint: they differ in defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Without a prefix.
    V1,
    /// Under `/v2`.
    V2,
}

/// What is asked for. Ids are as the client wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `GET /health`
    Health,
    /// `GET /metrics`
    Metrics,
    /// `GET /metrics/sandboxes`
    MetricsOfSandboxes,
    /// `GET /ui/state`
    HostState,
    /// `GET /debug/pprof/profile` and `GET /debug/flamegraph`
    Profile(Form),
    /// `GET /openapi.json`
    OpenApi,
    /// `POST /sandboxes`
    Create(Version),
    /// `GET /sandboxes`
    List(Version),
    /// `GET /sandboxes/metrics`
    SandboxesMetrics,
    /// Anything about one sandbox.
    Sandbox(String, Action),
    /// `GET /snapshots`
    Snapshots,
    /// `GET /templates`
    Templates(Version),
    /// `GET /default-templates`
    DefaultTemplates,
    /// `GET /templates/{id}`
    Template(String),
    /// `PATCH /templates/{id}`
    UpdateTemplate(String),
    /// `DELETE /templates/{id}`
    DeleteTemplate(String),
    /// `GET /templates/aliases/{alias}`
    TemplateAlias(String),
    /// `PUT /templates/{id}/alias`
    SetTemplateAlias(String),
    /// Anything about templates that clients build.
    Build(BuildRoute),
    /// What E2B or CubeSandbox have there and this host has not; its name.
    NotOffered(&'static str),
}

/// What is to happen with one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `GET /sandboxes/{id}`
    Get,
    /// `DELETE /sandboxes/{id}`
    Kill,
    /// `POST /sandboxes/{id}/timeout`
    SetTimeout,
    /// `POST /sandboxes/{id}/refreshes`
    Refresh,
    /// `POST /sandboxes/{id}/connect`
    Connect(Version),
    /// `POST /sandboxes/{id}/snapshots`
    Snapshot,
    /// `POST /sandboxes/{id}/rollback`
    Rollback,
    /// `POST /sandboxes/{id}/pause`
    Pause,
    /// `POST /sandboxes/{id}/resume`
    Resume,
    /// `POST /sandboxes/{id}/clone`
    Clone,
    /// `POST /sandboxes/{id}/fork`
    Fork,
    /// `PUT /sandboxes/{id}/network`
    SetNetwork,
    /// `GET /sandboxes/{id}/metrics`
    Usage,
    /// `GET /sandboxes/{id}/logs`
    Logs(Version),
}

impl Route {
    /// Whether only the operator may know of it.
    #[must_use]
    pub fn is_operators(&self) -> bool {
        matches!(
            self,
            Self::Metrics | Self::MetricsOfSandboxes | Self::HostState | Self::Profile(_)
        )
    }

    /// Whether it is not there where metrics are off.
    #[must_use]
    pub fn needs_metrics(&self) -> bool {
        matches!(self, Self::Metrics | Self::MetricsOfSandboxes)
    }
}

/// Makes a route of what stands in the path where its pattern has a name in braces.
type Make = fn(&[String]) -> Route;

/// One endpoint: a method, the pattern of a path, and what it means.
#[derive(Debug)]
pub struct Endpoint {
    /// The method.
    pub method: Method,
    /// The path; a segment in braces stands for any that is not empty.
    pub path: &'static str,
    make: Make,
}

const fn at(method: Method, path: &'static str, make: Make) -> Endpoint {
    Endpoint { method, path, make }
}

/// Everything this host serves. Of two patterns that fit a path the first counts.
pub static ENDPOINTS: [Endpoint; ENDPOINT_COUNT] = [
    at(Method::GET, "/health", |_| Route::Health),
    at(Method::GET, "/metrics", |_| Route::Metrics),
    at(Method::GET, "/metrics/sandboxes", |_| Route::MetricsOfSandboxes),
    at(Method::GET, "/ui/state", |_| Route::HostState),
    at(Method::GET, "/debug/pprof/profile", |_| Route::Profile(Form::Pprof)),
    at(Method::GET, "/debug/flamegraph", |_| Route::Profile(Form::Flamegraph)),
    at(Method::GET, "/openapi.json", |_| Route::OpenApi),
    at(Method::POST, "/sandboxes", |_| Route::Create(Version::V1)),
    at(Method::POST, "/v2/sandboxes", |_| Route::Create(Version::V2)),
    at(Method::GET, "/sandboxes", |_| Route::List(Version::V1)),
    at(Method::GET, "/v2/sandboxes", |_| Route::List(Version::V2)),
    at(Method::GET, "/sandboxes/metrics", |_| Route::SandboxesMetrics),
    at(Method::GET, "/sandboxes/{sandboxID}", |p| act(p, Action::Get)),
    at(Method::DELETE, "/sandboxes/{sandboxID}", |p| act(p, Action::Kill)),
    at(Method::POST, "/sandboxes/{sandboxID}/timeout", |p| act(p, Action::SetTimeout)),
    at(Method::POST, "/sandboxes/{sandboxID}/refreshes", |p| act(p, Action::Refresh)),
    at(Method::POST, "/sandboxes/{sandboxID}/connect", |p| act(p, Action::Connect(Version::V1))),
    at(Method::POST, "/v2/sandboxes/{sandboxID}/connect", |p| act(p, Action::Connect(Version::V2))),
    at(Method::POST, "/sandboxes/{sandboxID}/pause", |p| act(p, Action::Pause)),
    at(Method::POST, "/sandboxes/{sandboxID}/resume", |p| act(p, Action::Resume)),
    at(Method::POST, "/sandboxes/{sandboxID}/snapshots", |p| act(p, Action::Snapshot)),
    at(Method::POST, "/sandboxes/{sandboxID}/rollback", |p| act(p, Action::Rollback)),
    at(Method::POST, "/sandboxes/{sandboxID}/clone", |p| act(p, Action::Clone)),
    at(Method::POST, "/sandboxes/{sandboxID}/fork", |p| act(p, Action::Fork)),
    at(Method::PUT, "/sandboxes/{sandboxID}/network", |p| act(p, Action::SetNetwork)),
    at(Method::GET, "/sandboxes/{sandboxID}/metrics", |p| act(p, Action::Usage)),
    at(Method::GET, "/sandboxes/{sandboxID}/logs", |p| act(p, Action::Logs(Version::V1))),
    at(Method::GET, "/v2/sandboxes/{sandboxID}/logs", |p| act(p, Action::Logs(Version::V2))),
    at(Method::GET, "/snapshots", |_| Route::Snapshots),
    at(Method::GET, "/templates", |_| Route::Templates(Version::V1)),
    at(Method::POST, "/templates", |_| Route::NotOffered(CUBE_BUILDS)),
    at(Method::GET, "/v2/templates", |_| Route::Templates(Version::V2)),
    at(Method::GET, "/default-templates", |_| Route::DefaultTemplates),
    at(Method::POST, "/v3/templates", |_| Route::Build(BuildRoute::Announce)),
    at(Method::PUT, "/build-files/{token}", |p| Route::Build(BuildRoute::Upload(named(p)))),
    at(Method::POST, "/v2/templates/{templateID}/builds/{buildID}", |p| both(p, BuildRoute::Start)),
    at(Method::GET, "/templates/{templateID}/builds/{buildID}/status", |p| {
        both(p, BuildRoute::Status)
    }),
    at(Method::GET, "/templates/{templateID}/builds/{buildID}/logs", |p| both(p, BuildRoute::Logs)),
    at(Method::GET, "/templates/{templateID}/files/{hash}", |p| both(p, BuildRoute::Files)),
    at(Method::POST, "/templates/tags", |_| Route::Build(BuildRoute::AssignTags)),
    at(Method::DELETE, "/templates/tags", |_| Route::Build(BuildRoute::RemoveTags)),
    at(Method::GET, "/templates/{templateID}/tags", |p| Route::Build(BuildRoute::Tags(named(p)))),
    at(Method::GET, "/templates/{templateID}/tags/count", |p| {
        Route::Build(BuildRoute::TagCount(named(p)))
    }),
    at(Method::GET, "/templates/{templateID}/tags/exists", |p| {
        Route::Build(BuildRoute::TagExists(named(p)))
    }),
    at(Method::GET, "/templates/{templateID}/tags/groups", |p| {
        Route::Build(BuildRoute::TagGroups(named(p)))
    }),
    at(Method::GET, "/templates/{templateID}/tags/{tag}/assignments", |p| {
        both(p, BuildRoute::TagAssignments)
    }),
    at(Method::GET, "/templates/compat", |_| Route::NotOffered(CUBE_BUILDS)),
    at(Method::GET, "/templates/aliases/{alias}", |p| Route::TemplateAlias(named(p))),
    at(Method::GET, "/templates/{templateID}", |p| Route::Template(named(p))),
    at(Method::POST, "/templates/{templateID}", |_| Route::NotOffered(CUBE_BUILDS)),
    at(Method::PATCH, "/templates/{templateID}", |p| Route::UpdateTemplate(named(p))),
    at(Method::DELETE, "/templates/{templateID}", |p| Route::DeleteTemplate(named(p))),
    at(Method::PATCH, "/v2/templates/{templateID}", |p| Route::UpdateTemplate(named(p))),
    at(Method::PUT, "/templates/{templateID}/alias", |p| Route::SetTemplateAlias(named(p))),
    at(Method::GET, "/volumes", |_| Route::NotOffered(VOLUMES)),
    at(Method::POST, "/volumes", |_| Route::NotOffered(VOLUMES)),
    at(Method::GET, "/volumes/{volumeID}", |_| Route::NotOffered(VOLUMES)),
    at(Method::DELETE, "/volumes/{volumeID}", |_| Route::NotOffered(VOLUMES)),
    at(Method::GET, "/volumecontent/{volumeID}/{kind}", |_| Route::NotOffered(VOLUMES)),
    at(Method::POST, "/volumecontent/{volumeID}/{kind}", |_| Route::NotOffered(VOLUMES)),
    at(Method::PUT, "/volumecontent/{volumeID}/{kind}", |_| Route::NotOffered(VOLUMES)),
    at(Method::PATCH, "/volumecontent/{volumeID}/{kind}", |_| Route::NotOffered(VOLUMES)),
    at(Method::DELETE, "/volumecontent/{volumeID}/{kind}", |_| Route::NotOffered(VOLUMES)),
    at(Method::GET, "/secrets", |_| Route::NotOffered(SECRETS)),
    at(Method::POST, "/secrets", |_| Route::NotOffered(SECRETS)),
    at(Method::GET, "/secrets/{secretID}", |_| Route::NotOffered(SECRETS)),
    at(Method::POST, "/secrets/{secretID}", |_| Route::NotOffered(SECRETS)),
    at(Method::DELETE, "/secrets/{secretID}", |_| Route::NotOffered(SECRETS)),
    at(Method::GET, "/teams", |_| Route::NotOffered(TEAMS)),
];

/// How many.
pub const ENDPOINT_COUNT: usize = 69;

const CUBE_BUILDS: &str = "CubeSandbox's way of building templates";
const VOLUMES: &str = "volumes";
const SECRETS: &str = "secrets";
const TEAMS: &str = "teams";

fn act(parameters: &[String], action: Action) -> Route {
    Route::Sandbox(named(parameters), action)
}

fn named(parameters: &[String]) -> String {
    parameters.first().cloned().unwrap_or_default()
}

fn both(parameters: &[String], make: fn(String, String) -> BuildRoute) -> Route {
    Route::Build(make(named(parameters), parameters.get(1).cloned().unwrap_or_default()))
}

impl Endpoint {
    /// What stands in place of the names, if the path fits.
    fn parameters(&self, segments: &[String]) -> Option<Vec<String>> {
        let mut given = segments.iter();
        let mut parameters = Vec::new();
        for wanted in self.path.split('/').skip(1) {
            let segment = given.next()?;
            if wanted.starts_with('{') {
                parameters.push(segment.clone());
            } else if wanted != segment {
                return None;
            }
        }
        let fits = given.next().is_none() && parameters.iter().all(|p| !p.is_empty());
        fits.then_some(parameters)
    }
}

/// Finds the route, and its place in [`ENDPOINTS`].
///
/// # Errors
/// 400 for a path that does not decode, 404, 405.
pub fn route(method: &Method, path: &str) -> Result<(usize, Route), ApiError> {
    let segments = path
        .strip_prefix('/')
        .unwrap_or(path)
        .split('/')
        .map(percent::decode_segment)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ApiError::bad_request(format!("the path is not valid: {error}")))?;
    let fits = |endpoint: &'static Endpoint| Some((endpoint, endpoint.parameters(&segments)?));
    let (first, parameters) = ENDPOINTS.iter().find_map(fits).ok_or_else(|| missing(path))?;
    // HEAD is GET without the body, which hyper leaves out.
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let here = ENDPOINTS.iter().enumerate().filter(|(_, endpoint)| endpoint.path == first.path);
    match here.clone().find(|(_, endpoint)| endpoint.method == wanted) {
        Some((place, endpoint)) => Ok((place, (endpoint.make)(&parameters))),
        None => Err(ApiError::method_not_allowed(method, &allow(here.map(|(_, here)| here)))),
    }
}

/// The answer for a path that is not there.
#[must_use]
pub fn missing(path: &str) -> ApiError {
    ApiError::no_route(&shown(path))
}

fn allow<'a>(endpoints: impl Iterator<Item = &'a Endpoint>) -> String {
    let mut methods = Vec::new();
    for endpoint in endpoints {
        methods.push(endpoint.method.as_str());
        if endpoint.method == Method::GET {
            methods.push("HEAD");
        }
    }
    methods.push("OPTIONS");
    methods.join(", ")
}

/// As much of a path as an error message repeats.
fn shown(path: &str) -> String {
    path.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: &Method, path: &str) -> u16 {
        route(method, path).err().map_or(200, |error| error.status().as_u16())
    }

    #[test]
    fn every_endpoint_is_found() {
        let of = |action| Route::Sandbox("iabc".to_owned(), action);
        for (method, path, expected) in [
            (Method::GET, "/health", Route::Health),
            (Method::GET, "/metrics", Route::Metrics),
            (Method::GET, "/metrics/sandboxes", Route::MetricsOfSandboxes),
            (Method::GET, "/ui/state", Route::HostState),
            (Method::GET, "/debug/flamegraph", Route::Profile(Form::Flamegraph)),
            (Method::HEAD, "/health", Route::Health),
            (Method::POST, "/sandboxes", Route::Create(Version::V1)),
            (Method::POST, "/v2/sandboxes", Route::Create(Version::V2)),
            (Method::GET, "/sandboxes", Route::List(Version::V1)),
            (Method::GET, "/v2/sandboxes", Route::List(Version::V2)),
            (Method::GET, "/sandboxes/iabc", of(Action::Get)),
            (Method::DELETE, "/sandboxes/i%61bc", of(Action::Kill)),
            (Method::POST, "/sandboxes/iabc/timeout", of(Action::SetTimeout)),
            (Method::POST, "/sandboxes/iabc/connect", of(Action::Connect(Version::V1))),
            (Method::POST, "/v2/sandboxes/iabc/connect", of(Action::Connect(Version::V2))),
            (Method::POST, "/sandboxes/iabc/snapshots", of(Action::Snapshot)),
            (Method::POST, "/sandboxes/iabc/rollback", of(Action::Rollback)),
            (Method::POST, "/sandboxes/iabc/pause", of(Action::Pause)),
            (Method::POST, "/sandboxes/iabc/resume", of(Action::Resume)),
            (Method::POST, "/sandboxes/iabc/clone", of(Action::Clone)),
            (Method::POST, "/sandboxes/iabc/fork", of(Action::Fork)),
            (Method::GET, "/snapshots", Route::Snapshots),
            (Method::GET, "/templates", Route::Templates(Version::V1)),
            (Method::GET, "/v2/templates", Route::Templates(Version::V2)),
            (Method::GET, "/templates/base", Route::Template("base".to_owned())),
            (Method::GET, "/templates/aliases/a%2Fb%3Ac", Route::TemplateAlias("a/b:c".to_owned())),
            (Method::GET, "/sandboxes/metrics", Route::SandboxesMetrics),
            (Method::GET, "/sandboxes/iabc/metrics", of(Action::Usage)),
            (Method::GET, "/v2/sandboxes/iabc/logs", of(Action::Logs(Version::V2))),
            (Method::PUT, "/sandboxes/iabc/network", of(Action::SetNetwork)),
            (Method::POST, "/sandboxes/iabc/refreshes", of(Action::Refresh)),
            (Method::GET, "/teams", Route::NotOffered(TEAMS)),
            (Method::DELETE, "/templates/ns%2Fx", Route::DeleteTemplate("ns/x".to_owned())),
            (Method::POST, "/v3/templates", Route::Build(BuildRoute::Announce)),
            (Method::DELETE, "/templates/tags", Route::Build(BuildRoute::RemoveTags)),
            (Method::PUT, "/build-files/t", Route::Build(BuildRoute::Upload("t".to_owned()))),
            (
                Method::GET,
                "/templates/n%3At/builds/b/status",
                Route::Build(BuildRoute::Status("n:t".to_owned(), "b".to_owned())),
            ),
        ] {
            let (place, got) = route(&method, path).unwrap();
            assert_eq!(got, expected, "{method} {path}");
            let wanted = if method == Method::HEAD { Method::GET } else { method };
            assert_eq!(ENDPOINTS[place].method, wanted, "{path}");
        }
    }

    #[test]
    fn an_encoded_slash_does_not_make_a_segment() {
        let got = route(&Method::GET, "/sandboxes/a%2Ftimeout").map(|(_, route)| route);
        assert_eq!(got, Ok(Route::Sandbox("a/timeout".to_owned(), Action::Get)));
    }

    #[test]
    fn unknown_paths_and_methods_are_told_apart() {
        assert_eq!(status(&Method::GET, "/"), 404);
        assert_eq!(status(&Method::GET, "/sandboxes/"), 404);
        assert_eq!(status(&Method::GET, "//health"), 404);
        assert_eq!(status(&Method::GET, "/v3/sandboxes"), 404);
        assert_eq!(status(&Method::GET, "/sandboxes/a/b"), 404);
        assert_eq!(status(&Method::DELETE, "/templates/"), 404);
        assert_eq!(status(&Method::DELETE, "/snapshots/a"), 404);
        assert_eq!(status(&Method::POST, "/v2/sandboxes/a/pause"), 404);
        assert_eq!(status(&Method::GET, "/%zz"), 400);
        assert_eq!(status(&Method::PUT, "/sandboxes"), 405);
        assert_eq!(status(&Method::GET, "/sandboxes/a/timeout"), 405);
        assert_eq!(status(&Method::GET, "/sandboxes/a/snapshots"), 405);
        assert_eq!(status(&Method::DELETE, "/health"), 405);
        for (path, allow) in [
            ("/sandboxes/iabc", "GET, HEAD, DELETE, OPTIONS"),
            ("/sandboxes/metrics", "GET, HEAD, OPTIONS"),
            ("/sandboxes/iabc/pause", "POST, OPTIONS"),
        ] {
            let error = route(&Method::PUT, path).unwrap_err();
            assert_eq!(error.into_response().headers()["allow"], allow, "{path}");
        }
    }
}
