//! A file on its way from a client.
//!
//! Called by [`super::files`] on a thread of `identity`, which makes the file and the parents that it
//! lacked the user's. Writes under a temporary name beside the target and renames at the end, so an
//! upload that is cut off leaves what was there before. A file that was there keeps its mode and
//! becomes the user's. Refuses directories and special files as targets, links like
//! `/proc/self/fd/3`, which lead to what the agent has open, and what not even root may write.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use tokio::sync::mpsc;

use super::metadata::{self, Metadata};
use super::operations::may_write;
use crate::interpreter::hex;

/// What is uploaded, piece by piece. A channel that closes without `End` was cut off.
#[derive(Debug)]
pub enum Chunk {
    Data(Bytes),
    End,
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error("path is a directory: {0}")]
    Directory(String),
    #[error("path is not a regular file: {0}")]
    NotAFile(String),
    #[error("'{0}' may not be written")]
    Denied(String),
    #[error("not enough disk space available to write '{0}'")]
    NoSpace(String),
    #[error("the file system of '{0}' keeps no metadata; send no X-Metadata headers")]
    NoMetadata(String),
    #[error("the upload of '{0}' was cut off before its end; nothing was changed")]
    CutOff(String),
    #[error("'{0}' cannot be a path: one of its parents is not a directory, or a name is too long")]
    Path(String),
    #[error("error writing file '{path}'")]
    Io {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

impl UploadError {
    /// What an error of the kernel means for the file at `path`.
    pub fn of(path: &Path, source: std::io::Error) -> Self {
        let path = path.display().to_string();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::NoSpace(path)
            }
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied(path)
            }
            std::io::ErrorKind::NotADirectory
            | std::io::ErrorKind::InvalidFilename
            | std::io::ErrorKind::AlreadyExists => Self::Path(path),
            _ => Self::Io { path, source },
        }
    }
}

/// What an upload does to its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upload {
    /// There was nothing.
    New,
    /// There was a file.
    Over,
}

/// How temporary names begin. Watchers know them, and tell the rename that ends an upload as what
/// it is to a client.
const TEMPORARY: [(Upload, &str); 2] =
    [(Upload::New, ".mica-upload-new-"), (Upload::Over, ".mica-upload-over-")];

/// A name beside `target` that nothing has.
///
/// # Errors
/// When there are no random bytes to be had.
pub fn temporary_name(target: &Path, upload: Upload) -> std::io::Result<PathBuf> {
    let mut random = [0_u8; 8];
    let count = rustix::rand::getrandom(&mut random[..], rustix::rand::GetRandomFlags::empty())?;
    let prefix = TEMPORARY.iter().find(|(of, _)| *of == upload).map_or("", |(_, prefix)| prefix);
    Ok(target.with_file_name(format!("{prefix}{}", hex(random.get(..count).unwrap_or(&random)))))
}

/// What kind of upload a name is the temporary one of, if it is one.
#[must_use]
pub fn temporary(name: &OsStr) -> Option<Upload> {
    let starts = |prefix: &str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
    TEMPORARY.iter().find(|(_, prefix)| starts(prefix)).map(|(upload, _)| *upload)
}

/// Receives one file. Blocks.
///
/// # Errors
/// See [`UploadError`]; what was there before is then still there.
pub fn receive(
    path: &Path,
    metadata: &Metadata,
    chunks: &mut mpsc::Receiver<Chunk>,
) -> Result<(), UploadError> {
    put(path, metadata, |file| fill(file, path, chunks))
}

/// Makes the file at `path`, parents included, what `fill` writes.
///
/// # Errors
/// See [`UploadError`]; what was there before is then still there.
pub fn put(
    path: &Path,
    metadata: &Metadata,
    fill: impl FnOnce(&mut File) -> Result<(), UploadError>,
) -> Result<(), UploadError> {
    let fail = |source| UploadError::of(path, source);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    let existing = existing(path)?;
    // Through a link, the file that it leads to is replaced, not the link.
    let target = existing.as_ref().map_or(path, |(real, _)| real);
    let upload = if existing.is_some() { Upload::Over } else { Upload::New };
    let mode = existing.as_ref().map(|(_, mode)| *mode);
    let temporary = temporary_name(target, upload).map_err(fail)?;
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode.unwrap_or(0o666))
        .custom_flags(nofollow())
        .open(&temporary);
    match created {
        Ok(mut file) => {
            let kept = fill(&mut file)
                .and_then(|()| keep_metadata(&file, path, metadata))
                .and_then(|()| put_in_place(&file, mode, &temporary, target).map_err(fail));
            if kept.is_err() {
                // The first error is the one to tell.
                std::fs::remove_file(&temporary).unwrap_or_default();
            }
            kept
        }
        // Some directories let nobody make a file, but those in them be written: the kernel's own.
        Err(error) if existing.is_some() && makes_no_files(&error) => {
            let mut file = open_in_place(target).map_err(fail)?;
            fill(&mut file)?;
            keep_metadata(&file, path, metadata)
        }
        Err(error) => Err(fail(error)),
    }
}

