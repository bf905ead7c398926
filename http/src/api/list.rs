//! `GET /sandboxes` and `GET /v2/sandboxes`: which of the sandboxes, in which order, and
//! where the page ends.
//!
//! Called by [`super`] with every sandbox of the host. Refuses a filter it does not understand: a
//! list that silently ignores one would show sandboxes that were not asked for.
//!
//! The metadata filter is a query string in one parameter. E2B's SDKs encode its keys and values once more
//! than CubeSandbox's clients do, and nothing else tells the two apart: so it is read both ways, and what
//! fits either is shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_shards::{Lifecycle, SandboxInfo};
use mica_units::SandboxId;

use crate::error::ApiError;
use crate::percent;
use crate::rfc3339;
use crate::route::Version;

/// Most entries of one page, and how many there are unless fewer are asked for.
pub const PAGE_ENTRIES_MAX: usize = 100;

/// Keys and values.
type Labels = Vec<(String, String)>;

/// What a list was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListQuery {
    /// The labels that are wanted, in every way the filter can be read. Empty: no filter.
    metadata: Vec<Labels>,
    /// Whether running sandboxes are wanted.
    running: bool,
    /// Whether paused ones are.
    paused: bool,
    template: Option<String>,
    started_after: Option<SystemTime>,
    oldest_first: bool,
    /// `None`: no pages (v1).
    limit: Option<usize>,
    after: Option<Cursor>,
}

/// The place where a page ends: the last entry that was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    started_unix_ns: u128,
    id: SandboxId,
}

/// One page.
#[derive(Clone, Debug)]
pub struct Page {
    /// Its entries, in order.
    pub entries: Vec<SandboxInfo>,
    /// What asks for the next page, if there is one.
    pub next_token: Option<String>,
    /// Running sandboxes on all pages.
    pub total_running: usize,
}

impl Cursor {
    fn of(info: &SandboxInfo) -> Self {
        Self::at(info.started_at, info.id)
    }

    /// The place of this sandbox.
    pub fn at(started_at: SystemTime, id: SandboxId) -> Self {
        let since = started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started_unix_ns: since.as_nanos(), id }
    }

    /// When that sandbox started, and its id.
    pub fn start(self) -> Option<(SystemTime, SandboxId)> {
        let nanos = u64::try_from(self.started_unix_ns).ok()?;
        Some((UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))?, self.id))
    }

    /// As a client keeps it.
    pub fn to_token(self) -> String {
        format!("{:x}-{}", self.started_unix_ns, self.id)
    }

    /// Of what a client kept.
    pub fn from_token(token: &str) -> Option<Self> {
        let (nanos, id) = token.split_once('-')?;
        let started_unix_ns = u128::from_str_radix(nanos, 16).ok()?;
        Some(Self { started_unix_ns, id: id.parse().ok()? })
    }
}

