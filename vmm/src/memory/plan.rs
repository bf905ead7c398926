//! Carrying out a plan: what every part of guest memory is mapped from.
//!
//! Called by `restore` while nothing runs. Runs that continue one another are one system call.
//! Refuses, before it touches anything, a plan that reaches past the guest or past the end of a layer:
//! a page mapped from behind the end of a file kills whoever touches it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mica_units::{FrameRun, PAGE_BYTES};
use mica_wire::vm::plan::{Entry, Source};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, mmap, mmap_anonymous};

use super::forget::forget;
use super::{Memory, PROTECTION};

/// Most pieces of one `preadv`, a limit of the kernel's.
const PIECES_MAX: usize = 1024;

/// A file that is no layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// The kernel does not say what it is.
    #[error("looking at a layer failed: {0}")]
    Stat(Errno),
    /// Not a file of pages.
    #[error("a layer is not a regular file")]
    Kind,
}

/// A layer: an open file, and how many whole pages it has.
#[derive(Debug)]
pub struct Layer {
    file: OwnedFd,
    pages: u64,
}

impl Layer {
    /// Takes a file for a layer.
    ///
    /// # Errors
    /// When it is none.
    pub fn new(file: OwnedFd) -> Result<Self, LayerError> {
        let stat = fstat(&file).map_err(LayerError::Stat)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(LayerError::Kind);
        }
        Ok(Self { file, pages: u64::try_from(stat.st_size).unwrap_or(0) / PAGE_BYTES })
    }
}

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It names what is not there. Nothing was changed.
    #[error("entry {0} of the plan reaches past the guest or past the end of its layer")]
    Outside(usize),
    /// A layer is shorter than it was a moment ago.
    #[error("a layer ended while it was copied")]
    Shrunk,
    /// The kernel refused; the VM must not run.
    #[error("{operation} guest memory failed")]
    Os {
        /// What was being done.
        operation: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
}

fn os(operation: &'static str) -> impl Fn(Errno) -> ApplyError {
    move |source| ApplyError::Os { operation, source }
}

impl Memory {
    /// Carries out a plan, each entry over those before it.
    ///
    /// # Errors
    /// See [`ApplyError`].
    pub fn apply(&self, plan: &[Entry], layers: &[Layer]) -> Result<(), ApplyError> {
        for (index, entry) in plan.iter().enumerate() {
            if !self.is_inside(entry, layers) {
                return Err(ApplyError::Outside(index));
            }
        }
        let (mut copies, mut forgotten) = (Vec::new(), Vec::new());
        let mut rest = plan.iter().copied().peekable();
        while let Some(mut entry) = rest.next() {
            while let Some(longer) = rest.peek().and_then(|next| joined(entry, *next)) {
                entry = longer;
                rest.next();
            }
            if let Source::Copy { layer, page } = entry.source {
                copies.push((layer, page, entry.run));
                // Read together with those that follow, as long as there is nothing else between.
                if rest.peek().is_some_and(|next| matches!(next.source, Source::Copy { .. })) {
                    continue;
                }
                self.copy_all(&copies, layers)?;
                copies.clear();
            }
            if entry.source == Source::Drop {
                forgotten.push(self.piece(entry.run, "dropping what was written to")?);
                if rest.peek().is_some_and(|next| next.source == Source::Drop) {
                    continue;
                }
                forget(&mut forgotten).map_err(os("dropping what was written to"))?;
                forgotten.clear();
            }
            match entry.source {
                Source::Copy { .. } | Source::Drop => {}
                Source::Map { layer, page } => self.map(entry.run, layer, page, layers)?,
                Source::Zero => self.zero(entry.run)?,
            }
        }
        Ok(())
    }

