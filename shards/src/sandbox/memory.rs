//! What the shard knows of a guest's memory: the layers it lies on, and how to find what differs.
//!
//! Called by captures and rollbacks. Refuses to guess: what is not known to be unchanged counts as
//! changed.
//!
//! A page that is not anonymous shows what is mapped there, and that never changes. So what a guest
//! changed is among its anonymous pages; and once writes are tracked, among those written since they
//! were last protected. A capture protects them again, and so takes on the duty to remember what it
//! found until it is committed: `uncommitted`.

use mica_numa::process::{ProcessError, RemoteMemory, Wanted};
use mica_storage::{Layer, Piece, restrict};
use mica_units::FrameRun;
use mica_wire::vm;
use mica_wire::vm::plan::{Entry, Source};

use super::image::spare_mappings;
use crate::shell::VmProcess;

/// Where a guest's memory is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) process: &'a VmProcess,
    pub(crate) memory: RemoteMemory,
}

impl<'a> Place<'a> {
    /// `None` when what the process said of itself cannot be.
    pub(crate) fn new(process: &'a VmProcess, layout: vm::Shell, frames: u32) -> Option<Self> {
        let memory = RemoteMemory::new(layout.memory_address, frames)?;
        Some(Self { process, memory })
    }
}

/// The memory of one guest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    /// What it lies on, base first, with what was captured last on top.
    pub(crate) layers: Vec<Layer>,
    /// What its process maps; `None` when that is not known any more.
    pub(crate) mapped: Option<Vec<Piece>>,
    /// The layers that `mapped` counts.
    pub(crate) mapped_layers: Vec<Layer>,
    /// Found changed, and in no layer yet.
    pub(crate) uncommitted: Vec<FrameRun>,
    /// Of those, what the capture at hand has copied while the guest ran.
    pub(crate) captured: Vec<FrameRun>,
    /// Whether writes since the last capture can be told: all of the memory is registered for it, as it
    /// is mapped now.
    pub(crate) tracked: bool,
    /// Whether pages come when they are touched: then one that is not there must not be read from
    /// outside.
    pub(crate) on_demand: bool,
    /// Whether the process tells what was written, when it is frozen. Then nothing is protected.
    pub(crate) logs: bool,
    /// What it said was written since the layers; `None` when it has not told of all that time.
    pub(crate) logged: Option<Vec<FrameRun>>,
    /// Whether something was protected that no capture here knows of: by an earlier daemon, or by a
    /// scan that failed.
    pub(crate) doubted: bool,
}

impl Memory {
    /// That of a guest that boots, on a layer that is empty. Nothing of that is mapped: what the guest does
    /// not have is zero as well. What the VM process loads before it runs is in no log.
    pub(crate) fn empty(base: Layer) -> Self {
        Self { layers: vec![base], mapped: Some(Vec::new()), ..Self::default() }
    }

    /// The runs that may differ from the layers; with `protect`, what is written from now on is told
    /// apart from them, and they are kept as uncommitted.
    pub(crate) async fn changed(
        &mut self,
        place: Place<'_>,
        protect: bool,
    ) -> Result<Vec<FrameRun>, ProcessError> {
        let pagemap = place.process.pagemap();
        let mut found = None;
        if self.tracked {
            let believed = !self.doubted;
            // Should this be cut off or fail, what it protected by then is not told any more.
            self.doubted |= protect;
            let wanted = Wanted::AnonymousWritten { rearm: protect };
            match pagemap.scan_all(place.memory, wanted).await {
                Ok(written) => found = believed.then_some(written),
                Err(ProcessError::NotTracked | ProcessError::Unsupported) => self.tracked = false,
                Err(error) => return Err(error),
            }
        }
        let found = match found {
            Some(written) => written,
            None => {
                let anonymous = pagemap.scan_all(place.memory, Wanted::Anonymous).await?;
                match &self.logged {
                    // What was written and given back since is not the guest's own any more.
                    Some(logged) if self.logs => within(&anonymous, logged),
                    _ => anonymous,
                }
            }
        };
        if protect && self.tracked {
            self.doubted = false;
        }
        let all = union(&found, &self.uncommitted);
        if protect {
            self.uncommitted.clone_from(&all);
        }
        Ok(all)
    }
}

