//! Builds: how far each is, and what it said.
//!
//! Called by the API through [`BuildStore`]. Refuses more builds of a tenant than [`RUNS_MAX`] that are not
//! over; of those that are, the oldest go.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use mica_units::TenantId;
use rustix::fs::OFlags;

use super::index::Index;
use super::{
    BuildPhase, BuildRecord, BuildStore, BuildStoreError, encoded, names, now_unix_ms, random_hex,
    read,
};
use crate::error::{Result, StorageError};
use crate::store::chain;
use crate::template::open_read;

/// Longest log of a build.
pub const BUILD_LOG_BYTES_MAX: u64 = 4 << 20;

/// Builds of one tenant that are kept, and that may be on their way.
const RUNS_MAX: usize = 200;
/// A build that was announced and not asked for counts as given up after so long.
const ANNOUNCED_MS_MAX: u64 = 24 * 3600 * 1000;

const STATE_FILE: &str = "state";
const LOG_FILE: &str = "log";

/// What ended a build that the last daemon left.
const INTERRUPTED: &str =
    "the host was restarted while this build ran, and nothing of it is left; build again";
/// What ends those that still run when a daemon stops in order.
const STOPPED: &str =
    "the host was stopped while this build ran, and nothing of it is left; build again";

impl BuildStore {
    /// Announces a build: gives it an id and a time.
    ///
    /// # Errors
    /// [`BuildStoreError::TooMany`] when this many of the tenant's are not over.
    pub fn announce(
        &self,
        record: BuildRecord,
    ) -> std::result::Result<BuildRecord, BuildStoreError> {
        self.make_room(&record.tenant)?;
        let now = now_unix_ms();
        let id = draw_uuid()?;
        let record = BuildRecord { id, created_unix_ms: now, updated_unix_ms: now, ..record };
        self.dir(&format!("runs/{}", record.id))?;
        self.enter(Index::Runs, &record.tenant, &record.id)?;
        self.store_run(&record)?;
        Ok(record)
    }

    /// A build of this tenant's.
    ///
    /// # Errors
    /// When it is there and damaged.
    pub fn run(&self, tenant: &TenantId, id: &str) -> Result<Option<BuildRecord>> {
        if !is_uuid(id) {
            return Ok(None);
        }
        let found = read(&self.runs_dir().join(id).join(STATE_FILE), BuildRecord::decode)?;
        Ok(found.filter(|run| run.tenant == tenant.as_str() && run.id == id))
    }

    /// Starts an announced build, once: `None` when it was started before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin_run(&self, record: BuildRecord) -> Result<Option<BuildRecord>> {
        // Of two that begin the same build, one finds the log there.
        let log = self.runs_dir().join(&record.id).join(LOG_FILE);
        match self.store.disk.create_file(&log) {
            Ok(_) => self.set_phase(record, BuildPhase::Waiting).map(Some).inspect_err(|_| {
                // It did not begin, and may be begun again.
                if let Err(error) = self.store.disk.remove_file_if_there(&log) {
                    tracing::error!(
                        error = chain(&error),
                        "the log of a build that did not begin stays"
                    );
                }
            }),
            Err(error) if error.is_already_there() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down how far a build is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_phase(&self, record: BuildRecord, phase: BuildPhase) -> Result<BuildRecord> {
        let record = BuildRecord { phase, updated_unix_ms: now_unix_ms(), ..record };
        self.store_run(&record)?;
        Ok(record)
    }

    /// Adds to the log of a build, of which `at` bytes are written: only its own task does.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_log(&self, id: &str, at: u64, bytes: &[u8]) -> Result<()> {
        let path = self.runs_dir().join(id).join(LOG_FILE);
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(&path).map_err(|e| StorageError::io("open", &path, e))?;
        self.store.disk.write_at(&path, &file, bytes, at)
    }

    /// The log of a build; empty before it began.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_log(&self, id: &str) -> Result<Vec<u8>> {
        let path = self.runs_dir().join(id).join(LOG_FILE);
        let failed = |error| StorageError::io("read", &path, error);
        let mut bytes = Vec::new();
        match open_read(&path) {
            Ok(file) => file.take(BUILD_LOG_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(failed(error)),
        };
        Ok(bytes)
    }

