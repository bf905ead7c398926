//! HTTP/2 with prior knowledge: a client, and a server for sandboxes to have.
//!
//! Called by the tests of HTTP/2 and of TLS. Refuses to be helpful, as the client beside it.

use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::client::PATIENCE;

/// One connection.
pub struct H2 {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
}

/// One answer.
#[derive(Debug)]
pub struct H2Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: Option<HeaderMap>,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn tokio_stream(stream: TcpStream) -> tokio::net::TcpStream {
    stream.set_nonblocking(true).expect("a mode");
    tokio::net::TcpStream::from_std(stream).expect("a stream")
}

impl H2 {
    pub fn open(stream: TcpStream) -> Self {
        let runtime = runtime();
        let sender = runtime.block_on(async {
            let (sender, connection) =
                h2::client::handshake(tokio_stream(stream)).await.expect("a handshake");
            tokio::spawn(connection);
            sender
        });
        Self { runtime, sender }
    }

    /// Sends requests at once, and gives the answers in their order.
    pub fn ask_all(&mut self, requests: Vec<(Request<()>, Vec<Bytes>)>) -> Vec<H2Reply> {
        let sender = self.sender.clone();
        let work = async {
            let mut sender = sender.ready().await.expect("room for a stream");
            let mut asked = Vec::new();
            for (request, body) in requests {
                let (reply, mut stream) =
                    sender.send_request(request, body.is_empty()).expect("a stream");
                let last = body.len();
                for (number, part) in (1..).zip(body) {
                    stream.send_data(part, number == last).expect("data");
                }
                asked.push(reply);
                sender = sender.ready().await.expect("room for a stream");
            }
            let mut replies = Vec::new();
            for reply in asked {
                replies.push(collect(reply.await.expect("a reply")).await);
            }
            replies
        };
        self.runtime.block_on(async { timeout(PATIENCE, work).await.expect("in time") })
    }

    pub fn ask(&mut self, request: Request<()>, body: Vec<Bytes>) -> H2Reply {
        self.ask_all(vec![(request, body)]).pop().expect("one reply")
    }

    /// Streams that the server lets this connection have.
    pub fn streams_max(&self) -> usize {
        self.sender.current_max_send_streams()
    }
}

async fn collect(response: Response<h2::RecvStream>) -> H2Reply {
    let (parts, mut stream) = response.into_parts();
    let mut body = Vec::new();
    while let Some(part) = stream.data().await {
        let part = part.expect("data");
        stream.flow_control().release_capacity(part.len()).expect("a window");
        body.extend_from_slice(&part);
    }
    let trailers = stream.trailers().await.expect("an end");
    H2Reply { status: parts.status, headers: parts.headers, body, trailers }
}

/// A server of HTTP/2 alone that answers one call with what it was sent and with trailers.
pub struct Echo {
    pub port: u16,
    thread: JoinHandle<(Request<()>, Option<HeaderMap>)>,
}

impl Echo {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            let served = async { timeout(PATIENCE, echo(tokio_stream(stream))).await };
            runtime().block_on(served).expect("in time")
        });
        Self { port, thread }
    }

    /// The call as it came.
    pub fn join(self) -> (Request<()>, Option<HeaderMap>) {
        match self.thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

async fn echo(stream: tokio::net::TcpStream) -> (Request<()>, Option<HeaderMap>) {
    let mut connection = h2::server::handshake(stream).await.expect("a handshake");
    let (request, mut answer) = connection.accept().await.expect("a call").expect("a call");
    let (parts, mut body) = request.into_parts();
    let call = async move {
        let response = Response::builder().header("content-type", "application/grpc");
        let response = response.body(()).expect("a response");
        let mut sent = answer.send_response(response, false).expect("an answer");
        // Each message goes back before the next one is read.
        while let Some(part) = body.data().await {
            let part = part.expect("data");
            body.flow_control().release_capacity(part.len()).expect("a window");
            sent.send_data(part, false).expect("data");
        }
        let trailers = body.trailers().await.expect("an end");
        let mut status = HeaderMap::new();
        status.insert("grpc-status", "0".parse().expect("a value"));
        status.insert("grpc-message", "fine".parse().expect("a value"));
        sent.send_trailers(status).expect("trailers");
        trailers
    };
    let call = tokio::spawn(call);
    // The connection has to be driven until the other end has gone.
    while let Some(more) = connection.accept().await {
        if more.is_err() {
            break;
        }
    }
    (Request::from_parts(parts, ()), call.await.expect("a call"))
}
