//! How the errors of builds look to a client.
//!
//! Called through `?` by the handlers of builds. Refuses to show paths of the host, as [`super::host`] does.

use hyper::StatusCode;
use mica_shards::{BuildStoreError, ShardError};

use super::ApiError;

impl ApiError {
    /// What was asked for is not there.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// Something else stands in the way.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// Any other answer.
    #[must_use]
    pub fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, message)
    }
}

impl From<BuildStoreError> for ApiError {
    fn from(error: BuildStoreError) -> Self {
        match error {
            BuildStoreError::TooMany(text) => Self::new(StatusCode::TOO_MANY_REQUESTS, text),
            BuildStoreError::NameTaken(text) => Self::conflict(text),
            BuildStoreError::Store(error) => {
                let operation = "keeping builds";
                ShardError::from_storage(operation, error).into()
            }
        }
    }
}
