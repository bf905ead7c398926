//! A template as a tar archive, to carry it to another host.
//!
//! Called by `mica template export` and `import`. Refuses an archive that is not exactly what
//! [`write_archive`] makes: names, order, sizes, offsets and checksums are all checked, and nothing
//! is committed before the last check. What follows the end of the archive is not looked at, so it
//! can be read from a block device that is longer.
//!
//! ```text
//! manifest            the template's manifest, as it is stored
//! kernel
//! initramfs           where there is one
//! disk/<offset>       a run of the disk that is not zeros; the offset is 16 hexadecimal digits
//! ...                 runs in order; what no run covers is a hole
//! end                 empty: an archive without it was cut off
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Result, StorageError};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest, PartInfo};
use crate::sparse::{BLOCK_BYTES, for_each_block};
use crate::staging::{Staging, unix_ms};
use crate::store::Store;
use crate::template::{MANIFEST_FILE, Part, Template};

/// Bytes of the disk in one entry, at most.
const RUN_BYTES_MAX: usize = 8 << 20;
const DISK_PREFIX: &str = "disk/";
const END: &str = "end";

/// Writes a template to `out`.
///
/// # Errors
/// When the template cannot be read, or `out` cannot be written.
pub fn write_archive(template: &Template, out: impl Write) -> Result<()> {
    let manifest = template.manifest();
    let bytes = manifest.encode().map_err(|source| StorageError::Describe { source })?;
    let mut archive = ArchiveWriter { tar: tar::Builder::new(out) };
    archive.entry(MANIFEST_FILE, bytes.len() as u64, bytes.as_slice())?;
    archive.entry(Part::Kernel.file_name(), manifest.kernel.bytes, template.open_kernel()?)?;
    if let (Some(info), Some(file)) = (manifest.initramfs, template.open_initramfs()?) {
        archive.entry(Part::Initramfs.file_name(), info.bytes, file)?;
    }
    if let Some(file) = template.open_disk()? {
        archive.disk(&file, manifest.disk_bytes())?;
    }
    archive.entry(END, 0, io::empty())?;
    let mut out = archive.tar.into_inner().map_err(write_error)?;
    out.flush().map_err(write_error)
}

fn write_error(error: io::Error) -> StorageError {
    StorageError::io("write", Path::new("the template archive"), error)
}

struct ArchiveWriter<W: Write> {
    tar: tar::Builder<W>,
}

impl<W: Write> ArchiveWriter<W> {
    fn entry(&mut self, name: &str, size: u64, content: impl Read) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).map_err(write_error)?;
        header.set_size(size);
        header.set_mode(0o600);
        header.set_cksum();
        // A file that shrank gives a short entry; the reader's length check finds it.
        self.tar.append(&header, content.take(size)).map_err(write_error)
    }

    /// Writes the runs of the disk that are not zeros, each up to [`RUN_BYTES_MAX`].
    fn disk(&mut self, file: &File, len: u64) -> Result<()> {
        let mut start = 0;
        let mut run: Vec<u8> = Vec::with_capacity(RUN_BYTES_MAX);
        let read_failed = |e| StorageError::io("read", Path::new("the template's disk"), e);
        for_each_block(file, len, read_failed, |offset, block| {
            let contiguous = start + run.len() as u64 == offset;
            if !run.is_empty() && (!contiguous || run.len() + BLOCK_BYTES > RUN_BYTES_MAX) {
                self.run(start, &run)?;
                run.clear();
            }
            if run.is_empty() {
                start = offset;
            }
            run.extend_from_slice(block);
            Ok(())
        })?;
        if run.is_empty() { Ok(()) } else { self.run(start, &run) }
    }

    fn run(&mut self, start: u64, run: &[u8]) -> Result<()> {
        self.entry(&format!("{DISK_PREFIX}{start:016x}"), run.len() as u64, run)
    }
}

/// What to do when a template of the archive's name is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExisting {
    /// Keep it when it is the same, fail when it is not.
    Keep,
    /// Replace it.
    Replace,
}

/// What [`Store::import`] did.
#[derive(Debug)]
pub enum Imported {
    /// The template is new in the store.
    Stored(Template),
    /// It was there already, the same in everything but its id and date.
    UpToDate(Template),
}

impl Store {
    /// Reads an archive into the store. The template gets an id of its own.
    ///
    /// # Errors
    /// When the archive is not whole and right, [`StorageError::TemplateExists`], or when the
    /// store cannot be written. Then nothing has changed.
    pub fn import(&self, archive: impl Read, on_existing: OnExisting) -> Result<Imported> {
        let mut tar = tar::Archive::new(archive);
        let mut entries = Entries { tar: tar.entries().map_err(read_error)?, buffer: Vec::new() };
        let manifest = entries.manifest()?;
        if on_existing == OnExisting::Keep
            && let Some(existing) = self.find_template(manifest.name.as_str())?
            && existing.manifest().same_content(&manifest)
        {
            return Ok(Imported::UpToDate(existing));
        }
        let staging = self.stage(&manifest.name, on_existing == OnExisting::Replace)?;
        entries.parts(&staging, &manifest)?;
        verify(&staging, Part::Kernel, Some(manifest.kernel))?;
        verify(&staging, Part::Initramfs, manifest.initramfs)?;
        verify(&staging, Part::Disk, manifest.disk)?;
        let id = staging.id().to_owned();
        let manifest = Manifest { id, created_unix_ms: unix_ms(), ..manifest };
        staging.commit_manifest(manifest).map(Imported::Stored)
    }
}

