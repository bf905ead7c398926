//! From a method and a raw path to what is asked for.
//!
//! Called once for every control-plane request. Refuses what it does not know (404) and a method
//! that a path does not have (405). Segments are split before they are decoded, so an encoded
//! slash never makes a new segment.

use hyper::Method;

use crate::error::ApiError;
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
    /// `POST /sandboxes`
    Create(Version),
    /// `GET /sandboxes`
    List(Version),
    /// Anything about one sandbox.
    Sandbox(String, Action),
    /// `GET /snapshots`
    Snapshots,
    /// `GET /templates`
    Templates,
    /// `DELETE /templates/{id}`
    DeleteTemplate(String),
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
}

/// Finds the route.
///
/// # Errors
/// 400 for a path that does not decode, 404, 405.
pub fn route(method: &Method, path: &str) -> Result<Route, ApiError> {
    let segments = path
        .strip_prefix('/')
        .unwrap_or(path)
        .split('/')
        .map(percent::decode_segment)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ApiError::bad_request(format!("the path is not valid: {error}")))?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let candidates = candidates(&segments).ok_or_else(|| ApiError::no_route(&shown(path)))?;
    // HEAD is GET without the body, which hyper leaves out.
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let allow = allow(&candidates);
    candidates
        .into_iter()
        .find_map(|(served, route)| (served == wanted).then_some(route))
        .ok_or_else(|| ApiError::method_not_allowed(method, allow))
}

/// Everything that is served at a path. `None`: nothing is.
fn candidates(segments: &[&str]) -> Option<Vec<(Method, Route)>> {
    Some(match segments {
        ["health"] => vec![(Method::GET, Route::Health)],
        ["metrics"] => vec![(Method::GET, Route::Metrics)],
        ["snapshots"] => vec![(Method::GET, Route::Snapshots)],
        ["templates"] => vec![(Method::GET, Route::Templates)],
        ["templates", id] if !id.is_empty() => {
            vec![(Method::DELETE, Route::DeleteTemplate((*id).to_owned()))]
        }
        ["sandboxes"] => sandboxes(Version::V1),
        ["v2", "sandboxes"] => sandboxes(Version::V2),
        ["sandboxes", id] if !id.is_empty() => {
            let route = |action| Route::Sandbox((*id).to_owned(), action);
            vec![(Method::GET, route(Action::Get)), (Method::DELETE, route(Action::Kill))]
        }
        ["sandboxes", id, action] => {
            vec![(Method::POST, Route::Sandbox((*id).to_owned(), self::action(action)?))]
        }
        ["v2", "sandboxes", id, "connect"] => {
            let connect = Action::Connect(Version::V2);
            vec![(Method::POST, Route::Sandbox((*id).to_owned(), connect))]
        }
        _ => return None,
    })
}

fn action(name: &str) -> Option<Action> {
    Some(match name {
        "timeout" => Action::SetTimeout,
        "connect" => Action::Connect(Version::V1),
        "snapshots" => Action::Snapshot,
        "rollback" => Action::Rollback,
        "pause" => Action::Pause,
        "resume" => Action::Resume,
        "clone" => Action::Clone,
        "fork" => Action::Fork,
        _ => return None,
    })
}

fn sandboxes(version: Version) -> Vec<(Method, Route)> {
    vec![(Method::GET, Route::List(version)), (Method::POST, Route::Create(version))]
}

fn allow(candidates: &[(Method, Route)]) -> &'static str {
    let serves = |wanted: &Method| candidates.iter().any(|(method, _)| method == wanted);
    match (serves(&Method::GET), serves(&Method::POST), serves(&Method::DELETE)) {
        (true, true, _) => "GET, HEAD, POST, OPTIONS",
        (true, _, true) => "GET, HEAD, DELETE, OPTIONS",
        (true, false, false) => "GET, HEAD, OPTIONS",
        (false, _, true) => "DELETE, OPTIONS",
        _ => "POST, OPTIONS",
    }
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
            (Method::GET, "/templates", Route::Templates),
            (Method::DELETE, "/templates/ns%2Fx", Route::DeleteTemplate("ns/x".to_owned())),
        ] {
            assert_eq!(route(&method, path), Ok(expected), "{method} {path}");
        }
    }

    #[test]
    fn an_encoded_slash_does_not_make_a_segment() {
        let got = route(&Method::GET, "/sandboxes/a%2Ftimeout");
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
            ("/templates/iabc", "DELETE, OPTIONS"),
            ("/sandboxes/iabc/pause", "POST, OPTIONS"),
        ] {
            let error = route(&Method::PUT, path).unwrap_err();
            assert_eq!(error.into_response().headers()["allow"], allow, "{path}");
        }
    }
}
