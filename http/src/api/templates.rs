//! Templates: which there are, by id and by name, and forgetting snapshots, which clients delete in the
//! same place.
//!
//! Called by [`super`]. Refuses to change or delete a template of the operator's.

use std::time::UNIX_EPOCH;

use hyper::{Response, StatusCode};
use mica_shards::{BuildStore, Reference, TemplateInfo};
use mica_wire::api::{
    READY, SetAlias, Template, TemplateAlias, TemplateBuild, TemplateBuildStatus, TemplateNames,
    TemplateWithBuilds, UpdateTemplate,
};

use super::list::{PAGE_ENTRIES_MAX, page_limit};
use super::{json, operate, status, with_next};
use crate::body::Body;
use crate::builds::listed::Listed;
use crate::error::ApiError;
use crate::ids::uuid_of;
use crate::route::Version;
use crate::tenant::TenantHost;
use crate::{builds, percent, rfc3339, snapshot_name};

/// What clients use unless they are told another.
const DEFAULTS: [&str; 3] = ["base", "code-interpreter-v1", "mcp-gateway"];

type Answer = Result<Response<Body>, ApiError>;

/// `GET /templates`, and the same in pages on v2. In the order of their ids.
///
/// # Errors
/// What to answer instead.
pub async fn list(host: &TenantHost<'_>, version: Version, query: &str) -> Answer {
    let (limit, after) = match version {
        Version::V1 => (usize::MAX, None),
        Version::V2 => page(query, operate::is_store_id)?,
    };
    let mut templates: Vec<_> = host.templates().await?.into_iter().map(shown).collect();
    if version == Version::V2 {
        templates.sort_by(|a, b| a.template_id.cmp(&b.template_id));
        templates
            .retain(|template| after.as_ref().is_none_or(|after| template.template_id > *after));
    }
    let cut = templates.len() > limit;
    templates.truncate(limit);
    let next = templates.last().filter(|_| cut).map(|last| last.template_id.clone());
    Ok(with_next(json::answer(StatusCode::OK, &templates)?, next))
}

/// Entries of a page, and the entry before it.
fn page(query: &str, is_token: impl Fn(&str) -> bool) -> Result<(usize, Option<String>), ApiError> {
    let (mut limit, mut after) = (PAGE_ENTRIES_MAX, None);
    let pairs = percent::query_pairs(query)
        .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
    for (key, value) in pairs {
        match key.as_str() {
            "limit" => limit = page_limit(&value)?,
            "nextToken" if value.is_empty() => {}
            "nextToken" if is_token(&value) => after = Some(value),
            "nextToken" => {
                let message = "`nextToken` must be an `x-next-token` of this host";
                return Err(ApiError::bad_request(message));
            }
            _ => {}
        }
    }
    Ok((limit, after))
}

/// `GET /default-templates`.
///
/// # Errors
/// What to answer instead.
pub async fn defaults(host: &TenantHost<'_>) -> Answer {
    let mut all: Vec<_> = host.templates().await?.into_iter().map(shown).collect();
    all.retain(|template| {
        let is_default = |name: &String| DEFAULTS.contains(&name.as_str());
        template.build_status == TemplateBuildStatus::Ready && template.names.iter().any(is_default)
    });
    json::answer(StatusCode::OK, &all)
}

/// `GET /templates/{id}`, its builds in pages.
///
/// # Errors
/// What to answer instead.
pub async fn get(host: &TenantHost<'_>, id: &str, query: &str) -> Answer {
    let (limit, after) = page(query, BuildStore::is_run_id)?;
    let (template, builds) = find(host, id).await?;
    let template = shown(template);
    let mut builds = builds.unwrap_or_else(|| vec![only_build(&template)]);
    if let Some(after) = after {
        let Some(at) = builds.iter().position(|build| build.build_id == after) else {
            let message =
                "the build of this `nextToken` is not kept any more; ask for the first page again";
            return Err(ApiError::bad_request(message));
        };
        builds.drain(..=at);
    }
    let cut = builds.len() > limit;
    builds.truncate(limit);
    let next = builds.last().filter(|_| cut).map(|last| last.build_id.clone());
    Ok(with_next(json::answer(StatusCode::OK, &TemplateWithBuilds { template, builds })?, next))
}

/// Of one of the operator's.
fn only_build(template: &Template) -> TemplateBuild {
    TemplateBuild {
        build_id: template.build_id.clone(),
        status: template.build_status,
        created_at: template.created_at.clone(),
        updated_at: template.updated_at.clone(),
        finished_at: Some(template.updated_at.clone()),
        cpu_count: template.cpu_count,
        memory_mib: template.memory_mib,
        disk_size_mib: Some(template.disk_size_mib),
        envd_version: Some(template.envd_version.clone()),
    }
}

/// `GET /templates/aliases/{alias}`.
///
/// # Errors
/// 404 where nothing has that name.
pub async fn find_alias(host: &TenantHost<'_>, alias: &str) -> Answer {
    json::answer(StatusCode::OK, &alias_of(shown(find(host, alias).await?.0)))
}

/// `PATCH /templates/{id}`: a template is everybody's, and stays so.
///
/// # Errors
/// 403 for a template that is to be nobody else's.
pub async fn update(host: &TenantHost<'_>, id: &str, body: &[u8]) -> Answer {
    let UpdateTemplate { public } = json::read_or_default(body)?;
    let template = shown(find(host, id).await?.0);
    if public == Some(false) {
        return Err(ApiError::template_stays(name_of(&template)));
    }
    json::answer(StatusCode::OK, &TemplateNames { names: template.names })
}