impl ListQuery {
    /// Reads the query string. Parameters nobody defined are ignored, as E2B does.
    ///
    /// # Errors
    /// 400, naming the parameter and its form.
    pub fn parse(version: Version, query: &str) -> Result<Self, ApiError> {
        let paged = version == Version::V2;
        let mut parsed = Self {
            metadata: Vec::new(),
            running: true,
            // v1 is from before there were any.
            paused: paged,
            template: None,
            started_after: None,
            oldest_first: false,
            limit: paged.then_some(PAGE_ENTRIES_MAX),
            after: None,
        };
        let pairs = percent::query_pairs(query)
            .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
        for (key, value) in pairs {
            if key == "metadata" {
                parsed.metadata = metadata(&value)?;
            } else if paged {
                parsed.set(&key, &value)?;
            }
        }
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ApiError> {
        let form = |form: &str| ApiError::bad_request(format!("`{key}` must be {form}"));
        match key {
            "state" => {
                let states: Vec<&str> = value.split(',').collect();
                if !states.iter().all(|state| matches!(*state, "running" | "paused")) {
                    return Err(form("`running`, `paused` or both, separated by a comma"));
                }
                self.running = states.contains(&"running");
                self.paused = states.contains(&"paused");
            }
            "order" => match value {
                "asc" => self.oldest_first = true,
                "desc" => self.oldest_first = false,
                _ => return Err(form("`asc` or `desc`")),
            },
            "limit" => self.limit = Some(page_limit(value)?),
            // An empty one is what some clients send for none.
            "nextToken" if value.is_empty() => {}
            "nextToken" => {
                let cursor = Cursor::from_token(value);
                self.after = Some(cursor.ok_or_else(|| form("an `x-next-token` of this host"))?);
            }
            "startedAfter" => {
                let instant = rfc3339::parse(value);
                self.started_after = Some(instant.ok_or_else(|| form("an RFC 3339 time"))?);
            }
            "template" => self.template = Some(value.to_owned()),
            _ => {}
        }
        Ok(())
    }

    /// Picks, sorts and cuts.
    #[must_use]
    pub fn page(&self, all: Vec<SandboxInfo>) -> Page {
        let mut entries: Vec<_> = all.into_iter().filter(|info| self.wants(info)).collect();
        let running = |info: &&SandboxInfo| info.state == Lifecycle::Running;
        let total_running = entries.iter().filter(running).count();
        entries.sort_by_key(Cursor::of);
        if !self.oldest_first {
            entries.reverse();
        }
        if let Some(after) = self.after {
            let follows = |info: &SandboxInfo| match self.oldest_first {
                true => Cursor::of(info) > after,
                false => Cursor::of(info) < after,
            };
            entries.retain(follows);
        }
        let cut = self.limit.is_some_and(|limit| entries.len() > limit);
        if let Some(limit) = self.limit {
            entries.truncate(limit);
        }
        let next_token = entries.last().filter(|_| cut).map(|last| Cursor::of(last).to_token());
        Page { entries, next_token, total_running }
    }

    fn wants(&self, info: &SandboxInfo) -> bool {
        let labelled = |(key, value): &(String, String)| info.metadata.get(key) == Some(value);
        let has = |labels: &Labels| labels.iter().all(labelled);
        let of_template =
            |wanted: &String| info.template_id == *wanted || info.template_name.as_str() == wanted;
        let state = match info.state {
            Lifecycle::Running => self.running,
            Lifecycle::Paused => self.paused,
        };
        state
            && (self.metadata.is_empty() || self.metadata.iter().any(has))
            && self.template.as_ref().is_none_or(of_template)
            && self.started_after.is_none_or(|instant| info.started_at > instant)
    }
}

/// Reads the `limit` of a list.
///
/// # Errors
/// 400 unless it is 1 to [`PAGE_ENTRIES_MAX`].
pub fn page_limit(text: &str) -> Result<usize, ApiError> {
    let limit = text.parse().ok().filter(|limit| (1..=PAGE_ENTRIES_MAX).contains(limit));
    limit.ok_or_else(|| ApiError::bad_request(format!("`limit` must be 1 to {PAGE_ENTRIES_MAX}")))
}

/// Both readings: as CubeSandbox's clients encode it, and as E2B's do, where it can be read so.
fn metadata(value: &str) -> Result<Vec<Labels>, ApiError> {
    let once = percent::query_pairs(value).map_err(|error| {
        ApiError::bad_request(format!("`metadata` must be `key=value&key=value`: {error}"))
    })?;
    let again = |(key, value): &(String, String)| {
        Some((percent::decode_query(key).ok()?, percent::decode_query(value).ok()?))
    };
    let twice: Option<Labels> = once.iter().map(again).collect();
    let twice = twice.filter(|twice| *twice != once);
    Ok(std::iter::once(once).chain(twice).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_shards::{NetworkPolicy, OnTimeout};
    use mica_units::{Mebibytes, TenantId, VcpuCount};

    fn sandbox(n: u8, labels: &[(&str, &str)]) -> SandboxInfo {
        let started_at = UNIX_EPOCH + Duration::from_secs(1000 + u64::from(n) / 2);
        SandboxInfo {
            id: SandboxId::from_random([n; 20]),
            template_id: "tpl".to_owned(),
            template_name: "base".parse().unwrap(),
            started_at,
            state: Lifecycle::Running,
            end_at: Some(started_at + Duration::from_secs(60)),
            vcpus: VcpuCount::new(1).unwrap(),
            memory: Mebibytes::new(512),
            disk: Mebibytes::new(1024),
            envd_version: "0.5.7".to_owned(),
            metadata: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            access_token: None,
            traffic_token: None,
            on_timeout: OnTimeout::Kill,
            disk_alone: false,
            auto_resume: false,
            tenant: TenantId::default(),
            network: NetworkPolicy::default(),
        }
    }

    fn query(text: &str) -> ListQuery {
        ListQuery::parse(Version::V2, text).unwrap()
    }

    #[test]
    fn the_captured_metadata_filter_of_the_sdk() {
        let parsed = query("metadata=a%252520b%3Dc%252526d&state=running%2Cpaused&limit=5");
        assert!(parsed.metadata.contains(&vec![("a b".to_owned(), "c&d".to_owned())]));
        assert_eq!(parsed.limit, Some(5));
        assert!(parsed.running && parsed.paused);
        let all = vec![sandbox(1, &[("a b", "c&d")]), sandbox(2, &[("a b", "c")])];
        let page = parsed.page(all);
        assert_eq!(page.entries.len(), 1);
        assert_eq!(page.entries[0].id, SandboxId::from_random([1; 20]));
    }

    #[test]
    fn a_filter_of_either_family_finds_every_label() {
        for value in ["a+b", "50%", "a b", "c&d=e", "%25", "a%20b", "\u{e9}"] {
            let encoded = |text: &str| -> String {
                text.bytes().map(|byte| format!("%{byte:02X}")).collect()
            };
            let all = || vec![sandbox(1, &[("k", value)]), sandbox(2, &[("k", "other")])];
            let of_cube = encoded(&format!("k={}", encoded(value)));
            let of_e2b = encoded(&format!("k={}", encoded(&encoded(value))));
            for filter in [of_cube, of_e2b] {
                let page = query(&format!("metadata={filter}")).page(all());
                assert_eq!(page.entries, [sandbox(1, &[("k", value)])], "{value}: {filter}");
            }
        }
        let both = query("metadata=k%3Dv%26k2%3Dv2");
        assert!(both.page(vec![sandbox(1, &[("k", "v")])]).entries.is_empty(), "all of them");
    }

    #[test]
    fn pages_show_every_entry_once_in_either_order() {
        // Two by two they started at the same instant, so the id has to break the tie.
        let all: Vec<_> = (0..25).map(|n| sandbox(n, &[])).collect();
        for order in ["asc", "desc"] {
            let mut seen = Vec::new();
            let mut token = String::new();
            loop {
                let page = query(&format!("limit=4&order={order}{token}")).page(all.clone());
                assert_eq!(page.total_running, 25);
                seen.extend(page.entries.iter().map(|info| (info.started_at, info.id)));
                match page.next_token {
                    Some(next) => token = format!("&nextToken={next}"),
                    None => break,
                }
            }
            assert_eq!(seen.len(), 25, "{order}");
            assert!(seen.is_sorted_by(|a, b| if order == "asc" { a < b } else { a > b }));
        }
    }

    #[test]
    fn filters() {
        let all = || vec![sandbox(1, &[]), sandbox(100, &[])];
        assert_eq!(query("template=base").page(all()).entries.len(), 2);
        assert_eq!(query("template=other").page(all()).entries.len(), 0);
        assert_eq!(query("startedAfter=1970-01-01T00:17:00Z").page(all()).entries.len(), 1);
        assert_eq!(query("").page(all()).next_token, None);
        assert_eq!(query("nextToken="), query(""));
    }

    #[test]
    fn states() {
        let paused = SandboxInfo { state: Lifecycle::Paused, ..sandbox(2, &[]) };
        let all = || vec![sandbox(1, &[]), paused.clone()];
        for (text, entries, running) in [
            ("", 2, 1),
            ("state=running,paused", 2, 1),
            ("state=paused%2Crunning", 2, 1),
            ("state=running", 1, 1),
            ("state=paused", 1, 0),
        ] {
            let page = query(text).page(all());
            assert_eq!((page.entries.len(), page.total_running), (entries, running), "{text}");
        }
        assert_eq!(query("state=paused").page(all()).entries[0].state, Lifecycle::Paused);
        let v1 = ListQuery::parse(Version::V1, "").unwrap().page(all());
        assert_eq!(v1.entries, [sandbox(1, &[])], "v1 does not know the paused");
    }

    #[test]
    fn bad_parameters_are_named() {
        for bad in [
            "limit=0",
            "limit=101",
            "limit=x",
            "state=stopped",
            "state=",
            "order=up",
            "nextToken=zz",
            "startedAfter=yesterday",
            "metadata=%25zz",
            "metadata=k%3D%25zz",
            "limit=%zz",
        ] {
            assert!(ListQuery::parse(Version::V2, bad).is_err(), "{bad}");
        }
        // v1 knows the metadata filter alone, and has no pages.
        let v1 = ListQuery::parse(Version::V1, "limit=0&metadata=a%3Db").unwrap();
        assert_eq!(v1.limit, None);
        assert_eq!(v1.metadata.len(), 1);
    }
}
