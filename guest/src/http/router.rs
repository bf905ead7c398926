//! Routes: method and path to handler, with access checked first and CORS on every answer.
//!
//! Called by `server` for each request; filled by the services. Refuses unknown paths (404), other
//! methods (405), callers without access (401), and everything before initialisation (503).

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use mica_wire::guest::InitRequest;

use super::body::RequestBody;
use super::server::HEAD_BYTES_MAX;
use super::{Access, HttpError, Query, Request, Response, query, status};
use crate::sandbox::Sandbox;

/// Answers of RPCs carry these, and a browser must be allowed to see them.
const EXPOSED: &str = "Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Location, \
                       Cache-Control, X-Content-Type-Options, Connect-Content-Encoding, \
                       Content-Disposition, Content-Length, ETag, Last-Modified";

/// One request on its way to a handler.
#[derive(Debug)]
pub struct Call {
    /// The sandbox it is about.
    pub sandbox: Arc<Sandbox>,
    /// Who it was when the request came, whatever it has become since.
    pub identity: Arc<InitRequest>,
    /// What stood for each `{}` of the pattern, decoded.
    pub params: Vec<String>,
    /// The query string, decoded.
    pub query: Query,
    /// The request itself.
    pub request: Request,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response, HttpError>> + Send>>;
type Admitted<'a> = (&'a Route, Vec<String>, Arc<InitRequest>, Query);
type Handler = Box<dyn Fn(Call) -> Answer + Send + Sync>;

struct Route {
    method: Method,
    pattern: String,
    access: Access,
    handler: Handler,
}

/// The routes of one port.
pub struct Router {
    sandbox: Arc<Sandbox>,
    routes: Vec<Route>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("routes", &self.routes.len()).finish_non_exhaustive()
    }
}

impl Router {
    /// No routes yet.
    #[must_use]
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox, routes: Vec::new() }
    }

    /// Adds a route. A segment `{}` of the pattern stands for any one segment. A `GET` route also
    /// answers `HEAD`.
    pub fn add<F, Fut>(&mut self, method: Method, pattern: &str, access: Access, handler: F)
    where
        F: Fn(Call) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Response, HttpError>> + Send + 'static,
    {
        self.routes.push(Route {
            method,
            pattern: pattern.to_owned(),
            access,
            handler: Box::new(move |call| Box::pin(handler(call))),
        });
    }

    /// Answers one request, whatever it is.
    pub async fn answer(&self, request: Request) -> Response {
        let mut response = if request.method() == Method::OPTIONS {
            preflight(request.headers())
        } else {
            self.dispatch(request).await.unwrap_or_else(HttpError::into_response)
        };
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        response
    }

    async fn dispatch(&self, request: Request) -> Result<Response, HttpError> {
        let (route, params, identity, query) = match self.admit(&request) {
            Ok(admitted) => admitted,
            Err(error) => {
                drop(RequestBody::new(request.into_body()));
                return Err(error);
            }
        };
        let sandbox = Arc::clone(&self.sandbox);
        let call = Call { sandbox, identity, params, query, request };
        (route.handler)(call).await
    }

    /// Looks at a request's head: where it goes, and whether it may.
    fn admit(&self, request: &Request) -> Result<Admitted<'_>, HttpError> {
        check_head(request)?;
        let method = match request.method() {
            &Method::HEAD => &Method::GET,
            other => other,
        };
        let (route, params) = self.find(method, request.uri().path())?;
        let Some(identity) = self.sandbox.identity() else {
            return Err(HttpError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the sandbox is not initialised yet; try again",
            ));
        };
        let query = Query::parse(request.uri().query().unwrap_or(""));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let token = identity.access_token.as_deref();
        route.access.check(token, request.headers(), &query, now)?;
        Ok((route, params, identity, query))
    }

    fn find(&self, method: &Method, path: &str) -> Result<(&Route, Vec<String>), HttpError> {
        let mut path_is_known = false;
        for route in &self.routes {
            let Some(params) = captures(&route.pattern, path) else { continue };
            if route.method == method {
                return Ok((route, params));
            }
            path_is_known = true;
        }
        Err(if path_is_known {
            let message = format!("{path} does not take the method {method}");
            HttpError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        } else {
            HttpError::not_found(format!("there is nothing at {path}"))
        })
    }
}

/// hyper bounds what it buffers before it knows a head to be whole; this bounds a whole one.
fn check_head(request: &Request) -> Result<(), HttpError> {
    let headers = request.headers().iter();
    let bytes: usize = headers.map(|(name, value)| name.as_str().len() + value.len()).sum();
    let bytes = bytes + request.uri().to_string().len();
    if bytes <= HEAD_BYTES_MAX {
        return Ok(());
    }
    Err(HttpError::new(
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        format!("the request's head is over {HEAD_BYTES_MAX} bytes; send less"),
    ))
}

/// What stands for each `{}`, if `path` has the form of `pattern`.
fn captures(pattern: &str, path: &str) -> Option<Vec<String>> {
    let mut captured = Vec::new();
    let mut segments = path.split('/');
    for wanted in pattern.split('/') {
        let segment = segments.next()?;
        if wanted == "{}" && !segment.is_empty() {
            captured.push(query::decode(segment, false)?);
        } else if wanted != segment {
            return None;
        }
    }
    segments.next().is_none().then_some(captured)
}

fn preflight(asked: &HeaderMap) -> Response {
    let mut response = status(StatusCode::NO_CONTENT);
    let headers = response.headers_mut();
    let any = HeaderValue::from_static("*");
    let wanted = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned().unwrap_or(any);
    let fixed: [(HeaderName, HeaderValue); 3] = [
        (header::ACCESS_CONTROL_ALLOW_HEADERS, wanted),
        (
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("HEAD, GET, POST, PUT, PATCH, DELETE"),
        ),
        (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200")),
    ];
    for (name, value) in fixed {
        headers.insert(name, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_capture_whole_segments() {
        assert_eq!(captures("/health", "/health"), Some(vec![]));
        assert_eq!(captures("/health", "/health/"), None);
        assert_eq!(
            captures("/contexts/{}/restart", "/contexts/a%2Fb/restart"),
            Some(vec!["a/b".into()])
        );
        assert_eq!(captures("/contexts/{}", "/contexts/"), None);
        assert_eq!(captures("/contexts/{}", "/contexts"), None);
        assert_eq!(captures("/contexts/{}", "/contexts/a/b"), None);
    }
}
