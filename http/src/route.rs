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
    /// `POST /sandboxes`
    Create(Version),
    /// `GET /sandboxes`
    List(Version),
    /// `GET /sandboxes/{id}`
    Get(String),
    /// `DELETE /sandboxes/{id}`
    Kill(String),
    /// `POST /sandboxes/{id}/timeout`
    SetTimeout(String),
    /// `POST /sandboxes/{id}/connect`
    Connect(Version, String),
    /// `GET /templates`
    Templates,
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
    let candidates = match segments.as_slice() {
        ["health"] => vec![(Method::GET, Route::Health)],
        ["templates"] => vec![(Method::GET, Route::Templates)],
        ["sandboxes"] => sandboxes(Version::V1),
        ["v2", "sandboxes"] => sandboxes(Version::V2),
        ["sandboxes", id] if !id.is_empty() => vec![
            (Method::GET, Route::Get((*id).to_owned())),
            (Method::DELETE, Route::Kill((*id).to_owned())),
        ],
        ["sandboxes", id, "timeout"] => {
            vec![(Method::POST, Route::SetTimeout((*id).to_owned()))]
        }
        ["sandboxes", id, "connect"] => connect(Version::V1, id),
        ["v2", "sandboxes", id, "connect"] => connect(Version::V2, id),
        _ => return Err(ApiError::no_route(&shown(path))),
    };
    // HEAD is GET without the body, which hyper leaves out.
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let allow = allow(&candidates);
    candidates
        .into_iter()
        .find_map(|(served, route)| (served == wanted).then_some(route))
        .ok_or_else(|| ApiError::method_not_allowed(method, allow))
}

fn sandboxes(version: Version) -> Vec<(Method, Route)> {
    vec![(Method::GET, Route::List(version)), (Method::POST, Route::Create(version))]
}

fn connect(version: Version, id: &str) -> Vec<(Method, Route)> {
    vec![(Method::POST, Route::Connect(version, id.to_owned()))]
}

fn allow(candidates: &[(Method, Route)]) -> &'static str {
    let serves = |wanted: &Method| candidates.iter().any(|(method, _)| method == wanted);
    match (serves(&Method::GET), serves(&Method::POST), serves(&Method::DELETE)) {
        (true, true, _) => "GET, HEAD, POST, OPTIONS",
        (true, _, true) => "GET, HEAD, DELETE, OPTIONS",
        (true, false, false) => "GET, HEAD, OPTIONS",
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
        let id = || "iabc".to_owned();
        for (method, path, expected) in [
            (Method::GET, "/health", Route::Health),
            (Method::HEAD, "/health", Route::Health),
            (Method::POST, "/sandboxes", Route::Create(Version::V1)),
            (Method::POST, "/v2/sandboxes", Route::Create(Version::V2)),
            (Method::GET, "/sandboxes", Route::List(Version::V1)),
            (Method::GET, "/v2/sandboxes", Route::List(Version::V2)),
            (Method::GET, "/sandboxes/iabc", Route::Get(id())),
            (Method::DELETE, "/sandboxes/i%61bc", Route::Kill(id())),
            (Method::POST, "/sandboxes/iabc/timeout", Route::SetTimeout(id())),
            (Method::POST, "/sandboxes/iabc/connect", Route::Connect(Version::V1, id())),
            (Method::POST, "/v2/sandboxes/iabc/connect", Route::Connect(Version::V2, id())),
            (Method::GET, "/templates", Route::Templates),
        ] {
            assert_eq!(route(&method, path), Ok(expected), "{method} {path}");
        }
    }

    #[test]
    fn an_encoded_slash_does_not_make_a_segment() {
        let got = route(&Method::GET, "/sandboxes/a%2Ftimeout");
        assert_eq!(got, Ok(Route::Get("a/timeout".to_owned())));
    }

    #[test]
    fn unknown_paths_and_methods_are_told_apart() {
        assert_eq!(status(&Method::GET, "/"), 404);
        assert_eq!(status(&Method::GET, "/sandboxes/"), 404);
        assert_eq!(status(&Method::GET, "//health"), 404);
        assert_eq!(status(&Method::GET, "/v3/sandboxes"), 404);
        assert_eq!(status(&Method::GET, "/sandboxes/a/b"), 404);
        assert_eq!(status(&Method::GET, "/%zz"), 400);
        assert_eq!(status(&Method::PUT, "/sandboxes"), 405);
        assert_eq!(status(&Method::GET, "/sandboxes/a/timeout"), 405);
        assert_eq!(status(&Method::DELETE, "/health"), 405);
        let error = route(&Method::PUT, "/sandboxes/iabc").unwrap_err();
        assert_eq!(error.into_response().headers()["allow"], "GET, HEAD, DELETE, OPTIONS");
    }
}
