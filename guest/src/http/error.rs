//! The error answer of the HTTP routes: a status and `{"code":int,"message":str}`.
//!
//! Called by every handler of a plain HTTP route (RPCs have their own form in `connect`). Refuses
//! a status below 400.

use http::StatusCode;
use serde::Serialize;

use super::{Response, full};

/// An answer that says what was wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HttpError {
    status: StatusCode,
    message: String,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: u16,
    message: &'a str,
}

impl HttpError {
    /// An error answer of this status; one that is not an error becomes 500.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let is_error = status.is_client_error() || status.is_server_error();
        let status = if is_error { status } else { StatusCode::INTERNAL_SERVER_ERROR };
        Self { status, message: message.into() }
    }

    /// 400.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 401.
    #[must_use]
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    /// 404.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 500, for what should not have happened.
    #[must_use]
    pub fn internal(error: &dyn std::error::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, crate::http::error::chain(error))
    }

    /// The status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The answer itself.
    #[must_use]
    pub fn into_response(self) -> Response {
        let body = ErrorBody { code: self.status.as_u16(), message: &self.message };
        // A struct of a number and a string always serialises.
        let bytes = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = Response::new(full(bytes));
        *response.status_mut() = self.status;
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/json; charset=utf-8"),
        );
        response
    }
}

/// An error and its causes, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn the_body_carries_the_status_as_a_number() {
        let response = HttpError::not_found("path '/x' does not exist").into_response();
        assert_eq!(response.status(), 404);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&body[..], br#"{"code":404,"message":"path '/x' does not exist"}"#);
    }

    #[test]
    fn a_success_is_never_an_error() {
        assert_eq!(HttpError::new(StatusCode::OK, "x").status(), 500);
    }
}