/// Checks a received file against the manifest that came with it.
fn verify(staging: &Staging, part: Part, expected: Option<PartInfo>) -> Result<()> {
    if staging.seal_part(part)? == expected {
        return Ok(());
    }
    let what = "its checksum differs: the archive was damaged on its way".to_owned();
    Err(StorageError::Part { part: part.file_name(), what })
}

fn read_error(error: io::Error) -> StorageError {
    StorageError::io("read", Path::new("the template archive"), error)
}

fn not_whole(what: impl Into<String>) -> StorageError {
    StorageError::Archive(what.into())
}

/// The entries of an archive, in order.
struct Entries<'a, R: Read> {
    tar: tar::Entries<'a, R>,
    buffer: Vec<u8>,
}

/// One entry, its name and size checked for form.
struct Entry<'a, R: Read> {
    name: String,
    size: u64,
    content: tar::Entry<'a, R>,
}

impl<'a, R: Read> Entries<'a, R> {
    fn next(&mut self) -> Result<Entry<'a, R>> {
        let Some(entry) = self.tar.next() else {
            return Err(not_whole("it ends before its `end` entry"));
        };
        let content = entry.map_err(read_error)?;
        if !content.header().entry_type().is_file() {
            return Err(not_whole("it has an entry that is not a plain file"));
        }
        let name = std::str::from_utf8(&content.path_bytes())
            .map_err(|_| not_whole("it has an entry whose name is not text"))?
            .to_owned();
        Ok(Entry { name, size: content.size(), content })
    }

    fn expect(&mut self, name: &str) -> Result<Entry<'a, R>> {
        let entry = self.next()?;
        if entry.name == name {
            return Ok(entry);
        }
        let found: String = entry.name.chars().take(40).collect();
        Err(not_whole(format!("`{name}` should come next, and {found:?} does")))
    }

    fn manifest(&mut self) -> Result<Manifest> {
        let entry = self.expect(MANIFEST_FILE)?;
        if entry.size > MANIFEST_BYTES_MAX as u64 {
            return Err(not_whole("its manifest is too long"));
        }
        let (mut bytes, size) = (Vec::new(), entry.size);
        entry
            .content
            .take(MANIFEST_BYTES_MAX as u64)
            .read_to_end(&mut bytes)
            .map_err(read_error)?;
        if bytes.len() as u64 != size {
            return Err(not_whole("it was cut off"));
        }
        let path = Path::new("in the template archive").to_path_buf();
        Manifest::decode(&bytes).map_err(|source| StorageError::Manifest { path, source })
    }

    /// Receives every file, to the end of the archive.
    fn parts(&mut self, staging: &Staging, manifest: &Manifest) -> Result<()> {
        self.buffer = vec![0; RUN_BYTES_MAX];
        self.whole(staging, Part::Kernel, manifest.kernel)?;
        if let Some(info) = manifest.initramfs {
            self.whole(staging, Part::Initramfs, info)?;
        }
        match manifest.disk {
            Some(info) => self.disk(staging, info),
            None => self.expect(END).map(drop),
        }
    }

    fn whole(&mut self, staging: &Staging, part: Part, info: PartInfo) -> Result<()> {
        let entry = self.expect(part.file_name())?;
        if entry.size != info.bytes {
            return Err(not_whole(format!("`{}` is not as long as its manifest says", entry.name)));
        }
        let (file, path) = (staging.create_part(part)?, staging.part_path(part));
        self.receive(entry, &file, &path, 0)
    }

    fn disk(&mut self, staging: &Staging, info: PartInfo) -> Result<()> {
        let (file, path) = (staging.create_part(Part::Disk)?, staging.part_path(Part::Disk));
        file.set_len(info.bytes).map_err(|e| StorageError::io("size", &path, e))?;
        let mut received = 0;
        loop {
            let entry = self.next()?;
            if entry.name == END {
                return Ok(());
            }
            let offset = run_offset(&entry.name)
                .ok_or_else(|| not_whole("it has an entry that a template does not have"))?;
            let end = offset.checked_add(entry.size).filter(|end| *end <= info.bytes);
            let Some(end) = end else {
                return Err(not_whole("it has disk content past the end of the disk"));
            };
            if offset < received || entry.size > RUN_BYTES_MAX as u64 {
                return Err(not_whole("its disk content is out of order, or in too large a piece"));
            }
            self.receive(entry, &file, &path, offset)?;
            received = end;
        }
    }

    /// Copies an entry's content into a file.
    fn receive(
        &mut self,
        mut entry: Entry<'_, R>,
        file: &File,
        path: &Path,
        offset: u64,
    ) -> Result<()> {
        let mut done = 0;
        while done < entry.size {
            let want = usize::try_from(entry.size - done).unwrap_or(usize::MAX);
            let want = want.min(self.buffer.len());
            let part = &mut self.buffer[..want];
            entry.content.read_exact(part).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => not_whole("it was cut off"),
                _ => read_error(error),
            })?;
            file.write_all_at(part, offset + done)
                .map_err(|e| StorageError::io("write", path, e))?;
            done += want as u64;
        }
        Ok(())
    }
}

/// The offset in the name of a run of the disk.
fn run_offset(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(DISK_PREFIX)?;
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if digits.len() != 16 || !digits.bytes().all(lower_hex) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests;
