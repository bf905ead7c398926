//! The front end of one shard: accept, decide whom a request is for, answer, drain.
//!
//! Called by [`crate::serve`]'s caller once on every shard. Refuses more connections than its
//! limit, and to live longer than the drain time once it was asked to stop.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use futures_lite::FutureExt;
use hyper::body::Incoming;
use hyper::header::{ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue};
use hyper::http::uri;
use hyper::{Method, Request, Response, Uri};
use mica_shards::metrics::Source;
use mica_shards::rt::net::{TcpListener, TcpStream};
use mica_shards::rt::{self, time};
use mica_shards::{Host, StopSignal};
use mica_units::{GuestPort, SandboxId};

use crate::body::{self, Body};
use crate::config::HttpConfig;
use crate::conn::Accepts;
use crate::error::{self, ApiError};
use crate::ops::{Requests, Served};
use crate::proxy::origin::{self, Cookies};
use crate::proxy::signature::Searches;
use crate::proxy::target::{Target, target};
use crate::proxy::token::Holders;
use crate::proxy::{Kept, Proxy, Switch};
use crate::{api, conn};

/// How long accepting rests when the process is out of descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(50);

/// Connections that are being told that there are too many.
const TURNED_AWAY_MAX: usize = 100;

/// Why a shard's front end does not come up.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}; choose another with --listen")]
pub struct ListenError {
    address: std::net::SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Serves until `stop`, then until every connection is done or the drain time is over.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(host: Host, config: HttpConfig, stop: StopSignal) -> Result<(), ListenError> {
    let listener = bind(config.listen)?;
    let shared = config.tls.as_ref().map(|tls| Arc::clone(&tls.config));
    let tls_alone = match &config.tls {
        Some(tls) => tls.listen.map(bind).transpose()?.zip(Some(Arc::clone(&tls.config))),
        None => None,
    };
    tracing::info!(
        shard = host.shard().index(),
        listen = %config.listen,
        tls = config.tls.is_some(),
        "serving"
    );
    let proxy = Proxy::new(host.clone(), config.limits.clone());
    let (searches, holders) = (Searches::default(), Holders::default());
    let connections = Connections::default();
    let requests = host.has_metrics().then(Requests::new);
    if let Some(requests) = &requests {
        host.add_source(Rc::clone(requests) as Rc<dyn Source>);
    }
    let front = Rc::new(Front { host, config, proxy, connections, searches, holders, requests });
    let both = front.accept_all(&listener, Accepts::Both(shared));
    let alone = async {
        match &tls_alone {
            Some((listener, config)) => {
                front.accept_all(listener, Accepts::TlsOnly(Arc::clone(config))).await;
            }
            None => std::future::pending().await,
        }
    };
    both.or(alone).or(stop.stopped()).await;
    drop((listener, tls_alone));
    front.connections.stop();
    let drained = time::timeout(front.config.limits.drain_timeout, front.connections.empty()).await;
    if drained.is_err() {
        let cut = front.connections.count();
        tracing::warn!(cut, "the drain time is over; cutting the connections that are left");
    }
    Ok(())
}

fn bind(address: std::net::SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).map_err(|source| ListenError { address, source })
}

#[derive(Debug)]
struct Front {
    host: Host,
    config: HttpConfig,
    proxy: Proxy,
    connections: Connections,
    searches: Searches,
    holders: Holders,
    /// What it served; none where that is not counted.
    requests: Option<Rc<Requests>>,
}

impl Front {
    async fn accept_all(self: &Rc<Self>, listener: &TcpListener, accepts: Accepts) {
        loop {
            self.accept(listener, &accepts).await;
        }
    }

