//! Which templates and builds are a tenant's, so that looking for them reads those of nobody else.
//!
//! Called by `templates` and `runs`. An entry is an empty file of the id's name, and only a hint: what it names
//! says itself whose it is, and a start makes all of it again. Refuses a tenant whose name is no part of a path.

use std::collections::BTreeSet;
use std::path::PathBuf;

use mica_units::TenantId;

use super::{BuildStore, DIR, names};
use crate::error::Result;
use crate::store::chain;

/// What is looked up.
#[derive(Clone, Copy, Debug)]
pub(super) enum Index {
    /// A tenant's templates.
    Templates,
    /// A tenant's builds.
    Runs,
}

impl Index {
    const fn dir(self) -> &'static str {
        match self {
            Self::Templates => "tenants",
            Self::Runs => "histories",
        }
    }
}

impl BuildStore {
    /// Puts an id into it. What is out of form was never one of a tenant's.
    pub(super) fn enter(&self, index: Index, tenant: &str, id: &str) -> Result<()> {
        let Ok(tenant) = tenant.parse::<TenantId>() else { return Ok(()) };
        let entry = self.dir(&format!("{}/{tenant}", index.dir()))?.join(id);
        match self.store.disk.create_file(&entry) {
            Err(error) if !error.is_already_there() => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes an id out of it. One that stays names nothing.
    pub(super) fn leave(&self, index: Index, tenant: &str, id: &str) {
        let Ok(tenant) = tenant.parse::<TenantId>() else { return };
        let entry = self.index_of(index).join(tenant.as_str()).join(id);
        if let Err(error) = self.store.disk.remove_file_if_there(&entry) {
            tracing::warn!(error = chain(&error), "what was deleted stays in an index");
        }
    }

    /// The ids of a tenant.
    pub(super) fn entries_of(&self, index: Index, tenant: &TenantId) -> Result<Vec<String>> {
        names(&self.index_of(index).join(tenant.as_str()))
    }

    /// Makes it what is there: `all` by tenant and id, among the ids that are `known`.
    pub(super) fn index_again<'a>(
        &self,
        index: Index,
        all: impl IntoIterator<Item = (&'a str, &'a str)>,
        known: &BTreeSet<String>,
    ) -> Result<()> {
        for (tenant, id) in all {
            self.enter(index, tenant, id)?;
        }
        let tenants = self.index_of(index);
        for tenant in names(&tenants)? {
            let own = tenants.join(tenant);
            for id in names(&own)?.iter().filter(|id| !known.contains(*id)) {
                self.store.disk.remove_file_if_there(&own.join(id))?;
            }
        }
        Ok(())
    }

    fn index_of(&self, index: Index) -> PathBuf {
        self.store.root().join(DIR).join(index.dir())
    }
}
