//! Templates that clients built, with all of their builds, as lists show them.
//!
//! Called by the API's templates. Refuses to show the builds of another tenant that came to nothing.

use std::collections::BTreeSet;
use std::time::{Duration, UNIX_EPOCH};

use mica_shards::{
    BuildRecord, BuildStore, BuildStoreError, Built, BuiltTemplate, Host, Reference,
};
use mica_units::TenantId;
use mica_wire::api::{READY, Template, TemplateBuild, TemplateBuildStatus};

use super::base::info_of;
use super::show::word;
use crate::error::ApiError;
use crate::rfc3339;

/// A template of which no build is done.
#[derive(Debug)]
struct Unfinished {
    template: BuiltTemplate,
    /// The newest build of it that is kept.
    run: BuildRecord,
}

/// Those of a tenant's templates of which no build is done.
///
/// # Errors
/// When the store cannot be read.
pub async fn unfinished(host: &Host, tenant: &TenantId) -> Result<Vec<Template>, ApiError> {
    let owner = tenant.clone();
    let found = host.with_builds(move |builds| {
        let mut open = builds.built_templates(&owner)?;
        open.retain(|template| info_of(template).is_none());
        if open.is_empty() {
            return Ok(Vec::new());
        }
        let runs = builds.runs_of(&owner)?;
        let newest = |template: BuiltTemplate| {
            let run = runs.iter().find(|run| run.template_id == template.id)?.clone();
            Some(Unfinished { template, run })
        };
        Ok(open.into_iter().filter_map(newest).collect())
    });
    Ok(found.await??.into_iter().map(Unfinished::shown).collect())
}

/// The template that a tenant means by this id or name, where no build of it is done.
///
/// # Errors
/// When the store cannot be read.
pub async fn find_unfinished(
    host: &Host,
    tenant: &TenantId,
    name: &str,
) -> Result<Option<Template>, ApiError> {
    let Some(reference) = Reference::parse(name) else { return Ok(None) };
    let owner = tenant.clone();
    let found = host.with_builds(move |builds| {
        let found = builds.find_built(&owner, &reference)?;
        let own = |template: &BuiltTemplate| template.tenant == owner.as_str();
        let Some(template) = found.filter(|found| own(found) && info_of(found).is_none()) else {
            return Ok(None);
        };
        let runs = builds.runs_of(&owner)?;
        let run = runs.into_iter().find(|run| run.template_id == template.id);
        Ok(run.map(|run| Unfinished { template, run }))
    });
    Ok(found.await??.map(Unfinished::shown))
}

impl Unfinished {
    fn shown(self) -> Template {
        let Self { template, run } = self;
        let build_status = word(&run.phase);
        Template {
            template_id: template.id,
            // Not known before its base is looked at.
            cpu_count: run.vcpus.unwrap_or_default(),
            memory_mib: run.memory_mib.unwrap_or_default(),
            disk_size_mib: 0,
            public: template.public,
            aliases: vec![template.name.clone()],
            names: vec![template.name],
            created_at: time(template.created_unix_ms),
            updated_at: time(run.updated_unix_ms),
            created_by: None,
            last_spawned_at: None,
            spawn_count: 0,
            build_count: template.build_count.into(),
            envd_version: String::new(),
            build_id: run.id,
            status: word_of_cube(build_status).to_owned(),
            build_status,
        }
    }
}

fn word_of_cube(status: TemplateBuildStatus) -> &'static str {
    match status {
        TemplateBuildStatus::Waiting | TemplateBuildStatus::Building => "BUILDING",
        TemplateBuildStatus::Ready => READY,
        TemplateBuildStatus::Error => "FAILED",
    }
}

/// Every build of a template that is known, the newest first: of one of the tenant's own, also those that are
/// not done. `None` where nobody built it.
///
/// # Errors
/// When the store cannot be read.
pub async fn builds_of(
    host: &Host,
    tenant: &TenantId,
    template: &str,
) -> Result<Option<Vec<TemplateBuild>>, ApiError> {
    let Some(reference) = Reference::parse(template) else { return Ok(None) };
    let owner = tenant.clone();
    let found = host.with_builds(move |builds| all_of(builds, &owner, &reference));
    Ok(found.await??)
}

fn all_of(
    builds: &BuildStore,
    owner: &TenantId,
    reference: &Reference,
) -> Result<Option<Vec<TemplateBuild>>, BuildStoreError> {
    let Some(template) = builds.find_built(owner, reference)? else { return Ok(None) };
    let mut runs = match template.tenant == owner.as_str() {
        true => builds.runs_of(owner)?,
        false => Vec::new(),
    };
    runs.retain(|run| run.template_id == template.id);
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
    Ok(Some(all.into_iter().map(|(_, build)| build).collect()))
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