/// `PUT /templates/{id}/alias`: a template of the operator's keeps the one name it has.
///
/// # Errors
/// 403 for another.
pub async fn set_alias(host: &TenantHost<'_>, id: &str, body: &[u8]) -> Answer {
    let SetAlias { alias } = json::read_or_default(body)?;
    let template = shown(find(host, id).await?.0);
    if alias.as_deref() != Some(name_of(&template)) {
        return Err(ApiError::template_stays(name_of(&template)));
    }
    json::answer(StatusCode::OK, &alias_of(template))
}

fn alias_of(template: Template) -> TemplateAlias {
    TemplateAlias { template_id: template.template_id, public: template.public }
}

/// It has one.
fn name_of(template: &Template) -> &str {
    template.names.first().map_or("", String::as_str)
}

/// A template, and its builds where a client built it.
async fn find(
    host: &TenantHost<'_>,
    id: &str,
) -> Result<(Listed, Option<Vec<TemplateBuild>>), ApiError> {
    let found = host.template(id).await?;
    found.ok_or_else(|| ApiError::no_such_template(&operate::shown(id)))
}

/// Forgets a snapshot, by its id or by a name that a create takes for it. Sandboxes made from it go on, so the
/// answer comes at once. Templates are the operator's, and no client of this version may delete one.
///
/// # Errors
/// 404 for what is neither, 403 for a template.
pub async fn delete(host: &TenantHost<'_>, id: &str) -> Answer {
    if operate::is_store_id(id) && host.delete_snapshot(id).await? {
        return Ok(status(StatusCode::NO_CONTENT));
    }
    if let Some((template, _)) = host.template(id).await? {
        return Err(ApiError::template_is_kept(name_of(&shown(template))));
    }
    delete_named(host, id).await
}

/// Forgets the snapshot that stands beside a template which the tenant built: a name with a tag that no build
/// of that template has means the snapshot, as for a create, and never takes the template with it. `None`:
/// the name means something else.
///
/// # Errors
/// 404 when there is no such snapshot either.
pub async fn delete_beside_build(
    host: &TenantHost<'_>,
    name: &str,
) -> Result<Option<Response<Body>>, ApiError> {
    let reference = Reference::parse(name).filter(|reference| reference.tag.is_some());
    let Some(reference) = reference else { return Ok(None) };
    let (all, tenant) = host.builder();
    let template = builds::find_template(all, tenant, &reference).await?;
    if template.is_none_or(|template| template.tagged(reference.tag()).is_some()) {
        return Ok(None);
    }
    delete_named(host, name).await.map(Some)
}

/// Forgets the snapshot that a name stands for.
async fn delete_named(host: &TenantHost<'_>, name: &str) -> Answer {
    let all = host.snapshots(None).await?;
    match snapshot_name::newest(&all, name, host.tenant()) {
        Some(found) if host.delete_snapshot(&found.id).await? => Ok(status(StatusCode::NO_CONTENT)),
        _ => Err(ApiError::no_such_template(&operate::shown(name))),
    }
}

fn shown(listed: Listed) -> Template {
    match listed {
        Listed::Ready(info) => ready(*info),
        Listed::Unfinished(template) => *template,
    }
}

fn ready(info: TemplateInfo) -> Template {
    let created_at = rfc3339::format(info.created_at);
    Template {
        build_id: build_id(&info),
        template_id: info.id,
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        public: info.public,
        aliases: vec![info.name.to_string()],
        names: vec![info.name.to_string()],
        updated_at: created_at.clone(),
        created_at,
        created_by: None,
        last_spawned_at: info.last_spawned_at.map(rfc3339::format),
        spawn_count: info.spawn_count,
        build_count: info.build_count.into(),
        envd_version: info.envd_version,
        build_status: TemplateBuildStatus::Ready,
        status: READY.to_owned(),
    }
}

/// A UUID, the same for the same template.
fn build_id(info: &TemplateInfo) -> String {
    if let Some(built) = &info.build_id {
        return built.clone();
    }
    let built = info.created_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    uuid_of(info.id.bytes().chain(built.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use mica_units::{Mebibytes, VcpuCount};

    fn template(id: &str) -> TemplateInfo {
        TemplateInfo {
            id: id.to_owned(),
            name: "base".parse().unwrap(),
            vcpus: VcpuCount::new(1).unwrap(),
            memory: Mebibytes::new(512),
            disk: Mebibytes::new(1024),
            envd_version: "0.5.7".to_owned(),
            created_at: UNIX_EPOCH + Duration::from_secs(1),
            spawn_count: 0,
            last_spawned_at: None,
            build_count: 1,
            public: true,
            build_id: None,
        }
    }

    #[test]
    fn ids_of_builds_differ_and_stay() {
        let id = build_id(&template("a"));
        assert_eq!(id, build_id(&template("a")));
        assert_ne!(id, build_id(&template("b")));
        let later = TemplateInfo { created_at: UNIX_EPOCH, ..template("a") };
        assert_ne!(id, build_id(&later));
    }

    #[test]
    fn pages() {
        let of_templates = |query| page(query, operate::is_store_id);
        assert_eq!(of_templates("").unwrap(), (100, None));
        let read = of_templates("limit=2&nextToken=a&teamID=x").unwrap();
        assert_eq!(read, (2, Some("a".to_owned())));
        for bad in ["limit=0", "limit=101", "nextToken=..%2f"] {
            assert!(of_templates(bad).is_err(), "{bad}");
        }
        let id = uuid_of([1, 2, 3]);
        let read = page(&format!("nextToken={id}"), BuildStore::is_run_id).unwrap();
        assert_eq!(read, (100, Some(id)));
        assert!(page("nextToken=a", BuildStore::is_run_id).is_err());
    }
}
