//! The file of plain API keys: one on each line, empty lines and `#` comments between them.
//!
//! Called by `mica serve`, which makes the file with one key when there is none anywhere, so that a host
//! of one person works at once. Its keys are the default tenant's and have no limits; whoever hands keys
//! to others makes them with `mica key create`, which keeps only hashes. Refuses a file that others may
//! read, and one without a key.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use mica_http::ApiKey;

use super::random_key;

/// Keys are few; a longer file is some other file.
const FILE_BYTES_MAX: u64 = 1 << 20;
const OWNER_ONLY: u32 = 0o600;
const OTHERS: u32 = 0o077;

/// Every key. A file that is not there has none.
///
/// # Errors
/// When the file cannot be read, is open to others, or has a line that is no key.
pub fn read(path: &Path) -> Result<Vec<ApiKey>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    let mode = file.metadata()?.mode();
    if mode & OTHERS != 0 {
        let path = path.display();
        bail!("{path} holds keys and is open to others; run `chmod 600 {path}`");
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    parse(&text).with_context(|| format!("{} is not a key file", path.display()))
}

fn parse(text: &str) -> Result<Vec<ApiKey>> {
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // The line itself stays out of the message: it may be most of a key.
        keys.push(line.parse::<ApiKey>().with_context(|| format!("line {number}"))?);
    }
    if keys.is_empty() {
        bail!("it has no key; delete it, and the next start makes one where there is no other");
    }
    Ok(keys)
}

/// Makes the file with one new key.
///
/// # Errors
/// When it cannot be made, or is there.
pub fn create(path: &Path) -> Result<()> {
    let make = || -> Result<()> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let key = random_key()?;
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(OWNER_ONLY).open(path)?;
        file.write_all(format!("{}\n", key.reveal()).as_bytes())?;
        Ok(file.sync_all()?)
    };
    make().with_context(|| format!("cannot make {}", path.display()))?;
    tracing::info!(path = %path.display(), "made an API key; clients send it as X-API-Key");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("mica-key-{}-{name}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        path
    }

    #[test]
    fn a_missing_file_is_made_for_its_owner_alone_and_kept() {
        let directory = scratch("made");
        let path = directory.join("deep/keys");
        assert!(read(&path).unwrap().is_empty());
        create(&path).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, OWNER_ONLY);
        let first = std::fs::read_to_string(&path).unwrap();
        assert!(first.trim().parse::<ApiKey>().is_ok());
        assert!(create(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), first);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn lines() {
        let key = format!("e2b_{}", "ab".repeat(20));
        let ring = parse(&format!("# mine\n\n  {key}  \n{key}\n")).unwrap();
        assert_eq!(ring.len(), 2);
        assert!(parse("# nothing\n").is_err());
        let error = format!("{:#}", parse(&format!("{key}\nsecret\n")).unwrap_err());
        assert!(error.contains("line 2") && !error.contains("secret"), "{error}");
    }
}
