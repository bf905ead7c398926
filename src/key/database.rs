//! The key database: a JSON file of what is known of each key, which is not the key.
//!
//! Written by `mica key`, read by it and by `mica serve`. Every change replaces the file whole, so that a
//! reader sees the one before or the one after, also when the power goes. Refuses a file that is open to
//! others, and one with anything in it that is not understood.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mica_http::{KeyHash, KeyLimits};
use mica_units::TenantId;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

/// Keys of one host.
const KEYS_MAX: usize = 10_000;

/// A longer file is some other file.
const FILE_BYTES_MAX: u64 = 16 << 20;

const NAME_CHARS_MAX: usize = 128;
const OWNER_ONLY: u32 = 0o600;
const OTHERS: u32 = 0o077;

/// What is known of a key.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRecord {
    /// What it is recognised by.
    pub hash: KeyHash,
    /// Whose sandboxes it opens.
    pub tenant: TenantId,
    /// What people call it.
    pub name: String,
    /// When it was made.
    pub created_unix_s: u64,
    /// How much it may do.
    pub limits: KeyLimits,
}

impl KeyRecord {
    /// What it is called by in commands and in records of sandboxes.
    pub fn id(&self) -> String {
        self.hash.id()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    version: u32,
    keys: Vec<KeyForm>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyForm {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    tenant: String,
    #[serde(default)]
    name: String,
    created_unix_s: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sandboxes_max: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    creates_per_second: Option<f64>,
}

impl From<&KeyRecord> for KeyForm {
    fn from(record: &KeyRecord) -> Self {
        Self {
            id: record.id(),
            sha256: Some(record.hash.to_string()),
            tenant: record.tenant.to_string(),
            name: record.name.clone(),
            created_unix_s: record.created_unix_s,
            sandboxes_max: record.limits.sandboxes_max,
            creates_per_second: record.limits.creates_per_second,
        }
    }
}

impl KeyForm {
    fn check(self) -> Result<KeyRecord> {
        let hash: KeyHash = self
            .sha256
            .as_deref()
            .and_then(|hash| hash.parse().ok())
            .context("`sha256` must be 64 lower-case hex digits")?;
        if hash.id() != self.id {
            bail!("`id` must be the first 12 digits of `sha256`");
        }
        if self.name.chars().count() > NAME_CHARS_MAX || self.name.chars().any(char::is_control) {
            bail!("a name has at most {NAME_CHARS_MAX} characters, and no control characters");
        }
        if self.sandboxes_max == Some(0) {
            bail!("the most sandboxes must be at least 1; revoke a key that may have none");
        }
        // Not a number is not above zero either.
        if self.creates_per_second.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            bail!("creates per second must be a number above 0");
        }
        let limits = KeyLimits {
            sandboxes_max: self.sandboxes_max,
            creates_per_second: self.creates_per_second,
        };
        let tenant = self.tenant.parse()?;
        Ok(KeyRecord { hash, tenant, name: self.name, created_unix_s: self.created_unix_s, limits })
    }
}

/// Every key. A file that is not there has none.
///
/// # Errors
/// When it cannot be read, is open to others, or is not in form.
pub fn read(path: &Path) -> Result<Vec<KeyRecord>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    if file.metadata()?.mode() & OTHERS != 0 {
        let path = path.display();
        bail!("{path} says what opens this host and is open to others; run `chmod 600 {path}`");
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    parse(&text).with_context(|| format!("{} is not a key database", path.display()))
}

fn parse(text: &str) -> Result<Vec<KeyRecord>> {
    let form: FileForm = serde_json::from_str(text)?;
    if form.version != VERSION {
        bail!("it has version {}, and this program reads {VERSION}", form.version);
    }
    checked(form.keys)
}

fn checked(keys: Vec<KeyForm>) -> Result<Vec<KeyRecord>> {
    if keys.len() > KEYS_MAX {
        bail!("there may be {KEYS_MAX} keys; revoke some");
    }
    let mut ids = BTreeSet::new();
    let check = |key: KeyForm| {
        let id = key.id.chars().take(64).collect::<String>();
        if !ids.insert(key.id.clone()) {
            bail!("there are two keys {id:?}");
        }
        key.check().with_context(|| format!("key {id:?}"))
    };
    keys.into_iter().map(check).collect()
}

/// Changes the database, alone: who else changes it waits.
///
/// # Errors
/// When `change` fails, when what it leaves is not in form, or when files cannot be written. Nothing is
/// changed then.
pub fn update(path: &Path, change: impl FnOnce(&mut Vec<KeyRecord>) -> Result<()>) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    // The database itself is replaced, so a lock on it would be a lock on what it was.
    let lock_path = beside(path, ".lock");
    let lock = private(OpenOptions::new().create(true).truncate(false), &lock_path)?;
    flock(&lock, FlockOperation::LockExclusive).context("lock the key database")?;
    let mut keys = read(path)?;
    change(&mut keys)?;
    let form = FileForm { version: VERSION, keys: keys.iter().map(KeyForm::from).collect() };
    let text = serde_json::to_string_pretty(&form)?;
    checked(form.keys)?;
    let new_path = beside(path, ".new");
    let mut new = private(OpenOptions::new().create(true).truncate(true), &new_path)?;
    let write = |new: &mut File| {
        new.write_all(text.as_bytes())?;
        new.write_all(b"\n")?;
        new.sync_all()?;
        fs::rename(&new_path, path)?;
        File::open(directory)?.sync_all()
    };
    write(&mut new).with_context(|| format!("cannot replace {}", path.display()))
}

