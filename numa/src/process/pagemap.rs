//! Which pages of another process are there, are its own, or were written since the last look.
//!
//! Called by `process`. A guest's memory is a private mapping of its layers: a page that is not the
//! file's is one that it wrote. One PAGEMAP_SCAN ioctl finds them; kernels before 6.7 do not have it, and
//! there the same is read from the page map itself, eight bytes for each page.
//!
//! Pages written since the last scan are known where the memory is registered for asynchronous
//! write protection (`userfault`): a scan that re-arms protects exactly the pages it found, and the
//! kernel lifts the protection from a page at its first write. Pages that were never protected count as
//! written, and so does a page that became the process's own since.
//!
//! Refuses the zero page, which a mere read of anonymous memory maps: there is nothing in it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use mica_units::{FrameRun, PAGE_BYTES};
use rustix::process::Pid;

use super::{ProcessError, RemoteMemory};
use crate::arena::Mapping;
use crate::sys::{PageRegion, ScanArguments, pagemap_scan};

/// Regions of one ioctl. The kernel collects 512 at a time.
const REGIONS: usize = 512;
/// Entries of the page map that one read takes.
const ENTRIES: usize = 16 * 1024;
/// Frames that are looked at before the executor may do something else: 128 MiB, well below half a
/// millisecond.
const FRAMES_PER_TURN: u32 = 32 * 1024;

// Categories of PAGEMAP_SCAN (linux/fs.h).
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFN_ZERO: u64 = 1 << 5;
// Its flags.
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WP_ASYNC: u64 = 1 << 1;

// Bits of an entry of the page map (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_PFN: u64 = (1 << 55) - 1;

/// Which pages to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its own pages: in memory or swapped out, not a file's, not the zero page.
    ///
    /// May hold a page too many where memory was discarded while write-protected: the kernel keeps a
    /// marker there that looks like a page in swap. Reading it gives what the memory holds.
    Anonymous,
    /// Of those, the ones that are not write-protected.
    AnonymousWritten {
        /// Whether to protect what was found, in the same step.
        rearm: bool,
    },
    /// What is in memory, a file's pages too: the working set.
    Resident,
}

/// What one scan found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// In order, apart from one another.
    pub runs: Vec<FrameRun>,
    /// Where to go on, when as many frames were found as were asked for.
    pub next: Option<u32>,
}

impl Scan {
    fn add(&mut self, first: u32, count: u32) {
        let last = self.runs.last().copied();
        if let Some(joined) = last
            .filter(|last| last.end() == first)
            .and_then(|last| FrameRun::new(last.first(), last.count().checked_add(count)?))
        {
            self.runs.pop();
            self.runs.push(joined);
        } else {
            self.runs.extend(FrameRun::new(first, count));
        }
    }

    /// How many frames.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count())).sum()
    }
}

/// A process's page map. Stays that of the memory it was opened on: after an exec or the end of the
/// process a scan fails.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    has_scan: bool,
}

