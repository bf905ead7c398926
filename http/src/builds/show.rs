//! Builds and built templates as clients see them.
//!
//! Called by [`super`]. Refuses nothing.

use std::time::{Duration, UNIX_EPOCH};

use mica_shards::{BuildPhase, BuildRecord, BuiltTag, BuiltTemplate};
use serde::Serialize;
use serde_json::{Value, json};

use super::log::{self, Entry, Level};
use crate::rfc3339;

/// Most entries of one answer.
pub const ENTRIES_MAX: usize = 100;
/// Entries that an error shows.
const REASON_ENTRIES: usize = 10;

/// The answer to an announcement.
pub fn announced(record: &BuildRecord) -> Value {
    json!({
        "templateID": record.template_id,
        "buildID": record.id,
        "public": false,
        "names": [format!("{}/{}", record.tenant, record.name)],
        "tags": record.tags,
        "aliases": [record.name],
    })
}

/// What a page of a build's log was asked for.
#[derive(Clone, Copy, Debug)]
pub struct PageQuery {
    /// Entries to leave out.
    pub offset: usize,
    /// Most entries.
    pub limit: usize,
    /// The least they must matter.
    pub level: Level,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reason {
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<String>,
    log_entries: Vec<Entry>,
}

/// How far a build is, and a page of its log.
pub fn status(record: &BuildRecord, log: &[u8], query: PageQuery) -> Value {
    let entries = log::page(log, query.level, query.offset, query.limit);
    let lines: Vec<String> =
        entries.iter().map(|entry| format!("[{}] {}\n", entry.timestamp, entry.message)).collect();
    let mut status = json!({
        "logs": lines,
        "logEntries": entries,
        "templateID": record.template_id,
        "buildID": record.id,
        "status": word(&record.phase),
    });
    if let BuildPhase::Failed { message, step } = &record.phase {
        let log_entries = log::tail(log, step.as_deref(), REASON_ENTRIES);
        let reason = Reason { message: message.clone(), step: step.clone(), log_entries };
        status["reason"] = json!(reason);
    }
    status
}

/// A page of a build's log alone. `backward`: from its end.
pub fn logs(log: &[u8], query: PageQuery, after_ms: Option<u64>, backward: bool) -> Value {
    let bound = after_ms.map(|ms| rfc3339::format(UNIX_EPOCH + Duration::from_millis(ms)));
    // Times are all written alike, so their order is that of their text.
    let wanted = |entry: &Entry| {
        entry.level >= query.level
            && bound.as_ref().is_none_or(|bound| match backward {
                true => entry.timestamp <= *bound,
                false => entry.timestamp >= *bound,
            })
    };
    let entries: Vec<Entry> = match backward {
        true => log::entries(log).rev().filter(wanted).take(query.limit).collect(),
        false => log::entries(log).filter(wanted).take(query.limit).collect(),
    };
    json!({ "logs": entries })
}

/// A build's phase in E2B's words.
fn word(phase: &BuildPhase) -> &'static str {
    match phase {
        BuildPhase::Announced | BuildPhase::Waiting => "waiting",
        BuildPhase::Building => "building",
        BuildPhase::Ready => "ready",
        BuildPhase::Failed { .. } => "error",
    }
}

/// A template's tags, the newest first.
pub fn tags(template: &BuiltTemplate) -> Value {
    let mut tags: Vec<&BuiltTag> = template.tags.iter().collect();
    tags.sort_by_key(|tag| std::cmp::Reverse((tag.assigned_unix_ms, &tag.tag)));
    let tags = tags.into_iter().map(|tag| {
        json!({
            "tag": tag.tag,
            "buildID": tag.build_id,
            "createdAt": rfc3339::format(UNIX_EPOCH + Duration::from_millis(tag.assigned_unix_ms)),
        })
    });
    tags.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_step() {
        let record = BuildRecord {
            id: "b".to_owned(),
            template_id: "t".to_owned(),
            tenant: "default".to_owned(),
            name: "app".to_owned(),
            tags: vec!["default".to_owned()],
            vcpus: None,
            memory_mib: None,
            created_unix_ms: 0,
            updated_unix_ms: 0,
            phase: BuildPhase::Failed { message: "no".to_owned(), step: Some("2".to_owned()) },
        };
        let query = PageQuery { offset: 0, limit: 100, level: Level::Debug };
        let log = b"{\"t\":0,\"l\":\"info\",\"m\":\"a\",\"s\":\"1\"}\n{\"t\":1,\"l\":\"error\",\"m\":\"b\",\"s\":\"2\"}\n";
        let shown = status(&record, log, query);
        assert_eq!(shown["status"], "error");
        assert_eq!(shown["reason"]["step"], "2");
        assert_eq!(shown["reason"]["logEntries"][0]["message"], "b");
        assert_eq!(shown["logEntries"].as_array().unwrap().len(), 2);
        assert_eq!(shown["logEntries"][0]["timestamp"], "1970-01-01T00:00:00.000Z");
        assert_eq!(announced(&record)["aliases"][0], "app");
        assert_eq!(logs(log, query, Some(1), false)["logs"][0]["message"], "b");
        assert_eq!(logs(log, query, None, true)["logs"][0]["message"], "b");
    }
}
