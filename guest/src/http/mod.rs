//! HTTP/1.1 as the agent serves it: bodies, errors, routes, access, one task per connection.
//!
//! Called by the agent for each stream of envd (49983) and of the code interpreter (49999), and
//! by the services that register routes. Refuses headers and bodies over their limits, and any
//! request before the sandbox has been told who it is.

pub mod access;
pub mod body;
pub mod error;
pub mod query;
pub mod router;
pub mod server;

pub use access::{Access, FileAction};
pub use body::{Body, BodySender, channel, empty, full, read_bounded};
pub use error::HttpError;
pub use query::Query;
pub use router::{Call, Router};
pub use server::serve;

/// A request as hyper hands it over: the body not yet read.
pub type Request = http::Request<hyper::body::Incoming>;

/// An answer with any of the bodies of [`body`].
pub type Response = http::Response<Body>;

/// An answer of `status` whose body is `value` as JSON.
///
/// # Errors
/// When `value` does not serialise, which is a fault of ours and is answered as one.
pub fn json<T: serde::Serialize>(
    status: http::StatusCode,
    value: &T,
) -> Result<Response, HttpError> {
    let bytes = serde_json::to_vec(value).map_err(|error| HttpError::internal(&error))?;
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json; charset=utf-8"),
    );
    Ok(response)
}

/// An answer of `status` with nothing in it.
#[must_use]
pub fn status(status: http::StatusCode) -> Response {
    let mut response = Response::new(empty());
    *response.status_mut() = status;
    response
}
