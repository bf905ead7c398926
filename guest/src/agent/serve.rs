//! Serves HTTP on a stream and tells the console only what is worth it.
//!
//! Called by the gateway and the loopback listeners. Refuses to log a client that merely went
//! away: a guest's user could fill the console with it.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::http::{self, Router};

/// Serves one connection to its end.
pub async fn connection<S: AsyncRead + AsyncWrite + Unpin>(stream: S, router: Arc<Router>) {
    // Whatever broke the connection off was the client's doing or its loss; it has been answered
    // as far as it could be.
    drop(http::serve(stream, router).await);
}