impl Pagemap {
    pub(super) fn open(pid: Pid) -> Result<Self, ProcessError> {
        let file = File::open(format!("/proc/{}/pagemap", pid.as_raw_nonzero()));
        let file = file.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ProcessError::Gone,
            _ => ProcessError::of("open the page map", source),
        })?;
        let mut nothing = ScanArguments::default();
        let has_scan = pagemap_scan(file.as_fd(), &mut nothing, &mut []).is_ok();
        Ok(Self { file, has_scan })
    }

    /// Whether this kernel finds pages by one call, and can say which were written.
    #[must_use]
    pub fn can_track_writes(&self) -> bool {
        self.has_scan
    }

    /// Uses the page map as kernels before 6.7 have it, to compare the two.
    #[must_use]
    pub fn without_scan(mut self) -> Self {
        self.has_scan = false;
        self
    }

    /// Finds at most `frames_max` frames of `within`. Blocks while it looks: about 1 ms for each 2^31
    /// bytes looked at.
    ///
    /// # Errors
    /// [`ProcessError::NotTracked`] when writes were asked for and part of `within` is not registered for
    /// write protection; [`ProcessError::Unsupported`] when they were and the kernel cannot tell;
    /// [`ProcessError::Gone`] and others. What was re-armed before an error is lost: look at
    /// [`Wanted::Anonymous`] then.
    pub fn scan(
        &self,
        memory: RemoteMemory,
        within: FrameRun,
        wanted: Wanted,
        frames_max: u32,
    ) -> Result<Scan, ProcessError> {
        let mut scan = Scan::default();
        self.scan_into(&mut scan, memory, within, wanted, frames_max)?;
        Ok(scan)
    }

    /// Finds all of them, and lets the executor do other things in between. When the future is dropped
    /// after it was polled, what it re-armed is lost.
    ///
    /// # Errors
    /// As [`Self::scan`].
    pub async fn scan_all(
        &self,
        memory: RemoteMemory,
        wanted: Wanted,
    ) -> Result<Vec<FrameRun>, ProcessError> {
        let mut scan = Scan::default();
        let mut first = 0;
        while let Some(within) =
            FrameRun::new(first, FRAMES_PER_TURN.min(memory.frames().saturating_sub(first)))
        {
            self.scan_into(&mut scan, memory, within, wanted, u32::MAX)?;
            first = scan.next.take().unwrap_or(within.end());
            if first < memory.frames() {
                crate::rt::yield_now().await;
            }
        }
        Ok(scan.runs)
    }

    fn scan_into(
        &self,
        scan: &mut Scan,
        memory: RemoteMemory,
        within: FrameRun,
        wanted: Wanted,
        frames_max: u32,
    ) -> Result<(), ProcessError> {
        if memory.range(within).is_none() {
            return Err(ProcessError::Range);
        }
        if self.has_scan {
            self.by_scan(scan, memory, within, wanted, frames_max)
        } else {
            self.by_entries(scan, memory, within, wanted, frames_max)
        }
    }

    fn by_scan(
        &self,
        scan: &mut Scan,
        memory: RemoteMemory,
        within: FrameRun,
        wanted: Wanted,
        frames_max: u32,
    ) -> Result<(), ProcessError> {
        let range = memory.range(within).ok_or(ProcessError::Range)?;
        let mut arguments = ScanArguments {
            start: range.address,
            end: range.address + range.bytes,
            ..arguments_of(wanted)
        };
        let mut regions = vec![PageRegion::default(); REGIONS];
        let mut room = u64::from(frames_max);
        while arguments.start < arguments.end {
            if room == 0 {
                scan.next = memory.frame_at(arguments.start);
                break;
            }
            arguments.max_pages = room;
            let found = pagemap_scan(self.file.as_fd(), &mut arguments, &mut regions)
                .map_err(|source| refusal(wanted, source))?;
            // Linux 6.18 can say that the walk ended before regions that it returned (seen with more room
            // than it collects at a time, where the last part fills the room): never go back.
            let mut walked = arguments.walk_end;
            for region in regions.iter().take(found) {
                walked = walked.max(region.end);
                let first = memory.frame_at(region.start).ok_or(ProcessError::Range)?;
                let count = region.end.saturating_sub(region.start) / PAGE_BYTES;
                room = room.saturating_sub(count);
                let count = u32::try_from(count).map_err(|_| ProcessError::Range)?;
                scan.add(first, count);
            }
            if walked <= arguments.start {
                // The kernel always moves on; without this a change there would be a loop for ever.
                return Err(ProcessError::Range);
            }
            arguments.start = walked;
        }
        self.check(range.address)
    }

    /// That the process still has its memory: a scan of memory that is gone succeeds and finds nothing,
    /// while a read of the page map then ends at once.
    fn check(&self, address: u64) -> Result<(), ProcessError> {
        let read = self.file.read_at(&mut [0; 8], address / PAGE_BYTES * 8);
        match read.map_err(|source| ProcessError::of("read the page map", source))? {
            0 => Err(ProcessError::Gone),
            _ => Ok(()),
        }
    }

    fn by_entries(
        &self,
        scan: &mut Scan,
        memory: RemoteMemory,
        within: FrameRun,
        wanted: Wanted,
        frames_max: u32,
    ) -> Result<(), ProcessError> {
        if matches!(wanted, Wanted::AnonymousWritten { .. }) {
            return Err(ProcessError::Unsupported);
        }
        let zero = zero_page();
        let mut room = frames_max;
        let mut bytes = vec![0u8; ENTRIES * 8];
        let mut first = within.first();
        while first < within.end() {
            let here = (within.end() - first).min(u32::try_from(ENTRIES).unwrap_or(1));
            let run = FrameRun::new(first, here).ok_or(ProcessError::Range)?;
            let range = memory.range(run).ok_or(ProcessError::Range)?;
            let wanted_bytes = here as usize * 8;
            let read =
                self.file.read_at(&mut bytes[..wanted_bytes], range.address / PAGE_BYTES * 8);
            let read = read.map_err(|source| ProcessError::of("read the page map", source))?;
            if read < 8 {
                return Err(ProcessError::Gone);
            }
            for (entry, frame) in bytes[..read].chunks_exact(8).zip(first..) {
                let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
                if !matches(entry, wanted, zero) {
                    continue;
                }
                if room == 0 {
                    scan.next = Some(frame);
                    return Ok(());
                }
                room -= 1;
                scan.add(frame, 1);
            }
            first += u32::try_from(read / 8).unwrap_or(here);
        }
        Ok(())
    }
}

