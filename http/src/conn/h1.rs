//! A connection of HTTP/1.1.
//!
//! Called by [`super::drive`]. Answers where hyper would only hang up, goes on as bytes alone after a `101`,
//! and without hyper's buffers while nothing happens. Refuses a second request while the first is not answered, as hyper does.

use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::FutureExt;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use mica_shards::rt::time;

use super::io::ServerIo;
use super::phase::{Overdue, Phase};
use super::silent::{self, Rest};
use super::splice::splice;
use super::stream::ClientStream;
use super::{Answer, Turn, hang_up, serve, turn};
use crate::config::Limits;
use crate::error::ApiError;
use crate::proxy::{Switch, Tunnel};
use crate::serve::Entry;

/// hyper refuses smaller buffers.
const MAX_BUF_FLOOR: usize = 8192;

/// A connection that says nothing for so long is taken from hyper.
const SILENCE: Duration = Duration::from_secs(1);

/// Serves it to its end.
pub async fn drive(
    mut stream: ClientStream,
    phase: Rc<Phase>,
    limits: &Limits,
    stop: &Entry,
    answer: impl Answer,
) {
    let switch = Rc::new(Switch::default());
    let mut early = Vec::new();
    loop {
        let left = with_hyper((stream, early), &phase, &switch, (limits, stop), &answer).await;
        let next = match left {
            Left::Done => return,
            Left::Resting(stream) => Box::pin(rest(stream, &phase, limits, stop)).await,
            Left::Silent(stream, answer) => Box::pin(pass(stream, answer, &phase)).await,
        };
        let Some(next) = next else { return };
        (stream, early) = next;
    }
}

/// What becomes of a connection that hyper does not have any more.
enum Left {
    /// Nothing.
    Done,
    /// It waits for its next request.
    Resting(ClientStream),
    /// It waits for more of an answer.
    Silent(ClientStream, Rest),
}

/// Serves it until it ends or nothing happens on it.
async fn with_hyper(
    (stream, early): (ClientStream, Vec<u8>),
    phase: &Rc<Phase>,
    switch: &Rc<Switch>,
    (limits, stop): (&Limits, &Entry),
    answer: &impl Answer,
) -> Left {
    let service = service_fn(|request| {
        let serving = phase.serve();
        switch.asked(&request);
        serve(answer(request, Some(Rc::clone(switch))), serving)
    });
    let mut connection = http1::Builder::new()
        .max_header_size(limits.head_bytes_max)
        .max_buf_size(limits.head_bytes_max.max(MAX_BUF_FLOOR))
        .max_headers(limits.head_fields_max)
        .header_read_timeout(None)
        .serve_connection(
            ServerIo::new(stream, early, Rc::clone(phase), Rc::clone(switch)),
            service,
        );
    let mut stopping = false;
    // Rarer and rarer, where there is always something.
    let mut look_after = SILENCE;
    let error = loop {
        let wait = match phase.check(limits) {
            Ok(wait) => wait.min(look_after),
            Err(Overdue::Idle) => return Left::Done,
            Err(Overdue::Head) => break Some(ApiError::head_too_slow()),
        };
        match turn(Pin::new(&mut connection), wait, (!stopping).then_some(stop)).await {
            Turn::Time if stopping => {}
            Turn::Time if phase.is_resting(SILENCE) => {
                return Left::Resting(connection.into_parts().io.into_stream());
            }
            Turn::Time => {
                let passing = switch.passing();
                if let Some(answer) = passing.and_then(|passing| passing.take_silent(SILENCE)) {
                    let parts = connection.into_parts();
                    let rest = Rest::new(answer, parts.read_buf.to_vec());
                    return Left::Silent(parts.io.into_stream(), rest);
                }
                look_after = look_after.saturating_mul(2).min(limits.head_timeout);
            }
            Turn::Stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            Turn::Ended(Ok(())) => {
                let parts = connection.into_parts();
                let Some(tunnel) = switch.take() else { return Left::Done };
                // A copy of what is left, so that hyper's whole buffer goes.
                let (client, early) = (parts.io.into_stream(), parts.read_buf.to_vec());
                drop(parts.read_buf);
                Box::pin(go_on(client, early, tunnel, stop)).await;
                return Left::Done;
            }
            Turn::Ended(Err(error)) => {
                tracing::debug!(%error, "connection ended");
                if !error.is_parse() {
                    return Left::Done;
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
    Left::Done
}

/// Waits for the next request. `None`: there is none.
async fn rest(
    mut client: ClientStream,
    phase: &Phase,
    limits: &Limits,
    stop: &Entry,
) -> Option<(ClientStream, Vec<u8>)> {
    loop {
        let wait = phase.check(limits).ok()?;
        let said = async { Some(silent::word(&mut client).await) };
        let over = async {
            time::sleep(wait).await;
            None
        };
        let stopped = async {
            stop.stopped().await;
            Some(Ok(Vec::new()))
        };
        let word = said.or(over).or(stopped).await;
        match word {
            None => {}
            Some(Ok(word)) if !word.is_empty() => {
                phase.received();
                return Some((client, word));
            }
            Some(_) => return None,
        }
    }
}

/// Passes the rest of an answer on. What the client sent meanwhile is the begin of its next request.
async fn pass(
    mut client: ClientStream,
    mut answer: Rest,
    phase: &Rc<Phase>,
) -> Option<(ClientStream, Vec<u8>)> {
    let serving = phase.serve();
    match answer.pass(&mut client).await {
        Ok(ahead) => {
            drop(serving);
            phase.flushed();
            Some((client, ahead))
        }
        Err(error) => {
            tracing::debug!(%error, "an answer was cut short");
            None
        }
    }
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