fn private(options: &mut OpenOptions, path: &Path) -> Result<File> {
    let opened = options.write(true).mode(OWNER_ONLY).open(path);
    opened.with_context(|| format!("cannot make {}", path.display()))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The keys as JSON for who asks for a list: not even their hashes.
///
/// # Errors
/// When they do not encode.
pub fn listed(keys: &[KeyRecord]) -> Result<String> {
    let forms: Vec<_> = keys.iter().map(|key| KeyForm { sha256: None, ..key.into() }).collect();
    Ok(serde_json::to_string_pretty(&forms)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_http::ApiKey;
    use std::os::unix::fs::PermissionsExt;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("mica-key-db-{}-{name}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        path
    }

    fn record(byte: u8) -> KeyRecord {
        KeyRecord {
            hash: ApiKey::from_random([byte; 20]).hash(),
            tenant: "team-1".parse().unwrap(),
            name: "CI \u{e9}".to_owned(),
            created_unix_s: 1_700_000_000,
            limits: KeyLimits { sandboxes_max: Some(3), creates_per_second: Some(0.5) },
        }
    }

    fn add(path: &Path, record: KeyRecord) -> Result<()> {
        update(path, |keys| {
            keys.push(record);
            Ok(())
        })
    }

    #[test]
    fn what_is_written_is_read_and_is_its_owners_alone() {
        let directory = scratch("round");
        let path = directory.join("deep/keys.json");
        assert_eq!(read(&path).unwrap(), []);
        let plain = KeyRecord { limits: KeyLimits::default(), ..record(2) };
        add(&path, record(1)).unwrap();
        add(&path, plain.clone()).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), plain]);
        assert_eq!(path.metadata().unwrap().mode() & 0o777, OWNER_ONLY);
        assert!(!beside(&path, ".new").exists());
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("0101010101"), "a key must not be kept");
        assert!(!listed(&[record(1)]).unwrap().contains("sha256"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = add(&path, record(3)).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn two_who_change_it_at_once_lose_nothing() {
        let directory = scratch("lock");
        let path = directory.join("keys.json");
        std::thread::scope(|scope| {
            for first in [0, 100] {
                let path = &path;
                scope
                    .spawn(move || (first..first + 20).for_each(|n| add(path, record(n)).unwrap()));
            }
        });
        assert_eq!(read(&path).unwrap().len(), 40);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let directory = scratch("bad");
        let path = directory.join("keys.json");
        add(&path, record(1)).unwrap();
        let limits = |sandboxes_max, creates_per_second| KeyRecord {
            limits: KeyLimits { sandboxes_max, creates_per_second },
            ..record(2)
        };
        for bad in [
            record(1),
            limits(Some(0), None),
            limits(None, Some(0.0)),
            limits(None, Some(-1.0)),
            limits(None, Some(f64::NAN)),
            limits(None, Some(f64::INFINITY)),
            KeyRecord { name: "a\nb".to_owned(), ..record(2) },
            KeyRecord { name: "x".repeat(129), ..record(2) },
        ] {
            assert!(add(&path, bad.clone()).is_err(), "{bad:?}");
        }
        assert_eq!(read(&path).unwrap(), [record(1)]);
        for text in ["", "{}", "[]", r#"{"version":2,"keys":[]}"#, r#"{"version":1,"keys":[{}]}"#] {
            assert!(parse(text).is_err(), "{text}");
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(parse(&text.replace("team-1", "Team")).is_err());
        assert!(parse(&text.replace("sandboxes_max", "sandboxes_most")).is_err());
        fs::remove_dir_all(directory).unwrap();
    }
}
