//! Templates that clients built, with all of their builds, as lists show them.
//!
//! Called by the API's templates. What is known of a template is read once for each answer, so that it never
//! falls between "not done" and "done". Refuses to show the builds of another tenant that came to nothing.

use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

use mica_shards::{
    BuildRecord, BuildStore, BuildStoreError, Built, BuiltTemplate, Host, Reference, TemplateInfo,
};
use mica_units::TenantId;
use mica_wire::api::{READY, Template, TemplateBuild, TemplateBuildStatus};

use super::base::info_of;
use super::show::word;
use crate::error::ApiError;
use crate::ids::uuid_of;
use crate::rfc3339;

/// A template that a client built.
#[derive(Debug)]
pub enum Listed {
    /// A build of it is done.
    Ready(Box<TemplateInfo>),
    /// None is; as clients see it.
    Unfinished(Box<Template>),
}

/// Every template of a tenant's.
///
/// # Errors
/// When the store cannot be read.
pub async fn all(host: &Host, tenant: &TenantId) -> Result<Vec<Listed>, ApiError> {
    let owner = tenant.clone();
    let found = host.with_builds(move |builds| {
        let templates = builds.built_templates(&owner)?;
        let runs = match templates.iter().all(|template| info_of(template).is_some()) {
            true => Vec::new(),
            false => builds.runs_of(&owner)?,
        };
        Ok(templates.iter().map(|template| listed(template, &runs)).collect())
    });
    Ok(found.await??)
}

/// The template that a tenant means by this id or name, and every build of it that is known, the newest
/// first: of one of its own, also those that are not done.
///
/// # Errors
/// When the store cannot be read.
pub async fn find(
    host: &Host,
    tenant: &TenantId,
    name: &str,
) -> Result<Option<(Listed, Vec<TemplateBuild>)>, ApiError> {
    let Some(reference) = Reference::parse(name) else { return Ok(None) };
    let owner = tenant.clone();
    let found = host.with_builds(move |builds| look(builds, &owner, &reference));
    Ok(found.await??)
}

fn look(
    builds: &BuildStore,
    owner: &TenantId,
    reference: &Reference,
) -> Result<Option<(Listed, Vec<TemplateBuild>)>, BuildStoreError> {
    let Some(template) = builds.find_built(owner, reference)? else { return Ok(None) };
    let is_own = template.tenant == owner.as_str();
    if !is_own && info_of(&template).is_none() {
        return Ok(None);
    }
    let mut runs = if is_own { builds.runs_of(owner)? } else { Vec::new() };
    runs.retain(|run| run.template_id == template.id);
    Ok(Some((listed(&template, &runs), builds_of(&template, &runs))))
}

/// `runs`: at least those of this template, the newest first, where no build of it is done.
fn listed(template: &BuiltTemplate, runs: &[BuildRecord]) -> Listed {
    match info_of(template) {
        Some(info) => Listed::Ready(Box::new(info)),
        None => {
            let run = runs.iter().find(|run| run.template_id == template.id);
            Listed::Unfinished(Box::new(unfinished(template, run)))
        }
    }
}

/// Without a run its builds are so long ago that nothing of them is kept.
fn unfinished(template: &BuiltTemplate, run: Option<&BuildRecord>) -> Template {
    let build_status = run.map_or(TemplateBuildStatus::Error, |run| word(&run.phase));
    Template {
        template_id: template.id.clone(),
        // Not known before its base is looked at.
        cpu_count: run.and_then(|run| run.vcpus).unwrap_or_default(),
        memory_mib: run.and_then(|run| run.memory_mib).unwrap_or_default(),
        disk_size_mib: 0,
        public: template.public,
        aliases: vec![template.name.clone()],
        names: vec![template.name.clone()],
        created_at: time(template.created_unix_ms),
        updated_at: time(run.map_or(template.updated_unix_ms, |run| run.updated_unix_ms)),
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: template.build_count.into(),
        envd_version: String::new(),
        build_id: run.map_or_else(|| uuid_of(template.id.bytes()), |run| run.id.clone()),
        status: word_of_cube(build_status).to_owned(),
        build_status,
    }
}

