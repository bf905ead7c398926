//! A file on its way to a client.
//!
//! Called by [`super::files`] on a thread of `identity`. Reads in chunks and waits for the client
//! between them. Refuses what is not a regular file (a pipe would wait for ever), and links like
//! `/proc/self/fd/3`, which would be what the agent has open and not what the user means.

use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::conditional::{Conditions, Validators, Verdict};
use super::range::{self, Part};
use crate::http::BodySender;

/// Larger files are sent as they are to whoever takes them so.
const GZIP_BYTES_MAX: u64 = 1 << 20;

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// A client that takes nothing for so long is given up: it holds one of a few places.
const STILL_MAX: Duration = Duration::from_secs(600);

/// How long the news of an answer broken off waits for the client.
const ABORT_MAX: Duration = Duration::from_secs(5);

/// Why a file cannot be sent; the texts are E2B's.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    #[error("path '{0}' does not exist")]
    NotFound(String),
    #[error("path '{0}' is a directory")]
    Directory(String),
    #[error("path '{0}' is not a regular file")]
    NotAFile(String),
    #[error("'{0}' may not be read")]
    Denied(String),
    #[error("'{0}' is not as the request's conditions want it")]
    Condition(String),
    #[error("range not satisfiable: the file has {size} bytes")]
    Range { size: u64 },
    #[error("error opening file '{path}'")]
    Io {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

/// What the answer's headers are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The whole file's size; `None` for files that only tell by being read, as in `/proc`.
    pub size: Option<u64>,
    pub part: Part,
    pub is_gzip: bool,
    /// Seconds since the Unix epoch.
    pub modified: u64,
    /// What the file's content is told apart by, with its quotes.
    pub etag: Option<String>,
    /// The client has it already, and no body follows.
    pub is_unmodified: bool,
}

/// What the client wants.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub conditions: Conditions,
    pub gzip: bool,
    /// Whether what is not coded will do.
    pub identity: bool,
}

impl Wanted {
    /// Coding a large file costs both sides more time than its bytes do on a local network.
    fn is_gzip(&self, size: Option<u64>) -> bool {
        let is_large = size.is_none_or(|bytes| bytes > GZIP_BYTES_MAX);
        self.gzip && size != Some(0) && !(is_large && self.identity)
    }
}

/// Opens the file, answers with its head, and sends it. Blocks; `body` needs `runtime` to wait.
pub fn send(
    path: &Path,
    wanted: &Wanted,
    head: oneshot::Sender<Result<Head, DownloadError>>,
    body: BodySender,
    runtime: &Handle,
) {
    let (mut file, first, found) = match open(path, wanted) {
        Ok(opened) => opened,
        Err(error) => {
            // Whoever asked may have gone.
            drop(head.send(Err(error)));
            return;
        }
    };
    if head.send(Ok(found.clone())).is_err() || found.is_unmodified {
        return;
    }
    let mut sink = Sink { body, runtime, gzip: None };
    if found.is_gzip {
        let level = flate2::Compression::fast();
        sink.gzip = Some(flate2::write::GzEncoder::new(Vec::new(), level));
    }
    match copy(&mut file, first, &found, &mut sink) {
        // A client that has gone needs no more telling.
        Ok(()) | Err(CopyError::Gone) => {}
        Err(CopyError::Io(error)) => {
            // A client that takes nothing does not take this either. Its connection is cut all the
            // same, because the answer then ends before its promised length.
            let told = async { timeout(ABORT_MAX, sink.body.abort(error)).await };
            drop(runtime.block_on(told));
        }
    }
}

type Opened = (std::fs::File, Vec<u8>, Head);