    /// Copies runs in their order; what follows one another in a file is one read.
    fn copy_all(&self, copies: &[(u8, u32, FrameRun)], layers: &[Layer]) -> Result<(), ApplyError> {
        copies
            .chunk_by(|a, b| {
                a.0 == b.0 && u64::from(a.1) + u64::from(a.2.count()) == u64::from(b.1)
            })
            .flat_map(|together| together.chunks(PIECES_MAX))
            .try_for_each(|together| self.copy(together, layers))
    }

    fn is_inside(&self, entry: &Entry, layers: &[Layer]) -> bool {
        let in_file = match entry.source {
            Source::Map { layer, page } | Source::Copy { layer, page } => layers
                .get(usize::from(layer))
                .is_some_and(|layer| u64::from(page) + u64::from(entry.run.count()) <= layer.pages),
            Source::Drop | Source::Zero => true,
        };
        in_file && entry.run.end() <= self.frames
    }

    fn map(&self, run: FrameRun, layer: u8, page: u32, layers: &[Layer]) -> Result<(), ApplyError> {
        let failed = os("mapping a layer into");
        let file = layers.get(usize::from(layer)).ok_or_else(|| failed(Errno::BADF))?;
        let (start, bytes) = self.place(run).map_err(&failed)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let offset = u64::from(page) * PAGE_BYTES;
        // SAFETY: `place` checked that the range is within the reservation of guest memory, so no other
        // mapping is replaced. What refers into it are volatile accessors and KVM, which both take
        // whatever is there; private, so the file cannot be written through it.
        unsafe { mmap(start, bytes, PROTECTION, flags, file.file.as_fd(), offset) }
            .map_err(failed)?;
        Ok(())
    }

    fn zero(&self, run: FrameRun) -> Result<(), ApplyError> {
        let failed = os("zeroing");
        let (start, bytes) = self.place(run).map_err(&failed)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `map`.
        unsafe { mmap_anonymous(start, bytes, PROTECTION, flags) }.map_err(failed)?;
        Ok(())
    }

    fn piece(&self, run: FrameRun, why: &'static str) -> Result<libc::iovec, ApplyError> {
        let (start, bytes) = self.place(run).map_err(os(why))?;
        Ok(libc::iovec { iov_base: start, iov_len: bytes })
    }

    /// Reads runs whose pages follow one another in their layer.
    fn copy(&self, together: &[(u8, u32, FrameRun)], layers: &[Layer]) -> Result<(), ApplyError> {
        let failed = os("copying a layer into");
        let Some((layer, page, _)) = together.first().copied() else { return Ok(()) };
        let file = layers.get(usize::from(layer)).ok_or_else(|| failed(Errno::BADF))?;
        let mut pieces = Vec::with_capacity(together.len());
        for (_, _, run) in together {
            pieces.push(self.piece(*run, "copying a layer into")?);
        }
        let mut offset = u64::from(page) * PAGE_BYTES;
        let mut pieces = &mut pieces[..];
        while !pieces.is_empty() {
            let read = preadv(&file.file, pieces, offset).map_err(&failed)?;
            if read == 0 {
                return Err(ApplyError::Shrunk);
            }
            offset += read as u64;
            pieces = after(pieces, read);
        }
        Ok(())
    }
}

/// Two entries as one, where the second goes on where the first ends, in the guest and in its source.
fn joined(first: Entry, second: Entry) -> Option<Entry> {
    let source_goes_on = match (first.source, second.source) {
        (Source::Drop, Source::Drop) | (Source::Zero, Source::Zero) => true,
        (Source::Map { layer: a, page: p }, Source::Map { layer: b, page: q }) => {
            a == b && p.checked_add(first.run.count()) == Some(q)
        }
        _ => false,
    };
    if !source_goes_on || first.run.end() != second.run.first() {
        return None;
    }
    let run = FrameRun::new(first.run.first(), first.run.count() + second.run.count())?;
    Some(Entry { run, ..first })
}