impl Memory {
    /// Takes note of what the process said when it was frozen; it starts anew with that.
    pub(crate) fn told(&mut self, log: Option<Vec<FrameRun>>) {
        self.logs = log.is_some();
        self.logged = self.logged.take().zip(log).map(|(before, new)| union(&before, &new));
    }

    /// What was found is in a file, of a capture that is not committed.
    pub(crate) fn precopied(&mut self) {
        self.captured = union(&self.captured, &self.uncommitted);
        self.uncommitted.clear();
    }

    /// The capture was given up: what it found is to be found again.
    pub(crate) fn gave_up(&mut self) {
        self.uncommitted = union(&self.captured, &self.uncommitted);
        self.captured.clear();
    }

    /// The capture was committed: the memory lies on these layers now.
    pub(crate) fn committed(&mut self, layers: Vec<Layer>) {
        self.layers = layers;
        self.captured.clear();
        self.uncommitted.clear();
        // The log goes on from the freeze that this was captured at.
        self.logged = Some(Vec::new());
    }

    /// Takes note of a rollback that was carried out by `plan`.
    pub(crate) fn went_back(&mut self, plan: &[Entry], target_layers: &[Layer]) {
        self.layers = target_layers.to_vec();
        self.uncommitted.clear();
        self.logged = Some(Vec::new());
        // What was mapped anew is not registered. Nothing is missing any more: what the guest did not have
        // is mapped, as for any other.
        self.tracked = false;
        self.on_demand = false;
        let Some(mapped) = self.mapped.take() else { return };
        let mut new = Vec::new();
        for entry in plan {
            let Source::Map { layer, page } = entry.source else { continue };
            let Some(target) = target_layers.get(usize::from(layer)) else { continue };
            let known = |known: &Layer| known.info().id == target.info().id;
            let layer = self.mapped_layers.iter().position(known).unwrap_or_else(|| {
                self.mapped_layers.push(target.clone());
                self.mapped_layers.len() - 1
            });
            new.push(Piece { run: entry.run, layer, page });
        }
        self.mapped = Some(overlay(&mapped, new));
    }
}

/// `under` with `over` laid on it; both in order.
pub(crate) fn overlay(under: &[Piece], over: Vec<Piece>) -> Vec<Piece> {
    let mut left = Vec::new();
    for piece in under {
        let from = over.partition_point(|new| new.run.end() <= piece.run.first());
        let mut next = piece.run.first();
        for new in over[from..].iter().take_while(|new| new.run.first() < piece.run.end()) {
            left.extend(part(piece, next, new.run.first()));
            next = new.run.end();
        }
        left.extend(part(piece, next, piece.run.end()));
    }
    left.extend(over);
    left.sort_unstable_by_key(|piece| piece.run.first());
    left
}

impl Memory {
    /// The frames that `target` has from elsewhere than what is mapped there, and that are not the
    /// guest's own pages: what they show is the mapping, not what was captured of them. A guest's own
    /// page goes when the guest reports it free.
    pub(crate) async fn shown_from_below(
        &self,
        place: Place<'_>,
        target: &[Piece],
        target_layers: &[Layer],
    ) -> Result<Vec<FrameRun>, ProcessError> {
        let mapped = self.mapped.as_deref().unwrap_or_default();
        let parts = target.iter().flat_map(|piece| split_by(piece, mapped));
        let elsewhere: Vec<FrameRun> = parts
            .filter(|part| !self.is_mapped(part, target_layers))
            .map(|part| part.run)
            .collect();
        if elsewhere.is_empty() {
            return Ok(elsewhere);
        }
        // In memory and not a file's. What merely looks like a page in swap may be what the kernel leaves
        // where a protected page was given back; to map one too many again is never wrong.
        let pagemap = place.process.pagemap();
        let resident = pagemap.scan_all(place.memory, Wanted::Resident).await?;
        let anonymous = pagemap.scan_all(place.memory, Wanted::Anonymous).await?;
        let own = match self.logs {
            // A huge page that the kernel put where pages had been given back is anonymous, and in no log.
            true => Vec::new(),
            false => within(&anonymous, &resident),
        };
        Ok(without(&union(&elsewhere, &[]), &own))
    }

