//! Builds and built templates as clients see them.
//!
//! Called by [`super`]. Refuses nothing.

use std::time::{Duration, UNIX_EPOCH};

use mica_shards::{BuildPhase, BuildRecord, BuiltTag, BuiltTemplate};
use mica_wire::api::{
    BuildStatusReason, TemplateBuildInfo, TemplateBuildLogsResponse, TemplateBuildStatus,
    TemplateRequestResponseV3, TemplateTag, TemplateTagAssignment, TemplateTagAssignmentsResponse,
    TemplateTagGroup, TemplateTagGroupsResponse,
};

use super::log::{self, Entry, Level};
use crate::ids::uuid_of;
use crate::rfc3339;

/// Most entries of one answer.
pub const ENTRIES_MAX: usize = 100;
/// Entries that an error shows.
const REASON_ENTRIES: usize = 10;

/// The answer to an announcement.
pub fn announced(record: &BuildRecord) -> TemplateRequestResponseV3 {
    TemplateRequestResponseV3 {
        template_id: record.template_id.clone(),
        build_id: record.id.clone(),
        public: false,
        names: vec![format!("{}/{}", record.tenant, record.name)],
        tags: record.tags.clone(),
        aliases: vec![record.name.clone()],
    }
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

/// How far a build is, and a page of its log.
pub fn status(record: &BuildRecord, log: &[u8], query: PageQuery) -> TemplateBuildInfo {
    let log_entries = log::page(log, query.level, query.offset, query.limit);
    let line = |entry: &Entry| format!("[{}] {}\n", entry.timestamp, entry.message);
    let reason = match &record.phase {
        BuildPhase::Failed { message, step } => Some(BuildStatusReason {
            message: message.clone(),
            step: step.clone(),
            log_entries: log::tail(log, step.as_deref(), REASON_ENTRIES),
        }),
        _ => None,
    };
    TemplateBuildInfo {
        logs: log_entries.iter().map(line).collect(),
        log_entries,
        template_id: record.template_id.clone(),
        build_id: record.id.clone(),
        status: word(&record.phase),
        reason,
    }
}

/// A page of a build's log alone. `backward`: from its end.
pub fn logs(
    log: &[u8],
    query: PageQuery,
    after_ms: Option<u64>,
    backward: bool,
) -> TemplateBuildLogsResponse {
    let bound = after_ms.map(time);
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
    TemplateBuildLogsResponse { logs: entries }
}

/// A build's phase in E2B's words.
pub fn word(phase: &BuildPhase) -> TemplateBuildStatus {
    match phase {
        BuildPhase::Announced | BuildPhase::Waiting => TemplateBuildStatus::Waiting,
        BuildPhase::Building => TemplateBuildStatus::Building,
        BuildPhase::Ready => TemplateBuildStatus::Ready,
        BuildPhase::Failed { .. } => TemplateBuildStatus::Error,
    }
}

/// How tags are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagOrder {
    /// By when they were given.
    Latest,
    /// By their names.
    Name,
}

/// Which tags are shown, and in which order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagQuery {
    /// What their names contain.
    pub search: String,
    /// The order,
    pub order: TagOrder,
    /// and whether it is the other way round.
    pub descending: bool,
}

fn ordered(template: &BuiltTemplate, order: TagOrder, descending: bool) -> Vec<&BuiltTag> {
    let mut tags: Vec<&BuiltTag> = template.tags.iter().collect();
    match order {
        TagOrder::Latest => tags.sort_by_key(|tag| (tag.assigned_unix_ms, &tag.tag)),
        TagOrder::Name => tags.sort_by_key(|tag| &tag.tag),
    }
    if descending {
        tags.reverse();
    }
    tags
}

/// A template's tags, the newest first.
pub fn tags(template: &BuiltTemplate) -> Vec<TemplateTag> {
    let shown = |tag: &BuiltTag| TemplateTag {
        tag: tag.tag.clone(),
        build_id: tag.build_id.clone(),
        created_at: time(tag.assigned_unix_ms),
    };
    ordered(template, TagOrder::Latest, true).into_iter().map(shown).collect()
}

/// A template's tags, each with what it stands for.
pub fn groups(template: &BuiltTemplate, query: &TagQuery) -> TemplateTagGroupsResponse {
    let group = |tag: &BuiltTag| TemplateTagGroup {
        tag: tag.tag.clone(),
        assignments: assignment(template, tag).into_iter().collect(),
        has_more: false,
    };
    let tags = ordered(template, query.order, query.descending).into_iter();
    let tags = tags.filter(|tag| tag.tag.contains(&query.search)).map(group).collect();
    TemplateTagGroupsResponse { tags, next_cursor: None }
}

/// What a tag stands for. A template without it has nothing that it stood for.
pub fn assignments(template: &BuiltTemplate, name: &str) -> TemplateTagAssignmentsResponse {
    let tag = template.tags.iter().find(|tag| tag.tag == name);
    let data = tag.and_then(|tag| assignment(template, tag)).into_iter().collect();
    TemplateTagAssignmentsResponse { data, next_cursor: None }
}

/// Of what a tag stood for before, nothing is kept.
fn assignment(template: &BuiltTemplate, tag: &BuiltTag) -> Option<TemplateTagAssignment> {
    let built = template.tagged(&tag.tag)?;
    let named = [&template.id, &tag.tag, &tag.build_id].into_iter();
    // No id and no tag has a zero in it.
    let named = named.flat_map(|text| text.bytes().chain([0]));
    Some(TemplateTagAssignment {
        assignment_id: uuid_of(named.chain(tag.assigned_unix_ms.to_le_bytes())),
        build_id: tag.build_id.clone(),
        assigned_at: time(tag.assigned_unix_ms),
        build_created_at: time(built.created_unix_ms),
        build_finished_at: Some(time(built.finished_unix_ms)),
    })
}

fn time(unix_ms: u64) -> String {
    rfc3339::format(UNIX_EPOCH + Duration::from_millis(unix_ms))
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
        assert_eq!(shown.log_entries.len(), 2);
        assert_eq!(shown.log_entries[0].timestamp, "1970-01-01T00:00:00.000Z");
        assert_eq!(shown.status, TemplateBuildStatus::Error);
        let reason = shown.reason.unwrap();
        assert_eq!(
            (reason.step.as_deref(), reason.log_entries[0].message.as_str()),
            (Some("2"), "b")
        );
        assert_eq!(announced(&record).aliases, ["app"]);
        assert_eq!(logs(log, query, Some(1), false).logs[0].message, "b");
        assert_eq!(logs(log, query, None, true).logs[0].message, "b");
    }
}
