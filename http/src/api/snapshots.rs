//! `GET /snapshots`: which of the host's snapshots, and where the page ends.
//!
//! Called by [`super`]. Refuses a filter out of form, as the list of sandboxes does. Newest first,
//! always.

use std::time::UNIX_EPOCH;

use mica_shards::SnapshotInfo;
use mica_units::SandboxId;

use super::list::page_limit;
use super::operate::is_store_id;
use crate::error::ApiError;
use crate::snapshot_name::SnapshotName;
use crate::{ids, percent};

/// What a list was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotQuery {
    of: Of,
    name: Option<String>,
    limit: usize,
    after: Option<Cursor>,
}

/// Whose snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// Everybody's.
    All,
    /// This sandbox's, also when it is gone.
    One(SandboxId),
    /// Those of a sandbox that this host cannot ever have had.
    Nobody,
}

/// The place where a page ends: the last entry that was shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor {
    created_unix_ns: u128,
    id: String,
}

impl Cursor {
    fn of(info: &SnapshotInfo) -> Self {
        let since = info.created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { created_unix_ns: since.as_nanos(), id: info.id.clone() }
    }

    fn to_token(&self) -> String {
        format!("{:x}-{}", self.created_unix_ns, self.id)
    }

    fn from_token(token: &str) -> Option<Self> {
        let (nanos, id) = token.split_once('-')?;
        let created_unix_ns = u128::from_str_radix(nanos, 16).ok()?;
        is_store_id(id).then(|| Self { created_unix_ns, id: id.to_owned() })
    }
}

impl SnapshotQuery {
    /// Reads the query string. Parameters nobody defined are ignored, as E2B does.
    ///
    /// # Errors
    /// 400, naming the parameter.
    pub fn parse(query: &str) -> Result<Self, ApiError> {
        let pairs = percent::query_pairs(query)
            .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
        let limit = page_limit("100")?;
        let mut parsed = Self { of: Of::All, name: None, limit, after: None };
        for (key, value) in pairs {
            match key.as_str() {
                "sandboxID" => parsed.of = of(&value)?,
                "name" => parsed.name = Some(value),
                "limit" => parsed.limit = page_limit(&value)?,
                // An empty one is what some clients send for none.
                "nextToken" if !value.is_empty() => {
                    let cursor = Cursor::from_token(&value).ok_or_else(|| {
                        ApiError::bad_request("`nextToken` must be an `x-next-token` of this host")
                    })?;
                    parsed.after = Some(cursor);
                }
                _ => {}
            }
        }
        Ok(parsed)
    }

    /// Whose snapshots are wanted.
    #[must_use]
    pub fn of(&self) -> Of {
        self.of
    }

    /// Picks, sorts and cuts: the entries, and what asks for the next page, if there is one.
    #[must_use]
    pub fn page(&self, mut all: Vec<SnapshotInfo>) -> (Vec<SnapshotInfo>, Option<String>) {
        all.retain(|info| {
            self.name.as_ref().is_none_or(|name| is_called(info, name))
                && self.after.as_ref().is_none_or(|after| Cursor::of(info) < *after)
        });
        all.sort_by_cached_key(|info| std::cmp::Reverse(Cursor::of(info)));
        let cut = all.len() > self.limit;
        all.truncate(self.limit);
        let next = all.last().filter(|_| cut).map(|last| Cursor::of(last).to_token());
        (all, next)
    }
}

/// Whether it has this name, in whichever form.
fn is_called(info: &SnapshotInfo, name: &str) -> bool {
    let tenant = info.tenant.clone().unwrap_or_default();
    let asked = SnapshotName::parse(name, &tenant);
    info.name.as_deref() == Some(name) || (asked.is_some() && SnapshotName::of(info) == asked)
}

fn of(text: &str) -> Result<Of, ApiError> {
    let id = ids::without_client(text);
    if !ids::is_e2b_id(id) {
        return Err(ApiError::bad_request("`sandboxID` must be the id of a sandbox"));
    }
    Ok(id.parse().map_or(Of::Nobody, Of::One))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn snapshot(n: u64, name: Option<&str>) -> SnapshotInfo {
        SnapshotInfo {
            id: format!("{n:020}"),
            name: name.map(str::to_owned),
            sandbox: None,
            template_id: "tpl".to_owned(),
            tenant: None,
            // Two by two of the same instant, so the id has to break the tie.
            created_at: UNIX_EPOCH + Duration::from_secs(1000 + n / 2),
        }
    }

    fn query(text: &str) -> SnapshotQuery {
        SnapshotQuery::parse(text).unwrap()
    }

    #[test]
    fn pages_show_every_entry_once_newest_first() {
        let all: Vec<_> = (0..25).map(|n| snapshot(n, None)).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (page, next) = query(&format!("limit=4&nextToken={token}")).page(all.clone());
            assert!(page.len() <= 4);
            seen.extend(page.into_iter().map(|info| info.id));
            let Some(next) = next else { break };
            token = next;
        }
        let expected: Vec<_> = (0..25).rev().map(|n| format!("{n:020}")).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn filters() {
        let all = || vec![snapshot(1, Some("a b")), snapshot(2, None)];
        assert_eq!(query("").page(all()).0.len(), 2);
        assert_eq!(query("name=a+b&unknown=1").page(all()).0, [snapshot(1, Some("a b"))]);
        assert!(query("name=").page(all()).0.is_empty());
        let named = || vec![snapshot(1, Some("app")), snapshot(2, Some("default/App:v1"))];
        assert_eq!(query("name=default/app:default").page(named()).0, [named().remove(0)]);
        assert_eq!(query("name=app%3Av1").page(named()).0, [named().remove(1)]);
        assert!(query("name=other/app").page(named()).0.is_empty());
        let id = "i0123456789abcdefghij";
        assert_eq!(query(&format!("sandboxID={id}-x")).of(), Of::One(id.parse().unwrap()));
        assert_eq!(query("sandboxID=nonexisting").of(), Of::Nobody);
        assert_eq!(query("").of(), Of::All);
    }

    #[test]
    fn bad_parameters_are_refused() {
        for bad in [
            "limit=0",
            "limit=101",
            "limit=",
            "sandboxID=",
            "sandboxID=..%2fx",
            "nextToken=zz",
            "nextToken=1-..",
            "limit=%zz",
        ] {
            assert!(SnapshotQuery::parse(bad).is_err(), "{bad}");
        }
    }
}