/// A file emptied to be written where it is, and the user's as if it had been made anew.
fn open_in_place(path: &Path) -> std::io::Result<File> {
    // What it was may be a pipe by now, which would wait for a reader.
    let flags = nofollow() | nonblock();
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(std::io::Error::other("it is no file any more"));
    }
    let (owner, group) = (geteuid().as_raw(), getegid().as_raw());
    // Some of the kernel's own files refuse a change of hands that changes nothing.
    if (found.uid(), found.gid()) != (owner, group) {
        match fchown(&file, Some(owner), Some(group)) {
            // Files of `/proc/sys` are nobody's to give.
            Err(error) if error.kind() != std::io::ErrorKind::PermissionDenied => {
                return Err(error);
            }
            _ => {}
        }
    }
    file.set_len(0)?;
    Ok(file)
}

fn keep_metadata(file: &File, path: &Path, metadata: &Metadata) -> Result<(), UploadError> {
    metadata::replace(file, metadata).map_err(|errno| match errno {
        Errno::OPNOTSUPP => UploadError::NoMetadata(path.display().to_string()),
        other => UploadError::of(path, other.into()),
    })
}

fn nonblock() -> i32 {
    i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0)
}

fn nofollow() -> i32 {
    i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

/// Whether that is what a directory says in which no file can be made: one of `/sys`, or of `/proc`.
fn makes_no_files(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::NotFound)
}

/// The real path and the permissions of the file that is to be replaced, if there is one.
fn existing(path: &Path) -> Result<Option<(PathBuf, u32)>, UploadError> {
    let shown = || path.display().to_string();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let metadata = match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(UploadError::NotAFile(shown())),
        other => other.map_err(std::io::Error::from).and_then(|file| File::from(file).metadata()),
    };
    let metadata = metadata.map_err(|error| UploadError::of(path, error))?;
    if metadata.is_dir() {
        return Err(UploadError::Directory(shown()));
    }
    if !metadata.is_file() {
        return Err(UploadError::NotAFile(shown()));
    }
    match may_write(path) {
        Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => return Err(UploadError::Denied(shown())),
        other => other.map_err(|error| UploadError::of(path, error.into()))?,
    }
    let real = std::fs::canonicalize(path).map_err(|error| UploadError::of(path, error))?;
    Ok(Some((real, metadata.permissions().mode() & 0o777)))
}

fn fill(
    file: &mut File,
    path: &Path,
    chunks: &mut mpsc::Receiver<Chunk>,
) -> Result<(), UploadError> {
    loop {
        match chunks.blocking_recv() {
            Some(Chunk::Data(data)) => {
                file.write_all(&data).map_err(|error| UploadError::of(path, error))?;
            }
            Some(Chunk::End) => return Ok(()),
            None => return Err(UploadError::CutOff(path.display().to_string())),
        }
    }
}

fn put_in_place(
    file: &File,
    mode: Option<u32>,
    temporary: &Path,
    target: &Path,
) -> std::io::Result<()> {
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    std::fs::rename(temporary, target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    fn base(name: &str) -> PathBuf {
        let base = std::env::temp_dir().join(format!("mica-up-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&base).unwrap();
        base
    }

    fn upload(path: &Path, pieces: &[&str], whole: bool) -> Result<(), UploadError> {
        let (sender, mut receiver) = mpsc::channel(16);
        for piece in pieces {
            sender.try_send(Chunk::Data(Bytes::copy_from_slice(piece.as_bytes()))).unwrap();
        }
        if whole {
            sender.try_send(Chunk::End).unwrap();
        }
        drop(sender);
        receive(path, &Metadata::new(), &mut receiver)
    }

    fn names(base: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(base).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_cut_upload_leaves_what_was_there() {
        let base = base("cut");
        let path = base.join("f");
        assert!(matches!(upload(&path, &["half"], false), Err(UploadError::CutOff(_))));
        assert!(names(&base).is_empty(), "nothing is left");
        upload(&path, &["one ", "two"], true).unwrap();
        assert!(upload(&path, &["half"], false).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
        assert_eq!(names(&base), ["f"]);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn permissions_and_links_stay() {
        let base = base("keep");
        let (file, link) = (base.join("script"), base.join("link"));
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("script", &link).unwrap();
        upload(&link, &["new"], true).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o751);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn odd_targets_are_refused() {
        let base = base("odd");
        let file = File::create(base.join("f")).unwrap();
        let odd = |path: &Path| upload(path, &["x"], true).unwrap_err();
        assert!(matches!(odd(&base), UploadError::Directory(_)));
        assert!(matches!(odd(Path::new("/")), UploadError::Directory(_)));
        assert!(matches!(odd(Path::new("/dev/null")), UploadError::NotAFile(_)));
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert!(matches!(odd(Path::new(&own)), UploadError::NotAFile(_)));
        assert!(matches!(odd(&base.join("f/g")), UploadError::Path(_)));
        assert!(matches!(odd(&base.join("n".repeat(300))), UploadError::Path(_)));
        upload(&base.join("new/deep/file"), &["x"], true).unwrap();
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn a_file_of_the_kernels_is_written_where_it_is() {
        let own = Path::new("/proc/self/comm");
        upload(own, &["mica-named"], true).unwrap();
        assert_eq!(std::fs::read_to_string(own).unwrap(), "mica-named\n");
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(matches!(UploadError::of(Path::new("/f"), error), UploadError::NoSpace(_)));
    }
}