fn arguments_of(wanted: Wanted) -> ScanArguments {
    let in_memory = ScanArguments { return_mask: PRESENT | SWAPPED, ..ScanArguments::default() };
    // A category that is inverted and in the mask must be absent.
    let anonymous = ScanArguments {
        category_inverted: FILE | PFN_ZERO,
        category_mask: FILE | PFN_ZERO,
        category_anyof_mask: PRESENT | SWAPPED,
        ..in_memory
    };
    match wanted {
        Wanted::Anonymous => anonymous,
        Wanted::AnonymousWritten { rearm } => ScanArguments {
            flags: if rearm { WP_MATCHING | CHECK_WP_ASYNC } else { CHECK_WP_ASYNC },
            category_mask: anonymous.category_mask | WRITTEN,
            ..anonymous
        },
        Wanted::Resident => ScanArguments {
            category_inverted: PFN_ZERO,
            category_mask: PFN_ZERO | PRESENT,
            ..in_memory
        },
    }
}

fn refusal(wanted: Wanted, source: std::io::Error) -> ProcessError {
    match (wanted, source.raw_os_error()) {
        (Wanted::AnonymousWritten { .. }, Some(libc::EPERM)) => ProcessError::NotTracked,
        _ => ProcessError::of("scan the page map", source),
    }
}

/// Whether an entry of the page map is one of those wanted.
fn matches(entry: u64, wanted: Wanted, zero: Option<u64>) -> bool {
    let present = entry & ENTRY_PRESENT != 0;
    if present && zero.is_some_and(|zero| entry & ENTRY_PFN == zero) {
        return false;
    }
    match wanted {
        Wanted::Resident => present,
        _ => entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0,
    }
}

/// The number of the physical page that is all zeroes, found by reading memory that was never written.
/// `None` where the kernel does not show the numbers (without CAP_SYS_ADMIN); the zero page then counts
/// as any other, which costs a page of zeroes in a snapshot and nothing else.
fn zero_page() -> Option<u64> {
    static ZERO: OnceLock<Option<u64>> = OnceLock::new();
    *ZERO.get_or_init(|| {
        let page = Mapping::anonymous(PAGE_BYTES).ok()?;
        page.read(0, &mut [0]).ok()?;
        let mut entry = [0; 8];
        let own = File::open("/proc/self/pagemap").ok()?;
        own.read_exact_at(&mut entry, page.address() / PAGE_BYTES * 8).ok()?;
        Some(u64::from_ne_bytes(entry) & ENTRY_PFN).filter(|number| *number != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_become_one() {
        let mut scan = Scan::default();
        for (first, count) in [(0, 2), (2, 1), (4, 1), (5, 5), (12, 1)] {
            scan.add(first, count);
        }
        let runs: Vec<_> = scan.runs.iter().map(|run| (run.first(), run.count())).collect();
        assert_eq!(runs, [(0, 3), (4, 6), (12, 1)]);
        assert_eq!(scan.frames(), 10);
    }

    #[test]
    fn entries_are_told_apart() {
        let zero = Some(77);
        for (entry, anonymous, resident) in [
            (0, false, false),
            (ENTRY_PRESENT | 5, true, true),
            (ENTRY_PRESENT | ENTRY_FILE | 5, false, true),
            (ENTRY_SWAPPED, true, false),
            (ENTRY_SWAPPED | ENTRY_FILE, false, false),
            (ENTRY_PRESENT | 77, false, false),
        ] {
            assert_eq!(matches(entry, Wanted::Anonymous, zero), anonymous, "{entry:#x}");
            assert_eq!(matches(entry, Wanted::Resident, zero), resident, "{entry:#x}");
        }
        assert!(zero_page().is_none_or(|number| number != 0));
    }
}