fn word_of_cube(status: TemplateBuildStatus) -> &'static str {
    match status {
        TemplateBuildStatus::Waiting | TemplateBuildStatus::Building => "BUILDING",
        TemplateBuildStatus::Ready => READY,
        TemplateBuildStatus::Error => "FAILED",
    }
}

fn builds_of(template: &BuiltTemplate, runs: &[BuildRecord]) -> Vec<TemplateBuild> {
    let kept: BTreeSet<&str> = runs.iter().map(|run| run.id.as_str()).collect();
    // What a tag stands for is there longer than what is written of its build.
    let older = template.builds.iter().filter(|built| !kept.contains(built.build_id.as_str()));
    let mut all: Vec<(u64, TemplateBuild)> =
        older.map(|built| (built.created_unix_ms, of_built(built))).collect();
    all.extend(runs.iter().map(|run| {
        let built = template.builds.iter().find(|built| built.build_id == run.id);
        (run.created_unix_ms, built.map_or_else(|| of_run(run), of_built))
    }));
    all.sort_by(|(at, a), (bt, b)| (bt, &b.build_id).cmp(&(at, &a.build_id)));
    all.into_iter().map(|(_, build)| build).collect()
}

fn of_built(built: &Built) -> TemplateBuild {
    TemplateBuild {
        build_id: built.build_id.clone(),
        status: TemplateBuildStatus::Ready,
        created_at: time(built.created_unix_ms),
        updated_at: time(built.finished_unix_ms),
        finished_at: Some(time(built.finished_unix_ms)),
        cpu_count: built.vcpus,
        memory_mib: built.memory_mib,
        disk_size_mib: Some(built.disk_mib),
        envd_version: Some(built.envd_version.clone()),
    }
}

/// One that is not done, or that no tag stands for any more.
fn of_run(run: &BuildRecord) -> TemplateBuild {
    TemplateBuild {
        build_id: run.id.clone(),
        status: word(&run.phase),
        created_at: time(run.created_unix_ms),
        updated_at: time(run.updated_unix_ms),
        finished_at: run.phase.is_over().then(|| time(run.updated_unix_ms)),
        cpu_count: run.vcpus.unwrap_or_default(),
        memory_mib: run.memory_mib.unwrap_or_default(),
        disk_size_mib: None,
        envd_version: None,
    }
}

fn time(unix_ms: u64) -> String {
    rfc3339::format(UNIX_EPOCH + Duration::from_millis(unix_ms))
}

#[cfg(test)]
mod tests {
    use mica_shards::BuildPhase;

    use super::*;

    #[test]
    fn a_build_is_finished_once_it_is_over() {
        let run = |phase| BuildRecord {
            id: "b".to_owned(),
            template_id: "t".to_owned(),
            tenant: "default".to_owned(),
            name: "app".to_owned(),
            tags: vec!["default".to_owned()],
            vcpus: Some(2),
            memory_mib: None,
            created_unix_ms: 0,
            updated_unix_ms: 1000,
            phase,
        };
        for (phase, status, finished) in [
            (BuildPhase::Announced, TemplateBuildStatus::Waiting, None),
            (BuildPhase::Building, TemplateBuildStatus::Building, None),
            (
                BuildPhase::Failed { message: "no".to_owned(), step: None },
                TemplateBuildStatus::Error,
                Some("1970-01-01T00:00:01.000Z"),
            ),
        ] {
            let shown = of_run(&run(phase));
            assert_eq!((shown.status, shown.finished_at.as_deref()), (status, finished));
            assert_eq!((shown.cpu_count, shown.memory_mib), (2, 0));
        }
    }
}