    async fn accept(self: &Rc<Self>, listener: &TcpListener, accepts: &Accepts) {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; resting");
                time::sleep(ACCEPT_REST).await;
                return;
            }
        };
        let front = Rc::clone(self);
        let most = self.config.limits.connections_max;
        if self.connections.count() < most {
            let entry = self.connections.enter();
            let accepts = accepts.clone();
            rt::spawn(async move { front.connection(stream, &accepts, &entry).await }).detach();
        } else if self.connections.count() < most.saturating_add(TURNED_AWAY_MAX) {
            let entry = self.connections.enter();
            rt::spawn(async move {
                let turned_away = conn::hang_up(stream, Some(ApiError::too_many_connections()));
                turned_away.or(entry.stopped()).await;
            })
            .detach();
        }
    }

    async fn connection(self: Rc<Self>, stream: TcpStream, accepts: &Accepts, entry: &Entry) {
        let (front, kept) = (Rc::clone(&self), self.proxy.client());
        let answer = move |request, switch: Option<Rc<Switch>>| {
            let (front, kept) = (Rc::clone(&front), Rc::clone(&kept));
            async move { front.answer(request, switch.as_deref(), &kept).await }
        };
        conn::drive(stream, accepts, &self.config.limits, entry, answer).await;
    }

    /// Answers a request, and counts the answer.
    async fn answer(
        &self,
        request: Request<Incoming>,
        switch: Option<&Switch>,
        kept: &Rc<Kept>,
    ) -> Response<Body> {
        let Some(requests) = &self.requests else {
            return self.serve(request, switch, kept, &Cell::new(Served::Nothing)).await;
        };
        let (began, served) = (time::Instant::now(), Cell::new(Served::Nothing));
        let response = self.serve(request, switch, kept, &served).await;
        requests.answered(served.get(), response.status(), began);
        response
    }

    async fn serve(
        &self,
        request: Request<Incoming>,
        switch: Option<&Switch>,
        kept: &Rc<Kept>,
        served: &Cell<Served>,
    ) -> Response<Body> {
        let prefers_page = error::prefers_page(request.headers());
        let target = self.whom(&request).await;
        if let Ok(Target::Sandbox(..) | Target::Shared(..) | Target::Path(..)) = &target {
            served.set(Served::Sandbox);
        }
        let outcome = match target {
            Ok(Target::ControlPlane | Target::SignedFile | Target::TokenHolder) => {
                // In a box: what an answer of ours needs, one of a sandbox has no use for.
                let answer = Box::pin(api::answer(&self.host, &self.config, request, served));
                return open_to_browsers(answer.await);
            }
            Ok(Target::Sandbox(id, port)) => {
                self.proxy.forward(id, port, request, switch, kept).await
            }
            Ok(Target::Shared(id, port)) => {
                let confined = self.confined(id, port, request, switch, kept);
                confined.await.map(|answer| confine(answer, &Cookies::by_header(port)))
            }
            Ok(Target::Path(id, port, rest)) => {
                let confined = self.confined(id, port, with_path(request, rest), switch, kept);
                confined.await.map(|answer| confine(answer, &Cookies::by_path(id, port)))
            }
            Err(error) => refuse(request, error).await,
        };
        let refused = |error: ApiError| open_to_browsers(error.into_proxy_response(prefers_page));
        outcome.unwrap_or_else(refused)
    }

    /// Passes a request on that came under a name of this host.
    async fn confined(
        &self,
        id: SandboxId,
        port: GuestPort,
        request: Request<Incoming>,
        switch: Option<&Switch>,
        kept: &Rc<Kept>,
    ) -> Result<Response<Body>, ApiError> {
        if origin::is_service_worker(request.headers()) {
            return refuse(request, ApiError::no_service_worker()).await;
        }
        self.proxy.forward(id, port, request, switch, kept).await
    }

    /// Whom a request is for, with signatures and tokens looked up.
    async fn whom(&self, request: &Request<Incoming>) -> Result<Target, ApiError> {
        let (method, uri) = (request.method(), request.uri());
        if method == Method::CONNECT {
            return Err(ApiError::no_tunnels());
        }
        let domain = self.config.domain.as_deref();
        match target(request.version(), method, uri, request.headers(), domain)? {
            Target::SignedFile => {
                let id = self.searches.find(&self.host, method, uri).await?;
                Ok(Target::Shared(id, GuestPort::ENVD))
            }
            Target::TokenHolder => {
                let found = self.holders.find(&self.host, &self.searches, request.headers());
                Ok(Target::Shared(found.await?, GuestPort::ENVD))
            }
            other => Ok(other),
        }
    }
}

