//! Errors of RPCs: a Connect code, a message, and the HTTP status of the code.
//!
//! Called by every RPC handler. Refuses codes that the protocol does not have.

use std::io::ErrorKind;

use http::StatusCode;
use serde::Serialize;

use crate::http::error::chain;
use crate::users::UserError;

/// The codes of the Connect protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The caller gave up.
    Canceled,
    /// Nothing better is known.
    Unknown,
    /// The request is wrong whatever the state.
    InvalidArgument,
    /// The request took longer than its deadline.
    DeadlineExceeded,
    /// What it names is not there.
    NotFound,
    /// What it would make is there.
    AlreadyExists,
    /// The operating system does not let the user.
    PermissionDenied,
    /// A limit is reached.
    ResourceExhausted,
    /// The state does not let it.
    FailedPrecondition,
    /// Not implemented.
    Unimplemented,
    /// A fault of ours.
    Internal,
    /// Try again.
    Unavailable,
    /// Who are you.
    Unauthenticated,
}

impl Code {
    /// The HTTP status of a unary error.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::Canceled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
            Self::InvalidArgument | Self::FailedPrecondition => StatusCode::BAD_REQUEST,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::AlreadyExists => StatusCode::CONFLICT,
            Self::PermissionDenied => StatusCode::FORBIDDEN,
            Self::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Self::Unknown | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
        }
    }
}

/// Why an RPC failed; serialises to the protocol's own error object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct ConnectError {
    /// What kind.
    pub code: Code,
    /// What to tell the client.
    pub message: String,
}

impl ConnectError {
    /// An error of this code.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// `invalid_argument`.
    #[must_use]
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    /// `not_found`.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// `internal`.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// The error of an operating system call on behalf of the user: `what` names the operation.
    #[must_use]
    pub fn io(what: &str, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::AlreadyExists => Code::AlreadyExists,
            ErrorKind::PermissionDenied => Code::PermissionDenied,
            ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::InvalidInput
            | ErrorKind::InvalidFilename => Code::InvalidArgument,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::ResourceExhausted,
            _ => Code::Internal,
        };
        Self::new(code, format!("{what}: {error}"))
    }
}

impl From<UserError> for ConnectError {
    fn from(error: UserError) -> Self {
        let code = match error {
            UserError::Unknown(_) => Code::Unauthenticated,
            UserError::Read { .. } => Code::Internal,
        };
        Self::new(code, chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_its_wire_form() {
        let error = ConnectError::not_found("no process with pid 7");
        let text = serde_json::to_string(&error).unwrap();
        assert_eq!(text, r#"{"code":"not_found","message":"no process with pid 7"}"#);
        assert_eq!(error.code.status(), 404);
        let error = ConnectError::new(Code::DeadlineExceeded, "x");
        assert!(serde_json::to_string(&error).unwrap().contains(r#""deadline_exceeded""#));
    }

    #[test]
    fn system_errors_keep_their_meaning() {
        let missing = std::fs::metadata("/no/such/file").unwrap_err();
        assert_eq!(ConnectError::io("stat", &missing).code, Code::NotFound);
        let not_a_dir = std::fs::read_dir("/etc/passwd").unwrap_err();
        assert_eq!(ConnectError::io("list", &not_a_dir).code, Code::InvalidArgument);
    }
}
