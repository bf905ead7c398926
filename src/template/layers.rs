//! Applies the layers of a container image to a directory: the changesets of layer.md of the OCI image
//! specification, with the files that say what is gone.
//!
//! Called by the build, with streams of tar. Every path is resolved within the directory, as if it were the root: no link
//! in the image leads out of it. Refuses names that step out; leaves out device nodes, which a sandbox has of its own.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{Mode, OFlags, ResolveFlags, XattrFlags, openat2};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use super::oci::within;
use super::runner::Runner;

const GONE: &[u8] = b".wh.";
const ALL_GONE: &[u8] = b".wh..wh..opq";
const XATTR: &str = "SCHILY.xattr.";
/// The last second that ext4 keeps, in 2446.
const MTIME_MAX: u64 = (1 << 34) - (1 << 31) - 1;

/// A directory that layers are applied to, and what the layer at hand has put there, with what that lies in.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    of_this_layer: HashSet<PathBuf>,
}

/// A directory of the image, and a name in it.
struct Place {
    parent: OwnedFd,
    name: std::ffi::OsString,
}

impl Place {
    /// A path that leads there through the open directory, whatever its own path has become.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.parent.as_raw_fd().to_string()).join(&self.name)
    }
}

impl Root {
    /// # Errors
    /// When the directory cannot be opened.
    pub fn open(dir: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty())
            .with_context(|| format!("could not open {}", dir.display()))?;
        Ok(Self { dir, of_this_layer: HashSet::new() })
    }

    /// Writes a file that all may read in place of whatever has its name: a link there could lead out.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn write(&self, path: &Path, text: &str) -> Result<()> {
        let write = || -> Result<()> {
            let parent = self.open_dir(path.parent().unwrap_or(Path::new("")))?;
            let place = Place { parent, name: path.file_name().unwrap_or_default().to_owned() };
            remove(&place.path())?;
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(place.path())?;
            file.write_all(text.as_bytes())?;
            Ok(file.set_permissions(Permissions::from_mode(0o644))?)
        };
        write().with_context(|| format!("could not write /{}", path.display()))
    }

    /// Refuses an image in which such a directory is a link: what is mounted there would be mounted elsewhere.
    ///
    /// # Errors
    /// When it is none.
    pub fn own_directory(&self, name: &str) -> Result<()> {
        self.open_dir(Path::new(name))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(&self.dir, name, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            Ok(_) => Ok(()),
            Err(_) => bail!("/{name} is to be a directory in the image, and is something else"),
        }
    }

    /// Applies one layer.
    ///
    /// # Errors
    /// When it is damaged, or a file cannot be made; the message names it.
    pub fn apply(&mut self, runner: &Runner, layer: impl Read) -> Result<()> {
        self.of_this_layer.clear();
        for entry in tar::Archive::new(layer).entries()? {
            runner.check()?;
            let mut entry = entry.context("the layer is damaged")?;
            if entry.header().entry_type() == EntryType::XGlobalHeader {
                continue;
            }
            let path = within(&entry.path().context("the layer is damaged")?)?;
            self.take(&mut entry, &path).with_context(|| format!("`/{}`", path.display()))?;
        }
        Ok(())
    }

    fn take<R: Read>(&mut self, entry: &mut Entry<R>, path: &Path) -> Result<()> {
        let Some(name) = path.file_name() else {
            return Ok(());
        };
        let parent = self.open_dir(path.parent().unwrap_or(Path::new("")))?;
        if name.as_bytes() == ALL_GONE {
            return self.empty(path.parent().unwrap_or(Path::new("")), &parent);
        }
        if let Some(gone) = name.as_bytes().strip_prefix(GONE) {
            if matches!(gone, b"" | b"." | b"..") {
                bail!("it says that a directory itself is gone");
            }
            let place = Place { parent, name: OsStr::from_bytes(gone).to_owned() };
            return remove(&place.path());
        }
        let place = Place { parent, name: name.to_owned() };
        self.make(entry, &place)?;
        self.of_this_layer.extend(path.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    /// Opens a directory of the image, made where it is not there.
    fn open_dir(&self, path: &Path) -> Result<OwnedFd> {
        let here = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&self.dir, here, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(dir) => return Ok(dir),
            Err(Errno::NOENT) if path.file_name().is_some() => {}
            Err(error) => return Err(error.into()),
        }
        let parent = self.open_dir(path.parent().unwrap_or(Path::new("")))?;
        let place = Place { parent, name: path.file_name().unwrap_or_default().to_owned() };
        if fs::symlink_metadata(place.path()).is_ok_and(|there| there.is_symlink()) {
            bail!("`/{}` is a link that leads nowhere in the image", path.display());
        }
        fs::create_dir(place.path())?;
        // Whatever the umask of who builds: others than root are to come by here.
        fs::set_permissions(place.path(), Permissions::from_mode(0o755))?;
        Ok(openat2(&self.dir, here, flags, Mode::empty(), ResolveFlags::IN_ROOT)?)
    }

    /// Removes from a directory what lower layers had put there.
    fn empty(&self, path: &Path, dir: &OwnedFd) -> Result<()> {
        let here = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string());
        self.empty_of_lower(path, &here)
    }

    /// `path` is the directory's name in the image, `here` where it is.
    fn empty_of_lower(&self, path: &Path, here: &Path) -> Result<()> {
        for entry in fs::read_dir(here)? {
            let entry = entry?;
            let (own, there) = (path.join(entry.file_name()), here.join(entry.file_name()));
            if !self.of_this_layer.contains(&own) {
                remove(&there)?;
            } else if entry.file_type()?.is_dir() {
                self.empty_of_lower(&own, &there)?;
            }
        }
        Ok(())
    }

    fn make<R: Read>(&self, entry: &mut Entry<R>, place: &Place) -> Result<()> {
        let path = place.path();
        let kind = entry.header().entry_type();
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|there| there.is_dir());
        if !(is_dir && kind.is_dir()) {
            remove(&path)?;
        }
        let mode = entry.header().mode()? & 0o7777;
        match kind {
            EntryType::Directory => {
                if !is_dir {
                    DirBuilder::new().mode(0o700).create(&path)?;
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut options = OpenOptions::new();
                options.write(true).create_new(true).mode(0o600);
                io::copy(entry, &mut options.open(&path)?)?;
            }
            EntryType::Symlink => symlink(target(entry)?, &path)?,
            EntryType::Link => {
                let to = within(&target(entry)?)?;
                let parent = self.open_dir(to.parent().unwrap_or(Path::new("")))?;
                let to = Place { parent, name: to.file_name().unwrap_or_default().to_owned() };
                // Its owner and mode are those of the file that it is.
                return Ok(fs::hard_link(to.path(), &path)?);
            }
            EntryType::Fifo => {
                rustix::fs::mkfifoat(&place.parent, &place.name, Mode::RUSR | Mode::WUSR)?;
            }
            EntryType::Char | EntryType::Block => return Ok(()),
            other => bail!("an entry of kind {other:?} is not known"),
        }
        own(entry, &path, mode)
    }
}

