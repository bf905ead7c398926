//! Where connections come from: vsock or a Unix socket for the host, loopback TCP for programs in
//! the guest.
//!
//! Called by the agent. Refuses more than [`CONNECTIONS_MAX`] connections at a time on each: the
//! next one waits in the kernel's queue.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mica_wire::guest::{DOORBELL_PORT, GATEWAY_PORT};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::gateway::Gateway;
use super::serve;
use crate::http::Router;

/// Most connections of one listener at a time.
const CONNECTIONS_MAX: usize = 1024;

/// Before the next try after an accept that failed, which happens when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long the doorbell may ring.
const DOORBELL_LIMIT: Duration = Duration::from_secs(10);

/// Why the gateway does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// vsock.
    #[error("cannot listen on vsock port {GATEWAY_PORT}; is the vsock module loaded?")]
    Vsock(#[source] std::io::Error),
    /// A Unix socket.
    #[error("cannot listen on {path}")]
    Unix {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The ready line.
    #[error("cannot print the ready line")]
    Ready(#[source] std::io::Error),
}

/// Takes connections for ever, a bounded number at a time.
async fn accept_all<S, A, Af, H, Hf>(accept: A, handle: H)
where
    A: Fn() -> Af,
    Af: Future<Output = std::io::Result<S>>,
    H: Fn(S) -> Hf,
    Hf: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match accept().await {
            Ok(stream) => {
                let work = handle(stream);
                tokio::spawn(async move {
                    work.await;
                    drop(permit);
                });
            }
            Err(error) => {
                eprintln!("mica-guest: cannot take a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves the gateway on vsock, after ringing the doorbell.
pub async fn vsock(gateway: Arc<Gateway>) -> Result<(), ListenError> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, GATEWAY_PORT))
        .map_err(ListenError::Vsock)?;
    tokio::spawn(ring_doorbell());
    let accept = async || listener.accept().await.map(|(stream, _)| stream);
    accept_all(accept, |stream| Arc::clone(&gateway).handle(stream)).await;
    Ok(())
}

/// The attempt is the message: it is always reset.
async fn ring_doorbell() {
    let address = VsockAddr::new(VMADDR_CID_HOST, DOORBELL_PORT);
    match tokio::time::timeout(DOORBELL_LIMIT, VsockStream::connect(address)).await {
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Ok(Ok(_)) => {}
        Ok(Err(error)) => eprintln!("mica-guest: the doorbell answered: {error}"),
        Err(_) => eprintln!("mica-guest: nobody answered the doorbell"),
    }
}

/// Serves the gateway on a Unix socket, after printing `ready`.
pub async fn unix(path: &Path, gateway: Arc<Gateway>) -> Result<(), ListenError> {
    let fail = |source| ListenError::Unix { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    {
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        out.write_all(b"ready\n").and_then(|()| out.flush()).map_err(ListenError::Ready)?;
    }
    let accept = async || listener.accept().await.map(|(stream, _)| stream);
    accept_all(accept, |stream| Arc::clone(&gateway).handle(stream)).await;
    Ok(())
}

/// Serves one router on loopback TCP, if there is an address and it is free.
pub async fn loopback(address: Option<SocketAddr>, router: Arc<Router>) {
    let Some(address) = address else { return };
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("mica-guest: cannot listen on {address}: {error}");
            return;
        }
    };
    tokio::spawn(async move {
        let accept = async || {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        accept_all(accept, |stream| serve::connection(stream, Arc::clone(&router))).await;
    });
}
