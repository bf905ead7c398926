//! What a client did wrong before its request could be understood, or what its connection may not do.
//!
//! Called by the connection driver, and by [`crate::body`]. Refuses nothing itself.

use hyper::{Method, StatusCode};

use super::ApiError;

impl ApiError {
    /// A control-plane body is longer than it may be.
    #[must_use]
    pub fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("the request body is longer than {bytes_max} bytes; send less");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    /// A control-plane body did not arrive in time.
    #[must_use]
    pub fn body_too_slow() -> Self {
        let message = "the request body did not arrive in time; send it at once";
        Self::new(StatusCode::REQUEST_TIMEOUT, message)
    }

    /// A request head did not arrive in time.
    #[must_use]
    pub fn head_too_slow() -> Self {
        let message = "the request head did not arrive in time; send it at once";
        Self::new(StatusCode::REQUEST_TIMEOUT, message)
    }

    /// A request head is longer than it may be.
    #[must_use]
    pub fn head_too_large() -> Self {
        let message = "the request has too many or too long headers; send fewer";
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message)
    }

    /// A request line is longer than it may be.
    #[must_use]
    pub fn uri_too_long() -> Self {
        Self::new(StatusCode::URI_TOO_LONG, "the request target is too long; shorten it")
    }

    /// The bytes are not a request.
    #[must_use]
    pub fn not_http() -> Self {
        Self::bad_request("this is not a valid HTTP/1.1 request; correct its head")
    }

    /// The listener takes TLS alone.
    #[must_use]
    pub fn in_the_clear() -> Self {
        Self::bad_request("this port takes TLS alone; use https")
    }

    /// `CONNECT` is for proxies of another kind.
    #[must_use]
    pub fn no_tunnels() -> Self {
        Self::method_not_allowed(&Method::CONNECT, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
    }

    /// The shard has as many connections as it may.
    #[must_use]
    pub fn too_many_connections() -> Self {
        let message = "this host has as many connections as it may; try again in a moment";
        Self::soon(StatusCode::SERVICE_UNAVAILABLE, message)
    }
}