/// Owner, mode, attributes and time. The mode comes after the owner, whose change takes setuid away.
fn own<R: Read>(entry: &mut Entry<R>, path: &Path, mode: u32) -> Result<()> {
    let id = |id: io::Result<u64>| -> Result<u32> { Ok(u32::try_from(id?)?) };
    let (uid, gid) = (id(entry.header().uid())?, id(entry.header().gid())?);
    lchown(path, Some(uid), Some(gid))?;
    if entry.header().entry_type().is_symlink() {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    attributes(entry, path)?;
    // One before 1970, or long after us, is none that a file system keeps.
    let seconds = entry.header().mtime().unwrap_or(0).min(MTIME_MAX);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    Ok(File::set_modified(&file, time)?)
}

/// Extended attributes, such as what a program may do without being root.
fn attributes<R: Read>(entry: &mut Entry<R>, path: &Path) -> Result<()> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
    for extension in extensions {
        // What has a line's end in its value is taken for two by who read it.
        let Ok(extension) = extension else {
            bail!(
                "an attribute is not in form, or has a line's end in its value, which is not read here"
            );
        };
        let Some(name) = extension.key()?.strip_prefix(XATTR) else { continue };
        rustix::fs::setxattr(path, name, extension.value_bytes(), XattrFlags::empty())
            .with_context(|| format!("the attribute {name}"))?;
    }
    Ok(())
}

fn target<R: Read>(entry: &Entry<R>) -> Result<PathBuf> {
    let link = entry.link_name()?.ok_or_else(|| anyhow!("a link without a target"))?;
    Ok(link.into_owned())
}

/// Removes whatever is there, and follows no link.
fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}
