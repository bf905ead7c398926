//! Every key that a daemon takes, from both files, kept up to date while it runs.
//!
//! Called by `mica serve`. A thread of its own looks a few times in a second whether a file has changed,
//! so no shard ever waits for a disk. Refuses to forget keys because a file cannot be read just then:
//! what was last read holds, and the log says why. A file that is gone has no keys.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use mica_http::{KeyHash, KeyLimits, Keys};
use mica_shards::Accounts;
use mica_units::TenantId;

use super::{database, file};

/// Between two looks. A key that is revoked must not work a second later.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Where keys are.
#[derive(Clone, Debug)]
pub struct KeyPlaces {
    /// The file of plain keys.
    pub file: PathBuf,
    /// The key database.
    pub database: PathBuf,
}

/// What a file was when it was looked at. Every way to change one changes some of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    mode: u32,
    modified: (i64, i64),
    changed: (i64, i64),
}

fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    match path.metadata() {
        Ok(metadata) => Ok(Some(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            mode: metadata.mode(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The keys of a daemon.
#[derive(Debug)]
pub struct KeyBook {
    places: KeyPlaces,
    keys: Keys,
    accounts: Accounts,
    seen: Option<[Option<Stamp>; 2]>,
}

impl KeyBook {
    /// Reads both files and publishes what is in them. Where there is no key at all, and one is needed,
    /// it makes the key file with one.
    ///
    /// # Errors
    /// When a file cannot be read or made, is open to others, or is not in form.
    pub fn open(places: KeyPlaces, keys: Keys, needs_one: bool) -> Result<Self> {
        let mut book = Self { places, keys, accounts: Accounts::new(), seen: None };
        let found = database::read(&book.places.database)?;
        if found.is_empty() && needs_one && !book.places.file.exists() {
            file::create(&book.places.file)?;
        }
        book.look()?;
        Ok(book)
    }

    /// The accounts of all keys, for sandboxes that are there already.
    pub fn accounts(&self) -> Accounts {
        self.accounts.clone()
    }

    /// Keeps the keys as the files are, as long as the process lives.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn keep(mut self) -> Result<()> {
        let look = move || {
            loop {
                thread::sleep(LOOK_EVERY);
                match self.look() {
                    Ok(false) => {}
                    Ok(true) => tracing::info!(keys = self.keys.len(), "read the API keys again"),
                    Err(error) => {
                        let error = format!("{error:#}");
                        tracing::error!(error, "cannot read the API keys; those from before hold");
                    }
                }
            }
        };
        thread::Builder::new().name("keys".to_owned()).spawn(look).context("the key thread")?;
        Ok(())
    }

    /// Reads the files if they have changed since the last time. Whether they had.
    fn look(&mut self) -> Result<bool> {
        // Before they are read: a change meanwhile shows the next time.
        let stamps = [stamp(&self.places.file)?, stamp(&self.places.database)?];
        if self.seen == Some(stamps) {
            return Ok(false);
        }
        let read = self.read();
        // Also when they are not in form: that is said once, not four times a second. One that could not
        // be read is read again, for it may hold back that a key was revoked.
        let is_out_of_form =
            |error: &anyhow::Error| error.downcast_ref::<std::io::Error>().is_none();
        if read.as_ref().err().is_none_or(is_out_of_form) {
            self.seen = Some(stamps);
        }
        let all = read?;
        self.keys.publish(all, &mut self.accounts);
        Ok(true)
    }

    fn read(&self) -> Result<Vec<(KeyHash, TenantId, KeyLimits)>> {
        let plain = file::read(&self.places.file)?;
        let plain = plain.iter().map(|key| (key.hash(), TenantId::default(), KeyLimits::default()));
        let kept = database::read(&self.places.database)?;
        let kept = kept.into_iter().map(|key| (key.hash, key.tenant, key.limits));
        // What the database says of a key that is in both holds.
        Ok(plain.chain(kept).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::database::KeyRecord;
    use super::*;
    use mica_http::ApiKey;

    fn places(name: &str) -> KeyPlaces {
        let directory =
            std::env::temp_dir().join(format!("mica-key-book-{}-{name}", std::process::id()));
        drop(std::fs::remove_dir_all(&directory));
        std::fs::create_dir(&directory).unwrap();
        KeyPlaces { file: directory.join("api-keys"), database: directory.join("keys.json") }
    }

    fn add(places: &KeyPlaces, byte: u8) {
        let record = KeyRecord {
            hash: ApiKey::from_random([byte; 20]).hash(),
            tenant: TenantId::default(),
            name: String::new(),
            created_unix_s: 0,
            limits: KeyLimits::default(),
        };
        database::update(&places.database, |keys| {
            keys.push(record);
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn one_key_is_made_where_there_is_none_and_one_is_needed() {
        let places = places("first");
        let keys = Keys::new(true);
        KeyBook::open(places.clone(), keys.clone(), false).unwrap();
        assert!(!places.file.exists() && keys.is_empty());
        add(&places, 1);
        KeyBook::open(places.clone(), keys.clone(), true).unwrap();
        assert!(!places.file.exists(), "there is one");
        assert_eq!(keys.len(), 1);
        std::fs::remove_file(&places.database).unwrap();
        let book = KeyBook::open(places.clone(), keys.clone(), true).unwrap();
        assert!(places.file.exists());
        assert_eq!((keys.len(), book.accounts().len()), (1, 1));
        std::fs::remove_dir_all(places.file.parent().unwrap()).unwrap();
    }

    #[test]
    fn changes_are_seen_and_what_cannot_be_read_changes_nothing() {
        let places = places("changes");
        let keys = Keys::new(false);
        let mut book = KeyBook::open(places.clone(), keys.clone(), true).unwrap();
        assert!(!book.look().unwrap(), "nothing has changed");
        add(&places, 1);
        assert!(book.look().unwrap());
        assert_eq!(keys.len(), 2);
        std::fs::write(&places.database, "{").unwrap();
        assert!(book.look().is_err());
        assert!(!book.look().unwrap(), "it is said once");
        assert_eq!(keys.len(), 2);
        std::fs::remove_file(&places.database).unwrap();
        assert!(book.look().unwrap());
        assert_eq!(keys.len(), 1);
        std::fs::remove_dir_all(places.file.parent().unwrap()).unwrap();
    }
}