    /// Whether that part of a target is what is mapped there.
    fn is_mapped(&self, part: &Piece, target_layers: &[Layer]) -> bool {
        let mapped = self.mapped.as_deref().unwrap_or_default();
        mapped_at(mapped, part.run.first()).is_some_and(|(layer, page)| {
            page == part.page && same_layer(&self.mapped_layers, layer, target_layers, part)
        })
    }
}

/// The frames that are in both; both in order and without overlap.
fn within(runs: &[FrameRun], others: &[FrameRun]) -> Vec<FrameRun> {
    without(runs, &without(runs, others))
}

/// The frames of `runs` that are not in `others`; both in order and without overlap.
fn without(runs: &[FrameRun], others: &[FrameRun]) -> Vec<FrameRun> {
    let mut left = Vec::new();
    for run in runs {
        let from = others.partition_point(|other| other.end() <= run.first());
        let mut next = run.first();
        for other in others[from..].iter().take_while(|other| other.first() < run.end()) {
            left.extend(other.first().checked_sub(next).and_then(|n| FrameRun::new(next, n)));
            next = next.max(other.end());
        }
        left.extend(run.end().checked_sub(next).and_then(|n| FrameRun::new(next, n)));
    }
    left
}

/// All frames that are in either; both in order or not.
pub(crate) fn union(a: &[FrameRun], b: &[FrameRun]) -> Vec<FrameRun> {
    let mut all: Vec<FrameRun> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.first());
    let mut joined: Vec<FrameRun> = Vec::with_capacity(all.len());
    for run in all {
        match joined.last_mut() {
            Some(last) if last.end() >= run.first() => {
                let count = run.end().max(last.end()) - last.first();
                *last = FrameRun::new(last.first(), count).unwrap_or(*last);
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// Pages of all runs together.
pub(crate) fn pages(runs: &[FrameRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.count())).sum()
}

/// The frames in which two stacks of layers may differ: what is in either above their common part.
pub(crate) fn difference(a: &[Layer], b: &[Layer]) -> Vec<FrameRun> {
    let common = a.iter().zip(b).take_while(|(a, b)| a.info().id == b.info().id).count();
    let above = a.iter().skip(common).chain(b.iter().skip(common));
    let runs: Vec<FrameRun> =
        above.flat_map(|layer| layer.table().extents().iter().map(|extent| extent.run)).collect();
    union(&runs, &[])
}

/// The plan that puts `differing` back to `target`: where that is what is mapped already, only what was
/// written over it goes. Layers in the plan count in `target_layers`. Beside many mappings small runs are
/// copied, as at a restore: a process may have only so many.
pub(crate) fn plan_back(
    memory: &Memory,
    target: &[Piece],
    target_layers: &[Layer],
    differing: &[FrameRun],
) -> Vec<Entry> {
    let mapped = memory.mapped.as_deref().unwrap_or_default();
    let mut entries = Vec::new();
    for piece in restrict(target, differing) {
        for part in split_by(&piece, mapped) {
            let same = memory.is_mapped(&part, target_layers);
            let source = match u8::try_from(part.layer) {
                _ if same => Source::Drop,
                Ok(layer) => Source::Map { layer, page: part.page },
                // There are at most LAYERS_MAX of them.
                Err(_) => continue,
            };
            entries.push(Entry { run: part.run, source });
        }
    }
    spare_mappings(mapped.len(), &mut entries);
    entries
}

fn same_layer(mapped: &[Layer], layer: usize, target: &[Layer], part: &Piece) -> bool {
    match (mapped.get(layer), target.get(part.layer)) {
        (Some(a), Some(b)) => a.info().id == b.info().id,
        _ => false,
    }
}

/// Cuts a piece where what is mapped under it changes.
fn split_by(piece: &Piece, mapped: &[Piece]) -> Vec<Piece> {
    let from = mapped.partition_point(|under| under.run.end() <= piece.run.first());
    let under = mapped[from..].iter().take_while(|under| under.run.first() < piece.run.end());
    let mut parts = Vec::new();
    let mut next = piece.run.first();
    for edge in under.flat_map(|under| [under.run.first(), under.run.end()]) {
        if edge > next && edge < piece.run.end() {
            parts.extend(part(piece, next, edge));
            next = edge;
        }
    }
    parts.extend(part(piece, next, piece.run.end()));
    parts
}

fn part(piece: &Piece, first: u32, end: u32) -> Option<Piece> {
    let run = FrameRun::new(first, end.checked_sub(first)?)?;
    Some(Piece { run, page: piece.page + (first - piece.run.first()), ..*piece })
}

/// Layer and page of what is mapped at a frame.
fn mapped_at(mapped: &[Piece], frame: u32) -> Option<(usize, u32)> {
    let at = mapped.partition_point(|piece| piece.run.end() <= frame);
    let piece = mapped.get(at).filter(|piece| piece.run.first() <= frame)?;
    Some((piece.layer, piece.page + (frame - piece.run.first())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> FrameRun {
        FrameRun::new(first, count).unwrap()
    }

    fn piece(first: u32, count: u32, layer: usize, page: u32) -> Piece {
        Piece { run: run(first, count), layer, page }
    }

    #[test]
    fn unions_are_in_order_and_joined() {
        let all = union(&[run(10, 2), run(0, 4)], &[run(3, 2), run(12, 1)]);
        assert_eq!(all, [run(0, 5), run(10, 3)]);
        assert_eq!(pages(&all), 8);
    }

    #[test]
    fn what_is_left_is_in_none_of_the_others() {
        let runs = [run(0, 10), run(20, 5), run(30, 2)];
        let others = [run(3, 2), run(8, 14), run(30, 2)];
        assert_eq!(without(&runs, &others), [run(0, 3), run(5, 3), run(22, 3)]);
        assert_eq!(without(&runs, &[]), runs);
    }

    #[test]
    fn pieces_are_cut_where_the_mapping_changes() {
        let mapped = [piece(0, 10, 0, 0), piece(10, 5, 1, 0), piece(15, 85, 0, 15)];
        let parts = split_by(&piece(5, 20, 0, 5), &mapped);
        assert_eq!(parts, [piece(5, 5, 0, 5), piece(10, 5, 0, 10), piece(15, 10, 0, 15)]);
        assert_eq!(mapped_at(&mapped, 12), Some((1, 2)));
        assert_eq!(mapped_at(&mapped, 100), None);
    }

    #[test]
    fn what_a_rollback_maps_anew_is_not_registered() {
        let mut memory = Memory { tracked: true, on_demand: true, ..Memory::default() };
        memory.went_back(&[], &[]);
        assert!(!memory.tracked);
    }

    #[test]
    fn what_is_laid_over_hides_what_was_there() {
        let under = [piece(0, 10, 0, 0), piece(20, 10, 1, 0)];
        let over = vec![piece(2, 3, 2, 7), piece(8, 15, 3, 0)];
        let expected = [
            piece(0, 2, 0, 0),
            piece(2, 3, 2, 7),
            piece(5, 3, 0, 5),
            piece(8, 15, 3, 0),
            piece(23, 7, 1, 3),
        ];
        assert_eq!(overlay(&under, over), expected);
    }
}
