//! Clones and copies of files that keep their holes.
//!
//! Called by `store` (disks of sandboxes), `staging` (files of a template) and `archive`. Refuses
//! to read past the length it is told. A reflink costs the same however long the file is, so it is
//! tried first; a copy happens where the file system has no reflink, and says so once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Once;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// How much is read at once, and the granularity at which zeros are left out.
pub(crate) const BLOCK_BYTES: usize = 64 * 1024;
/// Most that one `copy_file_range` is asked for, so that no call lasts long.
const COPY_BYTES_MAX: usize = 64 << 20;

/// How the content got there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Both files share their extents.
    Reflink,
    /// The data was copied, the holes were kept.
    Bytes,
}

/// Gives the empty file `to` the content of `from`.
pub(crate) fn clone_or_copy(from: &File, to: &File) -> io::Result<Copied> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(Copied::Reflink),
        Err(error) if cannot_clone(error) => {
            copy(from, to)?;
            Ok(Copied::Bytes)
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives the file `to`, which has content of its own, the content of the equally long `from`.
pub(crate) fn clone_over(from: &File, to: &File) -> io::Result<Copied> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(Copied::Reflink),
        Err(error) if cannot_clone(error) => {
            // What was there must not show through the holes of what comes.
            to.set_len(0)?;
            copy(from, to)?;
            Ok(Copied::Bytes)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the file system cannot clone at all, and did nothing.
const fn cannot_clone(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS)
}

/// Says once per process that disks are copied and not cloned.
pub(crate) fn warn_no_reflink(path: &Path) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            path = %path.display(),
            "this file system cannot clone files, so each sandbox disk is copied, which is slow; \
             put the store on XFS (with reflink=1) or btrfs"
        );
    });
}

/// Copies the data of `from` into the empty file `to`, and makes both equally long.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    for_each_extent(from, len, |start, end| copy_range(from, to, start, end))
}

/// Gives the empty file `to` the content of `from` in blocks of its own, also where the file system
/// would rather share them. Written in order, so that it has few extents.
pub(crate) fn copy_apart(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    for_each_extent(from, len, |start, end| copy_through_memory(from, to, start, end))
}