fn open(path: &Path, wanted: &Wanted) -> Result<Opened, DownloadError> {
    let shown = path.display().to_string();
    // Not waiting for a pipe's other end: what it is, is looked at next.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    let mut file = match opened {
        Ok(fd) => std::fs::File::from(fd),
        Err(Errno::NOENT | Errno::NOTDIR) => return Err(DownloadError::NotFound(shown)),
        Err(Errno::ACCESS | Errno::PERM) => return Err(DownloadError::Denied(shown)),
        Err(Errno::NXIO | Errno::LOOP) => return Err(DownloadError::NotAFile(shown)),
        Err(error) => return Err(DownloadError::Io { path: shown, source: error.into() }),
    };
    let fail = |source| DownloadError::Io { path: shown.clone(), source };
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(DownloadError::Directory(shown));
    }
    if !metadata.is_file() {
        return Err(DownloadError::NotAFile(shown));
    }
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut first = Vec::new();
    let size = match metadata.len() {
        0 => {
            first = read_chunk(&mut file, CHUNK_BYTES).map_err(fail)?;
            first.is_empty().then_some(0)
        }
        // Read before its length is promised: one that is being written anew is shorter a moment later.
        size if size <= CHUNK_BYTES as u64 => {
            (&file).take(size).read_to_end(&mut first).map_err(fail)?;
            Some(first.len() as u64)
        }
        size => Some(size),
    };
    // A file whose size only reading tells is another one each time.
    let etag = size.map(|size| format!("\"{:x}-{size:x}\"", modified.as_nanos()));
    let mut head = Head {
        size,
        part: Part::Whole,
        is_gzip: wanted.is_gzip(size),
        modified: modified.as_secs(),
        etag,
        is_unmodified: false,
    };
    if let (Some(size), Some(etag)) = (size, &head.etag) {
        match wanted.conditions.check(Validators { etag, modified: head.modified }) {
            Verdict::NotModified => head.is_unmodified = true,
            Verdict::Failed => return Err(DownloadError::Condition(shown)),
            Verdict::Send(Some(header)) => head.part = range::parse(header, size),
            Verdict::Send(None) => {}
        }
    }
    match head.part {
        Part::Unsatisfiable => return Err(DownloadError::Range { size: size.unwrap_or(0) }),
        Part::Range { first: start, last } => {
            file.seek(std::io::SeekFrom::Start(start)).map_err(fail)?;
            first = part_of(first, start, last);
        }
        Part::Whole => {}
    }
    Ok((file, first, head))
}

/// What of a file that was read whole is asked for. Nothing of one that was not.
fn part_of(mut whole: Vec<u8>, start: u64, last: u64) -> Vec<u8> {
    let at = |place: u64| usize::try_from(place).unwrap_or(usize::MAX);
    whole.truncate(at(last.saturating_add(1)));
    whole.drain(..at(start).min(whole.len()));
    whole
}

enum CopyError {
    Gone,
    Io(std::io::Error),
}

struct Sink<'a> {
    body: BodySender,
    runtime: &'a Handle,
    gzip: Option<flate2::write::GzEncoder<Vec<u8>>>,
}

impl Sink<'_> {
    fn put(&mut self, chunk: Vec<u8>) -> Result<(), CopyError> {
        let chunk = match &mut self.gzip {
            Some(encoder) => {
                encoder.write_all(&chunk).map_err(CopyError::Io)?;
                std::mem::take(encoder.get_mut())
            }
            None => chunk,
        };
        self.pass(chunk)
    }

    fn pass(&self, chunk: Vec<u8>) -> Result<(), CopyError> {
        if chunk.is_empty() {
            return Ok(());
        }
        // The timer needs the runtime around it when it is made.
        let sent = async { timeout(STILL_MAX, self.body.send(Bytes::from(chunk))).await };
        match self.runtime.block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(CopyError::Gone),
            Err(_) => {
                let text = "the client has taken nothing for too long";
                Err(CopyError::Io(std::io::Error::other(text)))
            }
        }
    }

    fn end(&mut self) -> Result<(), CopyError> {
        match self.gzip.take() {
            Some(encoder) => self.pass(encoder.finish().map_err(CopyError::Io)?),
            None => Ok(()),
        }
    }
}

fn copy(
    file: &mut std::fs::File,
    first: Vec<u8>,
    head: &Head,
    sink: &mut Sink<'_>,
) -> Result<(), CopyError> {
    let read = first.len() as u64;
    sink.put(first)?;
    // The length went out with the head: a file that grows is cut there, and one that shrinks
    // breaks the answer off.
    let promised = match (head.part, head.size) {
        (Part::Range { first, last }, _) => Some(last - first + 1),
        (_, size) => size,
    };
    let mut left = promised.map(|promised| promised.saturating_sub(read));
    while left != Some(0) {
        let most = left.and_then(|left| usize::try_from(left).ok()).unwrap_or(usize::MAX);
        let chunk = read_chunk(file, most.min(CHUNK_BYTES)).map_err(CopyError::Io)?;
        if chunk.is_empty() {
            if left.is_some() {
                let text = "the file became shorter while it was sent";
                return Err(CopyError::Io(std::io::Error::other(text)));
            }
            break;
        }
        let count = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        left = left.map(|left| left.saturating_sub(count));
        sink.put(chunk)?;
    }
    sink.end()
}

fn read_chunk(file: &mut std::fs::File, most: usize) -> std::io::Result<Vec<u8>> {
    let mut chunk = vec![0; most];
    loop {
        match file.read(&mut chunk) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(count) => {
                chunk.truncate(count);
                return Ok(chunk);
            }
        }
    }
}
