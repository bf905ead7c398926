//! What the agent's memory alone has of a sandbox, kept on its disk for a boot without that memory.
//!
//! Called by the control exchange before the disk alone is kept, and when the agent starts.
//! Refuses to read more than a control line could have brought.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mica_wire::guest::{CONTROL_LINE_BYTES_MAX, Defaults};
use rustix::fs::OFlags;

/// Where the defaults of a built template are.
pub const DEFAULTS: &str = "/var/lib/mica-guest/defaults.json";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path}")]
pub struct KeptError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// Keeps `defaults`; where there are none, those of an earlier time go.
pub fn write(path: &Path, defaults: Option<&Defaults>) -> Result<(), KeptError> {
    let failed = |what| move |source| KeptError { what, path: path.to_owned(), source };
    let Some(defaults) = defaults else {
        return match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove")(error)),
            _ => Ok(()),
        };
    };
    let bytes = serde_json::to_vec(defaults).map_err(|error| failed("write")(error.into()))?;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed("make the directory of"))?;
    }
    // Whole or not at all: the machine may be stopped for good at any moment.
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).map_err(failed("write"))?;
    std::fs::rename(&new, path).map_err(failed("replace"))
}

/// Reads them back; none where there are none.
pub fn read(path: &Path) -> Result<Option<Defaults>, KeptError> {
    let failed = |source| KeptError { what: "read", path: path.to_owned(), source };
    // A pipe in its place must not hold the boot up.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(CONTROL_LINE_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(failed)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode};

    use super::*;

    #[test]
    fn defaults_are_kept_whole_and_those_of_before_go() {
        let dir = std::env::temp_dir().join(format!("mica-kept-{}", std::process::id()));
        let path = dir.join("below/defaults.json");
        assert!(read(&path).unwrap().is_none());
        write(&path, None).unwrap();
        let defaults = Defaults { user: Some("root".to_owned()), ..Defaults::default() };
        write(&path, Some(&defaults)).unwrap();
        assert_eq!(read(&path).unwrap(), Some(defaults));
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("defaults.json"));
        write(&path, None).unwrap();
        assert!(read(&path).unwrap().is_none());
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(read(&path).is_err(), "nobody writes to it, and nobody waits for that");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
