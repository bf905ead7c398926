//! A connection of HTTP/1.1.
//!
//! Called by [`super::drive`]. Answers where hyper would only hang up, and goes on as bytes alone after
//! a `101`. Refuses a second request while the first is not answered, as hyper does.

use std::pin::Pin;
use std::rc::Rc;

use hyper::server::conn::http1;
use hyper::service::service_fn;

use super::io::ServerIo;
use super::phase::{Overdue, Phase};
use super::splice::splice;
use super::stream::ClientStream;
use super::{Answer, Turn, hang_up, serve, turn};
use crate::config::Limits;
use crate::error::ApiError;
use crate::proxy::{Switch, Tunnel};
use crate::serve::Entry;

/// hyper refuses smaller buffers.
const MAX_BUF_FLOOR: usize = 8192;

/// Serves it to its end.
pub async fn drive(
    stream: ClientStream,
    phase: Rc<Phase>,
    limits: &Limits,
    stop: &Entry,
    answer: impl Answer,
) {
    let switch = Rc::new(Switch::default());
    let service = service_fn(|request| {
        let serving = phase.serve();
        serve(answer(request, Some(Rc::clone(&switch))), serving)
    });
    let mut connection = http1::Builder::new()
        .max_header_size(limits.head_bytes_max)
        .max_buf_size(limits.head_bytes_max.max(MAX_BUF_FLOOR))
        .max_headers(limits.head_fields_max)
        .header_read_timeout(None)
        .serve_connection(ServerIo::new(stream, Rc::clone(&phase)), service);
    let mut stopping = false;
    let error = loop {
        let wait = match phase.check(limits) {
            Ok(wait) => wait,
            Err(Overdue::Idle) => return,
            Err(Overdue::Head) => break Some(ApiError::head_too_slow()),
        };
        match turn(Pin::new(&mut connection), wait, (!stopping).then_some(stop)).await {
            Turn::Time => {}
            Turn::Stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            Turn::Ended(Ok(())) => {
                let parts = connection.into_parts();
                let Some(tunnel) = switch.take() else { return };
                // A copy of what is left, so that hyper's whole buffer goes.
                let (client, early) = (parts.io.into_stream(), parts.read_buf.to_vec());
                drop(parts.read_buf);
                return Box::pin(go_on(client, early, tunnel, stop)).await;
            }
            Turn::Ended(Err(error)) => {
                tracing::debug!(%error, "connection ended");
                if !error.is_parse() {
                    return;
                }
                // hyper has answered what it can name. What it cannot is still unanswered, and the
                // boundary still untouched.
                break phase.is_between().then(ApiError::not_http);
            }
        }
    };
    let io = connection.into_parts().io;
    let answered = io.has_substitute();
    Box::pin(hang_up(io.into_stream(), error.filter(|_| !answered))).await;
}

/// A connection that hyper is done with, and that goes on as bytes into a sandbox.
async fn go_on(mut client: ClientStream, early: Vec<u8>, mut tunnel: Tunnel, stop: &Entry) {
    let early = (early, std::mem::take(&mut tunnel.early));
    // A stream of this kind ends when one of its ends wants to, and a daemon that stops cannot wait
    // for that.
    if let Err(error) = splice(&mut client, &mut tunnel.guest, early, stop.stopped()).await {
        tracing::debug!(%error, "a switched connection ended");
    }
    drop(tunnel);
    Box::pin(hang_up(client, None)).await;
}
