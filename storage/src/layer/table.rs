//! The arithmetic of layers: run tables, which layer a frame comes from, and what to write.
//!
//! Called by `layer` and by shards, which turn the pieces into plans. Pure functions: no file is
//! touched. Refuses a table that is out of order, overlaps, or names a page that is not there.

use mica_units::{FRAMES_MAX, FrameRun};

use super::LayerError;

/// Most runs of one layer. With gaps filled as [`super::COALESCE_GAP`] says, a guest of 68 GiB
/// cannot have more, however scattered its writes.
pub const RUNS_MAX: usize = 1 << 20;

/// A run of frames, and where it is in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which frames.
    pub run: FrameRun,
    /// The page of the file at which the first of them is.
    pub page: u32,
}

impl Extent {
    /// The page after its last; `None` where pages have no number any more.
    fn page_end(&self) -> Option<u32> {
        self.page.checked_add(self.run.count())
    }

    /// The part of it that holds `run`, which must lie within it.
    const fn part(&self, run: FrameRun) -> Self {
        Self { run, page: self.page + (run.first() - self.run.first()) }
    }
}

/// Which frames a layer holds: in order, without overlap, neighbours joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunTable {
    extents: Box<[Extent]>,
    data_pages: u32,
}

impl RunTable {
    /// A table of a file with `data_pages` pages, from extents in any order. Neighbours in frames
    /// and in pages are joined.
    ///
    /// # Errors
    /// When extents overlap, leave the file, or are more than [`RUNS_MAX`] even after being joined.
    pub fn new(mut extents: Vec<Extent>, data_pages: u32) -> Result<Self, LayerError> {
        extents.sort_unstable_by_key(|extent| extent.run.first());
        let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
        for extent in extents {
            match joined.last_mut() {
                Some(last) if last.run.end() > extent.run.first() => {
                    return Err(LayerError::Runs("two of its runs overlap"));
                }
                Some(last) if continues(last, &extent) => {
                    last.run = joined_run(last.run, extent.run)
                        .ok_or(LayerError::Runs("a run is too long"))?;
                }
                _ => joined.push(extent),
            }
        }
        Self::checked(joined, data_pages)
    }

    /// A table that must be in order and joined already, as it is read from a file.
    pub(crate) fn checked(extents: Vec<Extent>, data_pages: u32) -> Result<Self, LayerError> {
        if extents.len() > RUNS_MAX {
            return Err(LayerError::Runs("it has too many runs"));
        }
        for pair in extents.windows(2) {
            if pair[0].run.end() > pair[1].run.first() {
                return Err(LayerError::Runs("its runs are out of order"));
            }
        }
        let inside = |extent: &Extent| extent.page_end().is_some_and(|end| end <= data_pages);
        if !extents.iter().all(inside) {
            return Err(LayerError::Runs("a run names pages that are not there"));
        }
        Ok(Self { extents: extents.into(), data_pages })
    }

    /// The table of a flat layer: all of a guest's memory, frame `n` at page `n`.
    ///
    /// # Errors
    /// When `frames` is 0 or above [`FRAMES_MAX`].
    pub fn flat(frames: u32) -> Result<Self, LayerError> {
        let run = FrameRun::new(0, frames)
            .ok_or(LayerError::Runs("a guest has at least one frame, and at most 2^31"))?;
        Ok(Self { extents: [Extent { run, page: 0 }].into(), data_pages: frames })
    }

    /// The runs, in ascending order of frames.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Pages of data in the file.
    #[must_use]
    pub const fn data_pages(&self) -> u32 {
        self.data_pages
    }

    /// Frames it has runs for.
    #[must_use]
    pub fn frames(&self) -> u32 {
        // Runs do not overlap and end below 2^31, so the sum fits.
        self.extents.iter().map(|extent| extent.run.count()).sum()
    }
}

/// Whether `next` goes on exactly where `last` ends, in frames and in pages.
fn continues(last: &Extent, next: &Extent) -> bool {
    last.run.end() == next.run.first() && last.page_end() == Some(next.page)
}

fn joined_run(a: FrameRun, b: FrameRun) -> Option<FrameRun> {
    FrameRun::new(a.first(), a.count().checked_add(b.count())?)
}

/// Frames, and where their content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which frames.
    pub run: FrameRun,
    /// The index of the layer, as they were given: the base is 0.
    pub layer: usize,
    /// The page of that layer's file at which the first of them is.
    pub page: u32,
}

