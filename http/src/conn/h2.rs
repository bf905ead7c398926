//! A connection of HTTP/2, by prior knowledge or agreed under TLS.
//!
//! Called by [`super::drive`]. Refuses more streams at once than its limit, and a client that opens
//! streams only to reset them.

use std::pin::Pin;
use std::rc::Rc;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use mica_shards::rt::time::Instant;

use super::io::Adapted;
use super::phase::Phase;
use super::stream::ClientStream;
use super::{Answer, LINGER_TIME, OnShard, Turn, serve, turn};
use crate::config::Limits;
use crate::serve::Entry;

/// Streams of one connection at a time, as E2B's front end allows.
const STREAMS_MAX: u32 = 100;

/// What a client may send ahead of the reader: of one stream, and of all streams of a connection.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// What may wait in one stream for a client that does not read.
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Streams that a client reset before they were looked at, and streams that were reset for the
/// client's mistakes. A client with more of either is disconnected (CVE-2023-44487, CVE-2025-8671).
const RESETS_PENDING_MAX: usize = 20;
const RESETS_FOR_MISTAKES_MAX: usize = 100;

/// Serves it to its end.
pub async fn drive(
    stream: ClientStream,
    phase: Rc<Phase>,
    limits: &Limits,
    stop: &Entry,
    answer: impl Answer,
) {
    let service = {
        let phase = Rc::clone(&phase);
        service_fn(move |request| {
            let serving = phase.serve();
            serve(answer(request, None), serving)
        })
    };
    let head_bytes_max = u32::try_from(limits.head_bytes_max).unwrap_or(u32::MAX);
    let mut connection = http2::Builder::new(OnShard)
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .max_header_list_size(head_bytes_max)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(RESETS_FOR_MISTAKES_MAX)
        .serve_connection(Adapted(stream), service);
    // When the client was told to open no more streams.
    let mut told: Option<Instant> = None;
    let mut stopping = false;
    loop {
        let wait = match (told, phase.check(limits)) {
            // hyper waits for the client to say that it understood, and a client need not.
            (Some(at), _) if !phase.is_serving() && at.elapsed() >= LINGER_TIME => return,
            (Some(_), _) => LINGER_TIME,
            (None, Ok(wait)) => wait,
            (None, Err(_)) => {
                Pin::new(&mut connection).graceful_shutdown();
                told = Some(Instant::now());
                LINGER_TIME
            }
        };
        match turn(Pin::new(&mut connection), wait, (!stopping).then_some(stop)).await {
            Turn::Time => {}
            Turn::Stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
                told = told.or_else(|| Some(Instant::now()));
            }
            Turn::Ended(Ok(())) => return,
            Turn::Ended(Err(error)) => return tracing::debug!(%error, "connection ended"),
        }
    }
}