    /// The builds of a tenant that are kept, the newest first.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn runs_of(&self, tenant: &TenantId) -> Result<Vec<BuildRecord>> {
        let mut runs = self.read_runs(self.entries_of(Index::Runs, tenant)?);
        runs.retain(|run| run.tenant == tenant.as_str());
        runs.sort_by(|a, b| (b.created_unix_ms, &b.id).cmp(&(a.created_unix_ms, &a.id)));
        Ok(runs)
    }

    fn runs_dir(&self) -> PathBuf {
        self.store.root().join("builds/runs")
    }

    fn store_run(&self, record: &BuildRecord) -> Result<()> {
        self.put(&self.runs_dir().join(&record.id), STATE_FILE, &encoded(record.encode())?)
    }

    /// Every build. What cannot be read is left out, and logged.
    fn all_runs(&self) -> Result<Vec<BuildRecord>> {
        Ok(self.read_runs(names(&self.runs_dir())?))
    }

    fn read_runs(&self, ids: Vec<String>) -> Vec<BuildRecord> {
        let mut runs = Vec::new();
        for id in ids {
            match read(&self.runs_dir().join(&id).join(STATE_FILE), BuildRecord::decode) {
                Ok(Some(run)) if run.id == id => runs.push(run),
                Ok(_) => {}
                Err(error) => tracing::error!(id, error = chain(&error), "a build left out"),
            }
        }
        runs
    }

    /// Makes the index of tenants' builds what the builds say, also where an earlier version kept none.
    fn index_runs_again(&self, all: &[BuildRecord]) -> Result<()> {
        let known = names(&self.runs_dir())?.into_iter().collect();
        let entries = all.iter().map(|run| (run.tenant.as_str(), run.id.as_str()));
        self.index_again(Index::Runs, entries, &known)
    }

    /// Lets the oldest builds of a tenant go that are over or were given up.
    fn make_room(&self, tenant: &str) -> std::result::Result<(), BuildStoreError> {
        let Ok(tenant) = tenant.parse::<TenantId>() else { return Ok(()) };
        let runs = self.runs_of(&tenant)?;
        let given_up = now_unix_ms().saturating_sub(ANNOUNCED_MS_MAX);
        let is_done = |run: &BuildRecord| {
            run.phase.is_over()
                || run.phase == BuildPhase::Announced && run.updated_unix_ms < given_up
        };
        let mut done: Vec<_> = runs.iter().filter(|run| is_done(run)).collect();
        done.sort_by_key(|run| run.updated_unix_ms);
        let excess = (runs.len() + 1).saturating_sub(RUNS_MAX);
        if excess > done.len() {
            let text = format!("{RUNS_MAX} builds are not over yet; wait until some of them are");
            return Err(BuildStoreError::TooMany(text));
        }
        for run in &done[..excess] {
            self.store.disk.remove_tree(&self.runs_dir().join(&run.id))?;
            self.leave(Index::Runs, &run.tenant, &run.id);
        }
        Ok(())
    }

    /// Ends the builds that ran when the daemon before this one ended.
    pub(super) fn end_interrupted(&self) -> Result<()> {
        self.end_running(INTERRUPTED)?;
        self.index_runs_again(&self.all_runs()?)
    }

    /// Ends the builds that run, for a daemon whose shards have ended: nobody works on them any more, and who
    /// looks into the store is not to read that they go on.
    ///
    /// # Errors
    /// When the directory cannot be read or written. The next start ends them then.
    pub fn end_at_stop(&self) -> Result<()> {
        self.end_running(STOPPED)
    }

    fn end_running(&self, why: &str) -> Result<()> {
        for run in self.all_runs()? {
            if matches!(run.phase, BuildPhase::Waiting | BuildPhase::Building) {
                tracing::info!(build = run.id, why, "a build is over");
                let failed = BuildPhase::Failed { message: why.to_owned(), step: None };
                self.set_phase(run, failed)?;
            }
        }
        Ok(())
    }
}

/// A random UUID (version 4), as text.
fn draw_uuid() -> Result<String> {
    let hex = random_hex::<16>()?;
    // The variant has two bits of its own; the other two stay random.
    let variant = match hex.as_bytes()[16] {
        b'0'..=b'3' => '8',
        b'4'..=b'7' => '9',
        b'8' | b'9' | b'a' | b'b' => 'a',
        _ => 'b',
    };
    let (a, b, c) = (&hex[..8], &hex[8..12], &hex[13..16]);
    Ok(format!("{a}-{b}-4{c}-{variant}{}-{}", &hex[17..20], &hex[20..]))
}

/// Whether it has the form of a UUID as we write it, so that it is safe as a part of a path.
pub(super) fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_random_and_in_form() {
        let (a, b) = (draw_uuid().unwrap(), draw_uuid().unwrap());
        assert_ne!(a, b);
        assert!(is_uuid(&a) && a.as_bytes()[14] == b'4', "{a}");
        assert!(matches!(a.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{a}");
        for bad in ["", "..", &a[1..], &a.to_uppercase().replace('-', "/")] {
            assert!(!is_uuid(bad), "{bad}");
        }
    }
}