/// The pieces that are left when `read` bytes of them are done.
pub(super) fn after(pieces: &mut [libc::iovec], read: usize) -> &mut [libc::iovec] {
    let mut left = read;
    let mut full = 0;
    for piece in pieces.iter_mut() {
        if left < piece.iov_len {
            piece.iov_base = piece.iov_base.wrapping_byte_add(left);
            piece.iov_len -= left;
            break;
        }
        left -= piece.iov_len;
        full += 1;
    }
    &mut pieces[full..]
}

/// `preadv` into guest memory. Not rustix's, which wants Rust references.
fn preadv(file: &OwnedFd, pieces: &[libc::iovec], offset: u64) -> Result<usize, Errno> {
    let count = libc::c_int::try_from(pieces.len()).map_err(|_| Errno::INVAL)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    rustix::io::retry_on_intr(|| {
        // SAFETY: the pieces lie in guest memory (`place` checked), which stays mapped and to which no
        // Rust reference exists; the kernel writes there as a guest would. The array outlives the call.
        let read = unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), count, offset) };
        usize::try_from(read).map_err(|_| last_error())
    })
}

pub(super) fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_units::Mebibytes;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    const FRAMES: u32 = 512;
    const LAYERS: u8 = 3;
    const LAYER_PAGES: u32 = 700;

    /// A page, told from every other by its first word; the rest follows from that.
    type Page = u64;

    fn page_of(layer: u8, page: u32) -> Page {
        1 + u64::from(layer) * 10_000 + u64::from(page)
    }

    fn bytes_of(page: Page) -> Vec<u8> {
        page.to_le_bytes().repeat(512)
    }

    fn layers() -> Vec<Layer> {
        let layer = |layer| {
            let fd = memfd_create("layer", MemfdFlags::CLOEXEC).unwrap();
            let bytes: Vec<u8> =
                (0..LAYER_PAGES).flat_map(|page| bytes_of(page_of(layer, page))).collect();
            let file = std::fs::File::from(fd);
            file.write_all_at(&bytes, 0).unwrap();
            Layer::new(file.into()).unwrap()
        };
        (0..LAYERS).map(layer).collect()
    }

    /// What memory should hold: of each frame what is mapped there, and what is read.
    struct Model {
        below: Vec<Page>,
        seen: Vec<Page>,
    }

    impl Model {
        fn apply(&mut self, plan: &[Entry]) {
            for entry in plan {
                for (step, frame) in (entry.run.first()..entry.run.end()).enumerate() {
                    let step = u32::try_from(step).unwrap();
                    let frame = frame as usize;
                    match entry.source {
                        Source::Map { layer, page } => {
                            self.below[frame] = page_of(layer, page + step);
                            self.seen[frame] = self.below[frame];
                        }
                        Source::Copy { layer, page } => {
                            self.seen[frame] = page_of(layer, page + step);
                        }
                        Source::Drop => self.seen[frame] = self.below[frame],
                        Source::Zero => (self.below[frame], self.seen[frame]) = (0, 0),
                    }
                }
            }
        }
    }

    fn source() -> impl Strategy<Value = (u8, u8, u32)> {
        (0..4u8, 0..LAYERS, 0..LAYER_PAGES - FRAMES)
    }

    /// A plan in order: gaps and lengths, each with a source. Sources often go on where the one before
    /// ended, so that joining is tried.
    fn plan() -> impl Strategy<Value = Vec<Entry>> {
        let piece = (0..20u32, 1..30u32, source(), any::<bool>());
        prop::collection::vec(piece, 0..60).prop_map(|pieces| {
            let mut plan: Vec<Entry> = Vec::new();
            let mut at = 0;
            for (gap, count, (kind, layer, page), goes_on) in pieces {
                at += if goes_on { 0 } else { gap };
                let Some(run) = FrameRun::new(at, count).filter(|run| run.end() <= FRAMES) else {
                    break;
                };
                at = run.end();
                let source = match (kind, plan.last()) {
                    (0 | 1, Some(Entry { run, source: Source::Map { layer, page } }))
                        if goes_on =>
                    {
                        Source::Map { layer: *layer, page: page + run.count() }
                    }
                    (0, _) => Source::Map { layer, page },
                    (1, _) => Source::Copy { layer, page },
                    (2, _) => Source::Drop,
                    _ => Source::Zero,
                };
                if source_end(source, count) <= LAYER_PAGES {
                    plan.push(Entry { run, source });
                }
            }
            plan
        })
    }

    fn source_end(source: Source, count: u32) -> u32 {
        match source {
            Source::Map { page, .. } | Source::Copy { page, .. } => page + count,
            Source::Drop | Source::Zero => 0,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        /// Plans one after the other, with a guest that writes in between, against the model.
        #[test]
        fn memory_holds_what_the_plans_say(
            plans in prop::collection::vec((plan(), prop::collection::vec(0..FRAMES, 0..40)), 1..5),
        ) {
            let memory = Memory::reserve(Mebibytes::new(2)).unwrap();
            let layers = layers();
            let mut model = Model { below: vec![0; 512], seen: vec![0; 512] };
            for (round, (plan, writes)) in plans.into_iter().enumerate() {
                memory.apply(&plan, &layers).unwrap();
                model.apply(&plan);
                for frame in writes {
                    let page = 1_000_000 + (round as u64) * 1000 + u64::from(frame);
                    let at = GuestAddress(u64::from(frame) * PAGE_BYTES);
                    memory.guest().write_slice(&bytes_of(page), at).unwrap();
                    model.seen[frame as usize] = page;
                }
                for (frame, page) in model.seen.iter().enumerate() {
                    let mut bytes = [0; 4096];
                    let at = GuestAddress(frame as u64 * PAGE_BYTES);
                    memory.guest().read_slice(&mut bytes, at).unwrap();
                    prop_assert!(bytes[..] == bytes_of(*page)[..], "round {round}, frame {frame}");
                }
            }
        }
    }

    #[test]
    fn what_reaches_outside_is_refused_and_changes_nothing() {
        let memory = Memory::reserve(Mebibytes::new(2)).unwrap();
        let layers = layers();
        let run = |first, count| FrameRun::new(first, count).unwrap();
        let good = Entry { run: run(0, 1), source: Source::Map { layer: 0, page: 0 } };
        let bad = [
            Entry { run: run(500, 13), source: Source::Zero },
            Entry { run: run(1, 2), source: Source::Map { layer: 0, page: LAYER_PAGES - 1 } },
            Entry { run: run(1, 1), source: Source::Copy { layer: 0, page: LAYER_PAGES } },
            Entry { run: run(1, 1), source: Source::Map { layer: LAYERS, page: 0 } },
        ];
        for entry in bad {
            let outcome = memory.apply(&[good, entry], &layers);
            assert!(matches!(outcome, Err(ApplyError::Outside(1))), "{entry:?}: {outcome:?}");
            assert_eq!(memory.guest().read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
        }
    }

    #[test]
    fn only_regular_files_are_layers() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        assert_eq!(Layer::new(read).unwrap_err(), LayerError::Kind);
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Layer::new(null.into()).unwrap_err(), LayerError::Kind);
    }

    #[test]
    fn a_short_read_goes_on_where_it_ended() {
        let mut words = [0u64; 4];
        let base = words.as_mut_ptr().cast();
        let mut pieces = [
            libc::iovec { iov_base: base, iov_len: 16 },
            libc::iovec { iov_base: base, iov_len: 16 },
        ];
        assert_eq!(after(&mut pieces, 0).len(), 2);
        let left = after(&mut pieces, 20);
        assert_eq!((left.len(), left[0].iov_len), (1, 12));
        assert_eq!(left[0].iov_base.addr(), base.addr() + 4);
        assert!(after(&mut pieces[1..], 12).is_empty());
    }
}