/// Calls `visit` with each run of data (start, end), in order.
fn for_each_extent(
    file: &File,
    len: u64,
    mut visit: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(len),
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if start < at || start >= len {
            return Ok(());
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(len);
        if end <= start {
            return Err(io::Error::other("the file changed while it was read"));
        }
        visit(start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let want = usize::try_from(end - source).unwrap_or(usize::MAX).min(COPY_BYTES_MAX);
        let done =
            rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), want);
        match done {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                return copy_through_memory(from, to, source, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(BLOCK_BYTES);
        from.read_exact_at(&mut buffer[..want], at)?;
        to.write_all_at(&buffer[..want], at)?;
        at += want as u64;
    }
    Ok(())
}

/// Calls `visit` with each block of the file that is not all zeros, in order. Blocks start at
/// multiples of [`BLOCK_BYTES`] and have that length, but for the last one of the file. Which
/// blocks are visited depends on the content alone, not on where the file has holes.
///
/// `read_failed` says what a failed read means to the caller.
pub(crate) fn for_each_block<E>(
    file: &File,
    len: u64,
    read_failed: impl FnOnce(io::Error) -> E,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let block = BLOCK_BYTES as u64;
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut next = 0;
    let mut failed = None;
    let walked = for_each_extent(file, len, |start, end| {
        let mut at = (start - start % block).max(next);
        while at < end {
            let want = usize::try_from(len - at).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            file.read_exact_at(&mut buffer[..want], at)?;
            if !is_zero(&buffer[..want])
                && let Err(error) = visit(at, &buffer[..want])
            {
                failed = Some(error);
                return Err(io::Error::other("stopped"));
            }
            at += block;
        }
        next = at;
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => walked.map_err(read_failed),
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Words first: this runs over every block of a disk.
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|b| *b == 0)
}

/// The checksum of a file's content: CRC32C over each block that is not all zeros, preceded by its
/// offset. A hole and written zeros are the same.
pub(crate) fn digest(file: &File, len: u64) -> io::Result<u32> {
    let mut crc = 0;
    for_each_block(
        file,
        len,
        |error| error,
        |offset, block| {
            crc = crc32c::crc32c_append(crc, &offset.to_le_bytes());
            crc = crc32c::crc32c_append(crc, block);
            Ok::<(), io::Error>(())
        },
    )?;
    Ok(crc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use std::os::unix::fs::MetadataExt;

    fn make(dir: &TempDir, name: &str) -> File {
        let path = dir.join(name);
        File::options().read(true).write(true).create_new(true).open(path).unwrap()
    }

    #[test]
    fn copies_keep_content_length_and_holes() {
        let dir = TempDir::new();
        let from = make(&dir, "from");
        from.set_len((8 << 20) + 3).unwrap();
        from.write_all_at(&[7; 100], 3 << 20).unwrap();
        from.write_all_at(&[8; 3], 8 << 20).unwrap();
        for through_memory in [false, true] {
            let to = make(&dir, if through_memory { "memory" } else { "kernel" });
            if through_memory {
                to.set_len((8 << 20) + 3).unwrap();
                for_each_extent(&from, (8 << 20) + 3, |start, end| {
                    copy_through_memory(&from, &to, start, end)
                })
                .unwrap();
            } else {
                copy(&from, &to).unwrap();
            }
            let (mut a, mut b) = (vec![0; (8 << 20) + 3], vec![0; (8 << 20) + 3]);
            from.read_exact_at(&mut a, 0).unwrap();
            to.read_exact_at(&mut b, 0).unwrap();
            assert!(a == b);
            assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20, "holes were filled");
        }
    }

    #[test]
    fn a_clone_is_a_reflink_where_the_file_system_can() {
        let dir = TempDir::new();
        let (from, to) = (make(&dir, "from"), make(&dir, "to"));
        from.write_all_at(&[7; 1 << 20], 0).unwrap();
        let copied = clone_or_copy(&from, &to).unwrap();
        // `TMPDIR` on XFS or btrfs tries the one, on ext4 or tmpfs the other.
        let magic = rustix::fs::fstatfs(&from).unwrap().f_type;
        let reflinks = [0x5846_5342, 0x9123_683e].contains(&magic);
        assert_eq!(copied == Copied::Reflink, reflinks, "file system {magic:#x}");
        to.write_all_at(&[8; 10], 0).unwrap();
        let mut bytes = [0; 20];
        from.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 20], "a write to the clone is not seen by its source");
        to.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((&bytes[..10], &bytes[10..]), (&[8; 10][..], &[7; 10][..]));
    }

    #[test]
    fn the_digest_depends_on_content_and_not_on_holes() {
        let dir = TempDir::new();
        let (sparse, full) = (make(&dir, "sparse"), make(&dir, "full"));
        let len = 3 * BLOCK_BYTES as u64 + 100;
        sparse.set_len(len).unwrap();
        full.write_all_at(&vec![0; usize::try_from(len).unwrap()], 0).unwrap();
        assert_eq!(digest(&sparse, len).unwrap(), digest(&full, len).unwrap());
        let at = 2 * BLOCK_BYTES as u64 + 5;
        sparse.write_all_at(b"x", at).unwrap();
        let one = digest(&sparse, len).unwrap();
        assert_ne!(one, digest(&full, len).unwrap());
        full.write_all_at(b"x", at).unwrap();
        assert_eq!(one, digest(&full, len).unwrap());
        // The same block somewhere else is another content.
        let moved = make(&dir, "moved");
        moved.set_len(len).unwrap();
        moved.write_all_at(b"x", at - BLOCK_BYTES as u64).unwrap();
        assert_ne!(one, digest(&moved, len).unwrap());
    }

    #[test]
    fn blocks_are_visited_once_and_in_order() {
        let dir = TempDir::new();
        let file = make(&dir, "file");
        let len = 4 * BLOCK_BYTES as u64;
        file.set_len(len).unwrap();
        // Two runs of data within one block, with a hole between them.
        file.write_all_at(&[1; 10], 0).unwrap();
        file.write_all_at(&[1; 10], 32 * 1024).unwrap();
        file.write_all_at(&[1; 10], len - 10).unwrap();
        let mut seen = Vec::new();
        for_each_block(
            &file,
            len,
            |e| e,
            |offset, block| {
                seen.push((offset, block.len()));
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, [(0, BLOCK_BYTES), (3 * BLOCK_BYTES as u64, BLOCK_BYTES)]);
    }

    #[test]
    fn zeros_are_recognised_whatever_their_number() {
        for len in [0, 1, 31, 32, 33, 4096] {
            assert!(is_zero(&vec![0; len]));
            for at in 0..len {
                let mut bytes = vec![0; len];
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
            }
        }
    }
}
