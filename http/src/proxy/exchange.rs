//! One request and its answer on a stream into a guest.
//!
//! Called by [`super`]. gRPC is spoken as HTTP/2 with prior knowledge, because its servers understand
//! nothing else; everything else as HTTP/1.1. Neither side's body is held beyond a frame. Refuses an
//! answer that leaves HTTP when nobody asked for it.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures_lite::AsyncRead;
use hyper::client::conn::http2;
use hyper::header::{TRAILER, UPGRADE};
use hyper::{Method, Request, Response};
use mica_shards::GuestStream;
use mica_shards::rt;

use super::answer::{BodyReader, Head, HeadReader, Malformed};
use super::answering::{Answering, Beside, FromSandbox, Passing, READ_BYTES, Return};
use super::outgoing::{Outgoing, Unsent};
use super::repeat::{Heard, Listening, Upload};
use super::streams::Open;
use super::upgrade::{self, Switch, Tunnel};
use super::{grpc, headers};
use crate::body::Body;
use crate::conn::{Adapted, OnShard};

/// Bytes of the head of an answer over HTTP/2.
const RESPONSE_HEAD_BYTES_MAX: u32 = 64 * 1024;
const WINDOW_BYTES: u32 = 256 * 1024;
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Why there was no answer.
pub struct Failure {
    /// What broke.
    pub error: Broken,
    /// Whether the sandbox said anything.
    pub heard: bool,
    /// The request, if no byte of it was sent.
    pub unsent: Option<Box<Request<Upload>>>,
}

/// What can break.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A call over HTTP/2.
    #[error(transparent)]
    Call(#[from] hyper::Error),
    /// The request was not sent to its end.
    #[error(transparent)]
    Unsent(#[from] Unsent),
    /// The stream ended.
    #[error("the stream into the sandbox broke")]
    Stream(#[from] std::io::Error),
    /// The answer is none.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The sandbox left HTTP by itself.
    #[error("the sandbox switched to a protocol that nobody asked for")]
    Switched,
}

/// A stream that waits for its request.
pub struct Line {
    /// The stream.
    pub stream: GuestStream,
    /// Its count.
    pub open: Open,
    /// Where it goes when it has served the request.
    pub then: Return,
}

/// Sends the request and waits for the head of the answer. An answer that leaves HTTP is left at
/// `switch`, if the request asked for one.
pub async fn exchange(
    line: Line,
    request: Request<Upload>,
    switch: Option<&Switch>,
) -> Result<Response<Body>, Failure> {
    if grpc::is_call(&request) {
        return Box::pin(over_h2(line, grpc::for_sandbox(request))).await;
    }
    over_h1(line, request, switch).await
}

/// A request over HTTP/1.1, and how far it is.
struct Asking {
    stream: GuestStream,
    outgoing: Outgoing,
    is_sent: bool,
    /// The stream takes no more, which need not mean that the server says no more.
    refused: Option<Unsent>,
    answer: HeadReader,
    heard: bool,
}

impl Asking {
    /// Sends and reads until there is a head.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(Head, Vec<u8>), Broken>> {
        if !self.is_sent && self.refused.is_none() {
            match self.outgoing.poll_send(cx, &mut self.stream) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.is_sent = true,
                Poll::Ready(Err(refused @ Unsent::Stream(_))) => self.refused = Some(refused),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            }
        }
        loop {
            let mut scratch = [0; READ_BYTES];
            let count = match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut scratch)) {
                Ok(0) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                other => other,
            };
            let count = match (count, self.refused.take()) {
                (Err(_), Some(refused)) => return Poll::Ready(Err(refused.into())),
                (count, refused) => {
                    self.refused = refused;
                    count?
                }
            };
            self.heard = true;
            if let Some(answer) = self.answer.take(&scratch[..count])? {
                return Poll::Ready(Ok(answer));
            }
        }
    }
}

async fn over_h1(
    line: Line,
    request: Request<Upload>,
    switch: Option<&Switch>,
) -> Result<Response<Body>, Failure> {
    let Line { stream, open, then } = line;
    let asked = request.headers().contains_key(UPGRADE);
    let to_head = *request.method() == Method::HEAD;
    let (parts, body) = request.into_parts();
    let outgoing = Outgoing::new(&parts, body);
    let answer = HeadReader::new(to_head);
    let mut asking =
        Asking { stream, outgoing, is_sent: false, refused: None, answer, heard: false };
    let (head, early) = match poll_fn(|cx| asking.poll(cx)).await {
        Ok(answer) => answer,
        Err(error) => {
            let unsent = asking.outgoing.untouched();
            let unsent = unsent.map(|body| Box::new(Request::from_parts(parts, body)));
            return Err(Failure { error, heard: asking.heard, unsent });
        }
    };
    let switched = || Failure { error: Broken::Switched, heard: true, unsent: None };
    let Head { status, reason, mut fields, framing, may_go_on } = head;
    let protocol = fields.get(UPGRADE).cloned();
    headers::clean_response(&mut fields);
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    *response.headers_mut() = fields;
    if let Some(reason) = reason {
        response.extensions_mut().insert(reason);
    }
    let Asking { stream, outgoing, is_sent, .. } = asking;
    if upgrade::is_switch(status) {
        let (Some(switch), Some(protocol), true, true) = (switch, protocol, asked, is_sent) else {
            return Err(switched());
        };
        upgrade::announce(response.headers_mut(), protocol);
        switch.put(Tunnel { guest: stream, early, _open: open });
        return Ok(response);
    }
    let stream = Rc::new(RefCell::new(stream));
    let upload = (!is_sent).then(|| send_the_rest(outgoing, Rc::clone(&stream)));
    let mut answering = Answering {
        stream: Some(stream),
        body: BodyReader::new(framing),
        early,
        upload,
        then: may_go_on.then_some(then),
        open: Some(open),
    };
    if answering.body.is_done() {
        answering.end(!answering.early.is_empty());
        return Ok(response);
    }
    let passing = Passing::new(answering);
    if let Some(switch) = switch
        && !response.headers().contains_key(TRAILER)
    {
        switch.watch(&passing);
    }
    Ok(response.map(|_| Body::sandbox(FromSandbox::H1(passing))))
}

/// What is left of a request whose answer has begun.
fn send_the_rest(mut outgoing: Outgoing, stream: Rc<RefCell<GuestStream>>) -> Beside {
    Beside::new(rt::spawn(async move {
        let sent = poll_fn(|cx| outgoing.poll_send(cx, &mut *stream.borrow_mut())).await;
        if let Err(error) = sent {
            tracing::debug!(%error, "a request was not sent to its end");
        }
    }))
}

async fn over_h2(line: Line, request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let heard = Heard::default();
    let failure =
        |error: hyper::Error| Failure { error: error.into(), heard: heard.get(), unsent: None };
    let (mut sender, connection) = http2::Builder::new(OnShard)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .max_header_list_size(RESPONSE_HEAD_BYTES_MAX)
        .handshake(Adapted(Listening::new(line.stream, Rc::clone(&heard))))
        .await
        .map_err(failure)?;
    let driver = Beside::new(rt::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "stream into a sandbox ended");
        }
    }));
    let mut response = sender.try_send_request(request).await.map_err(|mut error| {
        let unsent = error.take_message().map(Box::new);
        Failure { unsent, ..failure(error.into_error()) }
    })?;
    headers::clean_response(response.headers_mut());
    Ok(response
        .map(|body| Body::sandbox(FromSandbox::Call { body, _driver: driver, _open: line.open })))
}
