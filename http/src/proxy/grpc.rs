//! gRPC calls, which are HTTP/2 to the end.
//!
//! Called by [`super::exchange`]. Refuses gRPC-Web, which was made for servers and proxies that speak
//! HTTP/1.1.

use hyper::header::{CONTENT_TYPE, HOST};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Uri, Version};

const CONTENT: &[u8] = b"application/grpc";

/// Whether it is a call: one that came as HTTP/2, for only that carries its trailers back.
#[must_use]
pub fn is_call<B>(request: &Request<B>) -> bool {
    let content = request.headers().get(CONTENT_TYPE).map(|value| value.as_bytes());
    let rest = content.and_then(|content| {
        let (kind, rest) = content.split_at_checked(CONTENT.len())?;
        kind.eq_ignore_ascii_case(CONTENT).then_some(rest)
    });
    request.version() == Version::HTTP_2
        && rest.is_some_and(|r| matches!(r, [] | [b'+' | b';', ..]))
}

/// The call in the form in which HTTP/2 says where it goes.
#[must_use]
pub fn for_sandbox<B>(request: Request<B>) -> Request<B> {
    let (mut parts, body) = request.into_parts();
    let host = parts.headers.remove(HOST);
    let authority = host.and_then(|host| Authority::from_maybe_shared(host).ok());
    let path = parts.uri.path_and_query().cloned();
    let mut uri = hyper::http::uri::Parts::default();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = authority.or_else(|| Some(Authority::from_static("localhost")));
    uri.path_and_query = path.or_else(|| Some(PathAndQuery::from_static("/")));
    if let Ok(uri) = Uri::from_parts(uri) {
        parts.uri = uri;
    }
    Request::from_parts(parts, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, content: &str) -> Request<()> {
        let request = Request::builder().version(version).uri("/pkg.Service/Call");
        request.header("content-type", content).header("host", "8000-x.any:9").body(()).unwrap()
    }

    #[test]
    fn only_grpc_over_http_2_is_a_call() {
        for content in ["application/grpc", "application/grpc+proto", "Application/gRPC;x=1"] {
            assert!(is_call(&request(Version::HTTP_2, content)), "{content}");
            assert!(!is_call(&request(Version::HTTP_11, content)), "{content}");
        }
        for content in ["application/grpc-web", "application/grpcish", "application/grp", "text/x"]
        {
            assert!(!is_call(&request(Version::HTTP_2, content)), "{content}");
        }
    }

    #[test]
    fn a_call_says_where_it_goes_once() {
        let sent = for_sandbox(request(Version::HTTP_2, "application/grpc"));
        assert_eq!(sent.uri(), "http://8000-x.any:9/pkg.Service/Call");
        assert!(!sent.headers().contains_key(HOST));
    }
}