/// Answers with an error, when what the client still sends is out of the way.
async fn refuse(request: Request<Incoming>, error: ApiError) -> Result<Response<Body>, ApiError> {
    let (parts, unread) = request.into_parts();
    body::discard(&parts.headers, unread).await;
    Err(error)
}

/// Takes from an answer what no sandbox may say under a name of this host.
fn confine(mut answer: Response<Body>, cookies: &Cookies) -> Response<Body> {
    origin::confine(answer.headers_mut(), cookies);
    answer
}

/// The same request for another path of the same host.
fn with_path(mut request: Request<Incoming>, path: uri::PathAndQuery) -> Request<Incoming> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.path_and_query = Some(path.clone());
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_else(|_| Uri::from(path));
    request
}

/// Lets pages of any origin read the answer. A sandbox decides that for its own answers.
fn open_to_browsers(mut response: Response<Body>) -> Response<Body> {
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    let exposed = HeaderValue::from_static("x-next-token, x-total-running, retry-after");
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    response
}

/// The connections of one shard, to be counted and told to stop. Each costs one descriptor
/// already; waiting for the stop signal on each would cost a second.
#[derive(Clone, Debug, Default)]
struct Connections(Rc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    stopping: Cell<bool>,
    next_key: Cell<u64>,
    live: RefCell<BTreeMap<u64, Option<Waker>>>,
    drainer: RefCell<Option<Waker>>,
}

impl Connections {
    fn count(&self) -> usize {
        self.0.live.borrow().len()
    }

    fn enter(&self) -> Entry {
        let key = self.0.next_key.get();
        self.0.next_key.set(key.wrapping_add(1));
        self.0.live.borrow_mut().insert(key, None);
        Entry { key, shared: Rc::clone(&self.0) }
    }

    fn stop(&self) {
        self.0.stopping.set(true);
        let wakers: Vec<Waker> =
            self.0.live.borrow_mut().values_mut().filter_map(Option::take).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    async fn empty(&self) {
        poll_fn(|cx| {
            if self.count() == 0 {
                return Poll::Ready(());
            }
            *self.0.drainer.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// One live connection. Dropping it ends its count.
#[derive(Debug)]
pub struct Entry {
    key: u64,
    shared: Rc<Shared>,
}

impl Entry {
    /// Waits until the shard was asked to stop.
    pub async fn stopped(&self) {
        poll_fn(|cx| {
            if self.shared.stopping.get() {
                return Poll::Ready(());
            }
            let mut live = self.shared.live.borrow_mut();
            live.insert(self.key, Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.live.borrow_mut().remove(&self.key);
        let drainer = self.shared.drainer.borrow_mut().take();
        if let Some(waker) = drainer {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::block_on;

    #[test]
    fn connections_are_counted_told_to_stop_and_waited_for() {
        block_on(async {
            let connections = Connections::default();
            let (a, b) = (connections.enter(), connections.enter());
            assert_eq!(connections.count(), 2);
            let early = async {
                a.stopped().await;
                true
            };
            assert!(!early.or(async { false }).await, "nobody asked yet");
            connections.stop();
            a.stopped().await;
            drop(a);
            assert_eq!(connections.count(), 1);
            let waits = async {
                connections.empty().await;
                false
            };
            let first = waits.or(async { true });
            assert!(first.await, "one is still open");
            drop(b);
            connections.empty().await;
        });
    }
}