/// What a guest of `frames` frames sees when these layers lie over one another, the base first:
/// each frame comes from the topmost layer that holds it. In ascending order, without overlap; a
/// frame that no piece has is zero.
#[must_use]
pub fn merge(layers: &[&RunTable], frames: u32) -> Vec<Piece> {
    let mut seen: Vec<Piece> = Vec::new();
    let Some(all) = FrameRun::new(0, frames.min(FRAMES_MAX)) else { return seen };
    for (layer, table) in layers.iter().enumerate().rev() {
        seen = below(&seen, layer, table, all);
    }
    seen
}

/// `above`, and what of `table` is not hidden by it.
fn below(above: &[Piece], layer: usize, table: &RunTable, all: FrameRun) -> Vec<Piece> {
    let mut out = Vec::with_capacity(above.len() + table.extents.len());
    let mut above = above.iter().peekable();
    // The end of the last piece taken from above: it may reach over several runs of the table.
    let mut hidden_to = 0;
    for extent in &table.extents {
        let Some(run) = extent.run.intersection(all) else { break };
        let extent = extent.part(run);
        let mut at = run.first().max(hidden_to);
        while let Some(piece) = above.next_if(|piece| piece.run.first() < run.end()) {
            push_part(&mut out, &extent, layer, at, piece.run.first());
            hidden_to = piece.run.end();
            at = at.max(hidden_to);
            push(&mut out, *piece);
        }
        push_part(&mut out, &extent, layer, at, run.end());
    }
    above.for_each(|piece| push(&mut out, *piece));
    out
}

/// Adds the frames `from..to` of an extent, if there are any. `from` must not lie before the extent;
/// where a piece above begins before `from`, `to` does too and nothing is added.
fn push_part(out: &mut Vec<Piece>, extent: &Extent, layer: usize, from: u32, to: u32) {
    let Some(run) = to.checked_sub(from).and_then(|count| FrameRun::new(from, count)) else {
        return;
    };
    let part = extent.part(run);
    push(out, Piece { run, layer, page: part.page });
}

fn push(out: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = out.last_mut() {
        let (a, b) = (
            Extent { run: last.run, page: last.page },
            Extent { run: piece.run, page: piece.page },
        );
        if last.layer == piece.layer
            && continues(&a, &b)
            && let Some(run) = joined_run(a.run, b.run)
        {
            last.run = run;
            return;
        }
    }
    out.push(piece);
}

/// The parts of `pieces` that lie within `runs`: what a rollback has to put back. Both must be in
/// ascending order and without overlap, and so is what comes out.
#[must_use]
pub fn restrict(pieces: &[Piece], runs: &[FrameRun]) -> Vec<Piece> {
    let mut out = Vec::new();
    let mut runs = runs.iter().copied().peekable();
    for piece in pieces {
        while runs.next_if(|run| run.end() <= piece.run.first()).is_some() {}
        let extent = Extent { run: piece.run, page: piece.page };
        while let Some(run) = runs.peek().copied() {
            if let Some(both) = run.intersection(piece.run) {
                push_part(&mut out, &extent, piece.layer, both.first(), both.end());
            }
            if run.end() > piece.run.end() {
                break;
            }
            runs.next();
        }
    }
    out
}

/// Dirty runs with the gaps between them of up to `gap` frames filled. They must be in ascending
/// order; touching ones are joined.
#[must_use]
pub fn coalesce(dirty: &[FrameRun], gap: u32) -> Vec<FrameRun> {
    let mut out: Vec<FrameRun> = Vec::with_capacity(dirty.len());
    for run in dirty {
        if let Some(last) = out.last_mut()
            && run.first() <= last.end().saturating_add(gap)
        {
            let end = last.end().max(run.end());
            // The end lies within the bounds of one of the two, so a run up to it can be made.
            *last = FrameRun::new(last.first(), end - last.first()).unwrap_or(*last);
        } else {
            out.push(*run);
        }
    }
    out
}

/// Cuts runs into groups of exactly `pages` pages each, but for the last: what one buffer takes.
/// `pages` must not be 0.
pub fn groups(runs: &[FrameRun], pages: u32) -> impl Iterator<Item = Vec<FrameRun>> {
    let mut runs = runs.iter().copied();
    let mut rest: Option<FrameRun> = None;
    std::iter::from_fn(move || {
        let mut group = Vec::new();
        let mut room = pages;
        while room > 0 {
            let Some(run) = rest.take().or_else(|| runs.next()) else { break };
            let taken = run.count().min(room);
            group.extend(FrameRun::new(run.first(), taken));
            rest = FrameRun::new(run.first() + taken, run.count() - taken);
            room -= taken;
        }
        (!group.is_empty()).then_some(group)
    })
}
