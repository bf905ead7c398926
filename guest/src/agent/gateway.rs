//! One connection from the host: preamble, verdict, and whom it is for.
//!
//! Called by the listeners for every connection of the gateway. Refuses anything but control
//! before the sandbox has its identity, and a preamble that takes its time.
//!
//! A connection belongs to the sandbox that it was made to. The host resets those of a saved state
//! when it restores it; whatever is left of one here ends, too, as soon as the guest is told that
//! it is another sandbox.

use std::sync::Arc;
use std::time::Duration;

use mica_units::GuestPort;
use mica_wire::guest::{PREAMBLE_BYTES, Preamble, Verdict};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::control::Control;
use super::{relay, serve};
use crate::http::Router;
use crate::sandbox::Sandbox;

/// How long the host may take for its eight bytes.
const PREAMBLE_LIMIT: Duration = Duration::from_secs(30);

/// What stands behind the gateway.
#[derive(Debug)]
pub struct Gateway {
    sandbox: Arc<Sandbox>,
    control: Control,
    envd: Arc<Router>,
    interpreter: Option<Arc<Router>>,
}

impl Gateway {
    /// A gateway to these services.
    pub fn new(
        sandbox: Arc<Sandbox>,
        control: Control,
        envd: Arc<Router>,
        interpreter: Option<Arc<Router>>,
    ) -> Self {
        Self { sandbox, control, envd, interpreter }
    }

    /// envd's routes.
    pub fn envd(&self) -> Arc<Router> {
        Arc::clone(&self.envd)
    }

    /// The code interpreter's routes, where the template has one.
    pub fn interpreter(&self) -> Option<Arc<Router>> {
        self.interpreter.clone()
    }

    /// Serves one connection to its end.
    pub async fn handle<S>(self: Arc<Self>, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        // The host sees a closed connection and knows; the guest's console need not.
        drop(self.route(stream).await);
    }

    async fn route<S>(&self, mut stream: S) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let replaced = self.sandbox.replaced();
        let mut bytes = [0; PREAMBLE_BYTES];
        tokio::time::timeout(PREAMBLE_LIMIT, stream.read_exact(&mut bytes)).await??;
        let port = match Preamble::decode(bytes) {
            Ok(Preamble::Control) => {
                say(&mut stream, Verdict::Open).await?;
                return self.control.exchange(stream).await;
            }
            Ok(Preamble::Tcp(port)) => port,
            Err(_) => return say(&mut stream, Verdict::BadPreamble).await,
        };
        if self.sandbox.identity().is_none() {
            return say(&mut stream, Verdict::Refused).await;
        }
        tokio::select! {
            biased;
            () = replaced => Ok(()),
            carried = self.carry(stream, port) => carried,
        }
    }

    /// Bytes between the host and a port.
    async fn carry<S>(&self, mut stream: S, port: GuestPort) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        if let Some(router) = self.service(port) {
            say(&mut stream, Verdict::Open).await?;
            serve::connection(stream, router).await;
            return Ok(());
        }
        match relay::connect(port).await {
            Some(tcp) => {
                say(&mut stream, Verdict::Open).await?;
                relay::relay(stream, tcp).await
            }
            None => say(&mut stream, Verdict::Refused).await,
        }
    }

    fn service(&self, port: GuestPort) -> Option<Arc<Router>> {
        match port {
            GuestPort::ENVD => Some(self.envd()),
            GuestPort::CODE_INTERPRETER => self.interpreter(),
            _ => None,
        }
    }
}

async fn say<S: AsyncWrite + Unpin>(stream: &mut S, verdict: Verdict) -> std::io::Result<()> {
    stream.write_all(&[verdict as u8]).await?;
    stream.flush().await
}
