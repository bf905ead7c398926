//! Brings the memory of an image to where guests find it: into the node's memory, or the page cache.
//!
//! Called when a shard opens an image, and before a guest starts from one. Where memory is preferred to
//! be near, all of it happens beside the creates, which do not wait: the first of them map the file, and
//! what cannot be brought in is read when it is touched. Where memory is bound, a file's pages could lie
//! on another node, so a guest waits for its node's copy, also one that goes back to a snapshot: refuses
//! to start one without, but where the operator gave copies too little room.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mica_numa::io::IoFile;
use mica_numa::process::{RemoteMemory, Wanted};
use mica_numa::rt::time;
use mica_numa::{MemoryPolicy, rt};
use mica_storage::{LayerKind, prefetch_plan};
use mica_units::{PAGE_BYTES, frames_len, frames_of};

use crate::ShardError;
use crate::replicas::NoCopy;
use crate::sandbox::{Cause, Opened, Sandbox, chain};
use crate::shard::Shard;
use crate::shell::Held;

/// Frames of one read: a buffer's.
const FRAMES_PER_READ: u32 = 256;

/// Starts to bring an image in, once.
pub(crate) fn bring_in(shard: &Rc<Shard>, image: &Arc<Opened>) {
    if image.brought_in.swap(true, Ordering::Relaxed) {
        return;
    }
    let (shard, image) = (Rc::clone(shard), Arc::clone(image));
    rt::spawn(async move {
        let is_near = replicate(&shard, &image).await.unwrap_or_else(|cause| {
            tracing::debug!(?cause, "no copy of a base layer");
            false
        });
        if !is_near {
            prefetch(&shard, &image).await;
        }
    })
    .detach();
}

/// Says that the node has the image's memory. Clients ask by name or by id.
fn show_near(shard: &Shard, image: &Opened) {
    let Some(base) = image.layers.first() else { return };
    let (loads, layer) = (shard.choice.loads(), base.info().id);
    loads.add_near(shard.id, &image.manifest.id, layer);
    loads.add_near(shard.id, image.manifest.template_name.as_str(), layer);
}

/// Opens these templates and brings them in, one after the other: before the first create, if it comes
/// late enough.
pub(crate) async fn bring_in_all(shard: Rc<Shard>, templates: Vec<String>) {
    for template in templates {
        let (workshop, id) = (shard.workshop.clone(), template.clone());
        match rt::blocking(move || workshop.find(&id, None)).await {
            Ok(Ok((image, stamp))) => {
                // Clients ask by name or by id.
                shard.images.keep(&template, &image, stamp);
                shard.images.keep(image.manifest.template_name.as_str(), &image, None);
                bring_in(&shard, &image);
            }
            Ok(Err(cause)) => tracing::warn!(template, ?cause, "a template cannot be opened"),
            Err(error) => tracing::debug!(template, %error, "a template was not opened"),
        }
    }
}

/// Resolves when a guest may start from this image: where memory is bound, when the node's copy is
/// there, or there shall be none. A sandbox that is not starting any more waits no longer, so that the
/// deadline of its start, its end and the daemon's hold here too.
pub(crate) async fn at_hand(
    shard: &Rc<Shard>,
    image: &Arc<Opened>,
    sandbox: &Sandbox,
) -> Result<(), Cause> {
    // What comes on demand is copied to the guest's own memory.
    let is_mapped = !shard.workshop.config.is_on_demand(image.file_bytes());
    if is_bound(shard) && is_mapped {
        let given_up = async {
            sandbox.started_or_ended().await;
            Err(Cause::Killed)
        };
        let copy = async { replicate(shard, image).await.map(drop) };
        futures_lite::future::or(copy, given_up).await?;
    }
    bring_in(shard, image);
    Ok(())
}

