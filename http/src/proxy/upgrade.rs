//! Leaving HTTP on both sides of the proxy at once: WebSockets, and any other `Upgrade`.
//!
//! Called by [`super`] for every request of HTTP/1.1. Refuses an upgrade to HTTP, which would carry
//! requests past everything that looks at them here, one to a port whose routes are guarded, and one
//! whose request has a body: it goes on as the plain request that it also is.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use hyper::body::Body as HttpBody;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::{HeaderMap, Request, StatusCode, Version};
use mica_shards::GuestStream;
use mica_units::GuestPort;

use super::answering::Passing;
use super::streams::Open;

/// A stream into a guest that is nobody's HTTP any more.
#[derive(Debug)]
pub struct Tunnel {
    /// The stream.
    pub guest: GuestStream,
    /// What the guest said behind its `101`.
    pub early: Vec<u8>,
    /// Its count.
    pub _open: Open,
}

/// Where an exchange leaves what its connection is to go on as.
#[derive(Debug, Default)]
pub struct Switch {
    tunnel: RefCell<Option<Tunnel>>,
    /// An answer that may come to be passed on without hyper.
    passing: RefCell<Weak<Passing>>,
    /// Whether the request allows that.
    is_plain: Cell<bool>,
}

impl Switch {
    /// Leaves it.
    pub fn put(&self, tunnel: Tunnel) {
        *self.tunnel.borrow_mut() = Some(tunnel);
    }

    /// Takes it.
    #[must_use]
    pub fn take(&self) -> Option<Tunnel> {
        self.tunnel.borrow_mut().take()
    }

    /// A request has come. Its answer is one that anybody can pass on if its end does not end the
    /// connection and its chunks need no other form.
    pub fn asked<B>(&self, request: &Request<B>) {
        let mut options = request.headers().get_all(CONNECTION).iter();
        let says_close = |value: &HeaderValue| {
            value.to_str().map_or(true, |text| text.to_ascii_lowercase().contains("close"))
        };
        self.is_plain.set(request.version() == Version::HTTP_11 && !options.any(says_close));
    }

    /// Remembers the answer to it.
    pub fn watch(&self, passing: &Rc<Passing>) {
        if self.is_plain.get() {
            *self.passing.borrow_mut() = Rc::downgrade(passing);
        }
    }

    /// The answer that is being passed on.
    #[must_use]
    pub fn passing(&self) -> Option<Rc<Passing>> {
        self.passing.borrow().upgrade()
    }
}

/// What a request asks to upgrade to, if it is one that may.
pub fn wanted<B: HttpBody>(request: &Request<B>, port: GuestPort) -> Option<HeaderValue> {
    let headers = request.headers();
    let guarded = matches!(port, GuestPort::ENVD | GuestPort::CODE_INTERPRETER);
    if request.version() != Version::HTTP_11 || guarded || !request.body().is_end_stream() {
        return None;
    }
    let names_it = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    let mut values = headers.get_all(UPGRADE).iter();
    let (value, None) = (values.next()?, values.next()) else { return None };
    let is_http = |protocol: &str| {
        let name = protocol.trim().split('/').next().unwrap_or_default();
        name.is_empty() || ["h2", "h2c", "http", "tls"].iter().any(|n| name.eq_ignore_ascii_case(n))
    };
    let offers_http = value.to_str().map_or(true, |text| text.split(',').any(is_http));
    (names_it && !offers_http).then(|| value.clone())
}

/// Puts back what [`super::headers`] took away as the business of one hop: now it is of both.
pub fn announce(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

/// Whether an answer leaves HTTP.
#[must_use]
pub fn is_switch(status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{Empty, Full};

    fn asks(headers: &[(&str, &str)], port: u16) -> Option<HeaderValue> {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        wanted(&request, GuestPort::new(port).unwrap())
    }

    #[test]
    fn an_upgrade_is_asked_for_by_both_headers() {
        let both = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        assert_eq!(asks(&both, 8000).unwrap(), "websocket");
        assert!(asks(&both[..1], 8000).is_none() && asks(&both[1..], 8000).is_none());
        assert!(asks(&both, 49983).is_none() && asks(&both, 49999).is_none(), "guarded ports");
        let twice = [both[0], both[1], ("upgrade", "tcp")];
        assert!(asks(&twice, 8000).is_none());
    }

    #[test]
    fn http_is_no_upgrade() {
        for protocol in ["h2c", "H2C", "websocket, h2c", "HTTP/2.0", "TLS/1.3", "", "\t", "h2"] {
            let headers = [("connection", "upgrade"), ("upgrade", protocol)];
            assert!(asks(&headers, 8000).is_none(), "{protocol}");
        }
    }

    #[test]
    fn a_request_with_a_body_or_of_another_version_stays_http() {
        let request = || Request::builder().header("connection", "upgrade").header("upgrade", "x");
        let port = GuestPort::new(8000).unwrap();
        let body = request().body(Full::new(Bytes::from_static(b"x"))).unwrap();
        assert!(wanted(&body, port).is_none());
        for (version, upgrades) in [(Version::HTTP_10, false), (Version::HTTP_11, true)] {
            let request = request().version(version).body(Empty::<Bytes>::new()).unwrap();
            assert_eq!(wanted(&request, port).is_some(), upgrades, "{version:?}");
        }
    }
}
