//! What the proxy answers itself about a request under a name of this host.
//!
//! Called by [`crate::proxy`] and [`crate::serve`]. Refuses nothing itself.

use hyper::StatusCode;

use super::ApiError;

impl ApiError {
    /// A request for an agent shows a token that no sandbox has: in the words for a sandbox that is gone,
    /// because that is what it was most likely for.
    #[must_use]
    pub fn unknown_token() -> Self {
        let message = "The sandbox was not found: no sandbox here has this X-Access-Token; it may have \
                       ended. Send E2b-Sandbox-Id and E2b-Sandbox-Port to be told more";
        Self::new(StatusCode::BAD_GATEWAY, message)
    }

    /// A service worker under the host's own name would see requests to the control plane.
    #[must_use]
    pub fn no_service_worker() -> Self {
        let message = "a sandbox may not install a service worker under a name of this host; open the \
                       page under the sandbox's own name, PORT-ID.DOMAIN";
        Self::new(StatusCode::FORBIDDEN, message)
    }
}