/// The same for a guest that stands still to go back to this image, and is to map its base anew. It waits
/// for so long at the most: then it can go on as it was, and whoever asks again may find the copy.
pub(crate) async fn at_hand_within(
    shard: &Rc<Shard>,
    image: &Opened,
    longest: Duration,
) -> Result<(), Cause> {
    if !is_bound(shard) {
        return Ok(());
    }
    match time::timeout(longest, replicate(shard, image)).await {
        Ok(copy) => copy.map(drop),
        Err(_) => Err(Cause::Busy),
    }
}

fn is_bound(shard: &Shard) -> bool {
    shard.pool.placement().memory == MemoryPolicy::Bind
}

/// Waits for the node's copy of the base. Whether there is one.
async fn replicate(shard: &Rc<Shard>, image: &Opened) -> Result<bool, Cause> {
    if let Some(known) = image.replica.get() {
        return Ok(known.is_some());
    }
    let Some(base) = image.layers.first().filter(|base| base.info().kind == LayerKind::Flat) else {
        return Ok(false);
    };
    let Some(host) = shard.host() else { return Err(Cause::Draining) };
    let copy = match host.replica(image.manifest.id.clone(), base.info().id).await {
        Ok(Ok(copy)) => copy,
        // As one that is too large it is mapped, but for now only.
        Ok(Err(NoCopy::Full)) => return Ok(false),
        Ok(Err(NoCopy::Busy)) | Err(ShardError::Busy) => return Err(Cause::Busy),
        Ok(Err(NoCopy::ShuttingDown)) | Err(ShardError::ShuttingDown) => {
            return Err(Cause::Draining);
        }
        Ok(Err(why)) => {
            let node = shard.pool.placement().memory_node;
            return Err(Cause::Failed(format!(
                "node {node} has no copy of its template's memory, and memory is bound: {why}"
            )));
        }
        Err(error) => return Err(Cause::Failed(error.to_string())),
    };
    let is_near = copy.is_some();
    // Another create of this shard may have been first, with the same copy.
    if image.replica.set(copy).is_ok() && is_near {
        show_near(shard, image);
    }
    Ok(is_near)
}

/// Reads what guests of this image touched first into the page cache.
async fn prefetch(shard: &Rc<Shard>, image: &Opened) {
    let Some(runs) = image.working_set.clone() else { return };
    let files: Result<Vec<IoFile>, _> = image
        .layers
        .iter()
        .map(|layer| layer.file().as_fd().try_clone_to_owned().map(IoFile::from))
        .collect();
    let Ok(files) = files else { return };
    for piece in prefetch_plan(&image.pieces, &runs, FRAMES_PER_READ) {
        let Some(file) = files.get(piece.layer) else { continue };
        let length = frames_len(piece.run.count());
        let buffer = shard.ring.buffer().await;
        let at = u64::from(piece.page) * PAGE_BYTES;
        let (_, read) = shard.ring.read_at(file, buffer, length, at).await;
        if let Err(error) = read {
            tracing::warn!(%error, snapshot = image.manifest.id, "a working set was not read");
            return;
        }
    }
}

/// Notes which pages a guest that has just come up has touched, once for each image.
pub(crate) fn note_working_set(shard: &Rc<Shard>, image: &Arc<Opened>, held: &Rc<Held>) {
    if image.working_set.is_some() || image.noted.swap(true, Ordering::Relaxed) {
        return;
    }
    let (shard, image, held) = (Rc::clone(shard), Arc::clone(image), Rc::clone(held));
    rt::spawn(async move {
        let frames = frames_of(image.manifest.memory);
        let Some(memory) = RemoteMemory::new(held.layout.memory_address, frames) else { return };
        let touched = match held.process.pagemap().scan_all(memory, Wanted::Resident).await {
            Ok(touched) => touched,
            Err(error) => {
                tracing::debug!(%error, "a guest went before its working set was known");
                return;
            }
        };
        let store = shard.workshop.store.clone();
        let kept = rt::blocking(move || store.write_working_set(&image.snapshot, &touched)).await;
        match kept {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "a working set is not kept"),
            Err(error) => tracing::debug!(%error, "a working set is not kept"),
        }
    })
    .detach();
}
