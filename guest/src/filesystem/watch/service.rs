//! The methods of watching, on the router.
//!
//! Called by [`super::super::rpc`]. Refuses what [`super::Watch`] refuses.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::messages::{EventsReply, WatchEvent, WatchReply, WatchRequest, WatcherId};
use super::polled::PolledWatchers;
use super::{WATCHERS_MAX, Watch};
use crate::connect::{ConnectError, Context, Nothing, StreamSender, server_stream, unary};
use crate::http::Router;

/// Adds them.
pub fn add_methods(router: &mut Router) {
    let places = Arc::new(Semaphore::new(WATCHERS_MAX));
    let polled = Arc::new(PolledWatchers::default());
    let keepalive: fn() -> WatchReply = || WatchEvent::Keepalive(Nothing {}).into();

    let (p, others) = (Arc::clone(&places), Arc::clone(&polled));
    let watch = move |context, request, out| {
        make_room(&p, &others);
        watch(Arc::clone(&p), context, request, out)
    };
    server_stream(router, "filesystem.Filesystem/WatchDir", Some(keepalive), watch);

    let p = Arc::clone(&polled);
    unary(router, "filesystem.Filesystem/CreateWatcher", move |context: Context, request| {
        let (places, polled) = (Arc::clone(&places), Arc::clone(&p));
        async move {
            make_room(&places, &polled);
            let watch = Watch::open(&places, &context, &request).await?;
            Ok(WatcherId { watcher_id: polled.add(watch)? })
        }
    });
    let p = Arc::clone(&polled);
    let method = "filesystem.Filesystem/GetWatcherEvents";
    unary(router, method, move |_: Context, request: WatcherId| {
        let taken = p.take(&request.watcher_id);
        async move { Ok(EventsReply { events: taken? }) }
    });
    let method = "filesystem.Filesystem/RemoveWatcher";
    unary(router, method, move |_: Context, request: WatcherId| {
        let removed = polled.remove(&request.watcher_id);
        async move { removed.map(|()| Nothing {}) }
    });
}

fn make_room(places: &Semaphore, polled: &PolledWatchers) {
    polled.make_room(|| places.available_permits() == 0);
}

async fn watch(
    places: Arc<Semaphore>,
    context: Context,
    request: WatchRequest,
    out: StreamSender<WatchReply>,
) -> Result<(), ConnectError> {
    let mut watch = Watch::open(&places, &context, &request).await?;
    let mut waiting = vec![WatchEvent::Start(Nothing {})];
    loop {
        for event in waiting {
            if out.send(&event.into()).await.is_err() {
                return Ok(());
            }
        }
        waiting = tokio::select! {
            events = watch.next() => events?.into_iter().map(WatchEvent::Filesystem).collect(),
            () = out.closed() => return Ok(()),
        };
    }
}
