//! Templates that clients build: `Template.build` of E2B's SDKs and its command line.
//!
//! Called by the API for every route of [`route::BuildRoute`], and for creates and deletes of templates.
//! What lasts is in the store, where every shard finds it; a build itself is a task of the shard that was
//! asked to start it. Refuses images that stand for no template, and to unpack what a client uploads: guests
//! do.
//!
//! ```text
//!  announce ─▶ files ─▶ upload ─▶ start ─▶ run: a sandbox of the base ─▶ steps ─▶ snapshot ─▶ tags
//!                                              guest: the agent in it       log ◀─ status
//! ```

mod background;
mod base;
mod connect;
#[cfg(test)]
mod copy_tests;
mod guest;
pub mod listed;
mod log;
pub mod route;
mod run;
mod show;
mod size;
mod steps;
mod upload;
pub mod wish;

use std::time::{SystemTime, UNIX_EPOCH};

use http::request::Parts;
use hyper::{Response, StatusCode};
use mica_shards::rt::{self, oneshot};
use mica_shards::{
    BuildPhase, BuildRecord, BuildStore, BuiltTemplate, DEFAULT_TAG, Host, Reference, TemplateInfo,
};
use mica_units::TenantId;
use mica_wire::api::{
    AssignedTemplateTags, TemplateAlias, TemplateBuildFileUpload, TemplateNames,
    TemplateTagExistsResponse, TemplateTagsCountResponse,
};

pub use base::{create, find_template};
use log::Level;
use route::BuildRoute;
use show::{ENTRIES_MAX, PageQuery, TagOrder, TagQuery};
pub use upload::take as upload;

use crate::api::{Call, json};
use crate::body::Body;
use crate::config::Limits;
use crate::conn::UnderTls;
use crate::error::ApiError;
use crate::percent;

type Answer = Result<Response<Body>, ApiError>;

/// Answers one request.
///
/// # Errors
/// What to answer instead.
pub async fn answer(call: &mut Call<'_>, request: &Parts, route: BuildRoute) -> Answer {
    let (host, tenant) = call.host.builder();
    let query = request.uri.query().unwrap_or_default();
    match route {
        BuildRoute::Upload(token) => {
            upload::take(host, &call.config.limits, request, &token, call.body).await
        }
        BuildRoute::Announce => {
            announce(host, tenant, &call.read().await?, &call.config.limits).await
        }
        BuildRoute::Files(template, hash) => files(host, tenant, request, &template, &hash).await,
        BuildRoute::Start(template, build) => start(call, tenant, &template, &build).await,
        BuildRoute::Status(template, build) => {
            let page = page(query)?.0;
            let (record, log) = record_and_log(host, tenant, &template, &build).await?;
            json::answer(StatusCode::OK, &show::status(&record, &log, page))
        }
        BuildRoute::Logs(template, build) => {
            let (page, cursor, backward) = page(query)?;
            let (_, log) = record_and_log(host, tenant, &template, &build).await?;
            json::answer(StatusCode::OK, &show::logs(&log, page, cursor, backward))
        }
        BuildRoute::AssignTags => assign_tags(host, tenant, &call.read().await?).await,
        BuildRoute::RemoveTags => remove_tags(host, tenant, &call.read().await?).await,
        BuildRoute::Tags(id) => {
            let template = template(host, tenant, &id).await?;
            json::answer(StatusCode::OK, &show::tags(&template))
        }
        BuildRoute::TagCount(id) => {
            let total = template(host, tenant, &id).await?.tags.len();
            json::answer(StatusCode::OK, &TemplateTagsCountResponse { total })
        }
        BuildRoute::TagExists(id) => {
            let normalized_tag = parameter(query, "tag")?.unwrap_or_default().to_ascii_lowercase();
            let exists = template(host, tenant, &id).await?.tagged(&normalized_tag).is_some();
            json::answer(StatusCode::OK, &TemplateTagExistsResponse { exists, normalized_tag })
        }
        BuildRoute::TagGroups(id) => {
            let wanted = tag_query(query)?;
            let template = template(host, tenant, &id).await?;
            json::answer(StatusCode::OK, &show::groups(&template, &wanted))
        }
        BuildRoute::TagAssignments(id, tag) => {
            let template = template(host, tenant, &id).await?;
            let tag = tag.to_ascii_lowercase();
            json::answer(StatusCode::OK, &show::assignments(&template, &tag))
        }
    }
}

async fn announce(host: &Host, tenant: &TenantId, body: &[u8], limits: &Limits) -> Answer {
    let wanted = wish::announced(body, tenant.as_str())?;
    let theirs = host.templates().await?;
    refuse_name_of(&theirs, &wanted.name)?;
    size::check(&wanted, &theirs, limits.build_memory_mib_max)?;
    let tenant = tenant.clone();
    let record = host.with_builds(move |builds| {
        let template = builds.template_for(&tenant, &wanted.name)?;
        builds.announce(BuildRecord {
            id: String::new(),
            template_id: template.id,
            tenant: template.tenant,
            name: template.name,
            tags: wanted.tags,
            vcpus: wanted.vcpus,
            memory_mib: wanted.memory_mib,
            created_unix_ms: 0,
            updated_unix_ms: 0,
            phase: BuildPhase::Announced,
        })
    });
    json::answer(StatusCode::ACCEPTED, &show::announced(&record.await??))
}

async fn refuse_operators_name(host: &Host, name: &str) -> Result<(), ApiError> {
    refuse_name_of(&host.templates().await?, name)
}

fn refuse_name_of(theirs: &[TemplateInfo], name: &str) -> Result<(), ApiError> {
    if theirs.iter().any(|template| template.name.as_str() == name) {
        return Err(ApiError::conflict(format!(
            "`{name}` is a template of this host's operator; give yours another name"
        )));
    }
    Ok(())
}

/// Refuses a name for a snapshot that stands for a template already: asked for, it would not be the snapshot.
///
/// # Errors
/// 409; when the store cannot be read.
pub async fn refuse_templates_name(
    (host, tenant): (&Host, &TenantId),
    name: &str,
) -> Result<(), ApiError> {
    let Some(reference) = Reference::parse(name) else { return Ok(()) };
    if base::is_plain_tag(reference.tag()) {
        refuse_operators_name(host, &reference.name).await?;
    }
    let own = Reference { namespace: Some(tenant.as_str().to_owned()), ..reference };
    let found = base::find_template(host, tenant, &own).await?;
    if found.is_some_and(|template| template.tagged(own.tag()).is_some()) {
        return Err(ApiError::conflict(format!(
            "`{}:{}` is a template of yours; give the snapshot another name, or another tag",
            own.name,
            own.tag()
        )));
    }
    Ok(())
}

async fn files(host: &Host, tenant: &TenantId, request: &Parts, id: &str, hash: &str) -> Answer {
    template(host, tenant, id).await?;
    if !BuildStore::is_hash(hash) {
        let message = "the hash of a file is made of letters and digits, at most 128";
        return Err(ApiError::bad_request(message));
    }
    let (tenant, hash) = (tenant.clone(), hash.to_owned());
    let token = host.with_builds(move |builds| match builds.has_upload(&tenant, &hash)? {
        true => Ok(None),
        false => builds.grant_upload(&tenant, &hash).map(Some),
    });
    let answer = match token.await?? {
        None => TemplateBuildFileUpload { present: true, url: None },
        Some(token) => TemplateBuildFileUpload { present: false, url: Some(url(request, &token)?) },
    };
    json::answer(StatusCode::CREATED, &answer)
}

/// Where an upload goes: the same place that the client came to, under TLS where it came so. A proxy in
/// front of this host knows better than this host how the client came to it.
fn url(request: &Parts, token: &str) -> Result<String, ApiError> {
    let text = |name: &str| request.headers.get(name).and_then(|value| value.to_str().ok());
    let authority = request.uri.authority().map(http::uri::Authority::as_str);
    let host = authority.or_else(|| text("host")).filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| ApiError::bad_request("the request has no Host"))?;
    let is_tls = request.extensions.get::<UnderTls>().is_some();
    let scheme = match text("x-forwarded-proto") {
        Some("https") => "https",
        Some("http") => "http",
        _ if is_tls => "https",
        _ => "http",
    };
    Ok(format!("{scheme}://{host}/build-files/{token}"))
}

async fn start(call: &mut Call<'_>, tenant: &TenantId, template: &str, build: &str) -> Answer {
    let wanted = wish::started(&call.read().await?)?;
    let host = call.host.builder().0;
    let record = record(host, tenant, template, build).await?;
    // In a task of its own: a client that leaves meanwhile must not leave a build that nobody runs.
    let (host, limits) = (host.clone(), call.config.limits.clone());
    let (sender, started) = oneshot::channel();
    rt::spawn(async move {
        let begin = async {
            let begun = host.with_builds(move |builds| Ok(builds.begin_run(record)?)).await??;
            let begun = begun.map(|record| run::spawn(host.clone(), &limits, record, wanted));
            Ok::<_, ApiError>(begun.is_some())
        };
        if sender.send(begin.await).is_err() {
            tracing::debug!("nobody waits for a build to start any more");
        }
    })
    .detach();
    if !started.await.unwrap_or_else(|| Err(ApiError::internal()))? {
        return Err(ApiError::conflict("this build was started before; announce another"));
    }
    let mut accepted = Response::new(Body::empty());
    *accepted.status_mut() = StatusCode::ACCEPTED;
    Ok(accepted)
}

/// A build of a tenant's, for this template.
async fn record(
    host: &Host,
    tenant: &TenantId,
    template: &str,
    build: &str,
) -> Result<BuildRecord, ApiError> {
    Ok(record_and(host, tenant, template, build, |_, _| Ok(())).await?.0)
}

async fn record_and_log(
    host: &Host,
    tenant: &TenantId,
    template: &str,
    build: &str,
) -> Result<(BuildRecord, Vec<u8>), ApiError> {
    record_and(host, tenant, template, build, |builds, id| Ok(builds.read_log(id)?)).await
}

/// The record first: what it calls over has its whole log.
async fn record_and<T: Send + 'static>(
    host: &Host,
    tenant: &TenantId,
    template: &str,
    build: &str,
    then: impl FnOnce(&BuildStore, &str) -> Result<T, mica_shards::BuildStoreError> + Send + 'static,
) -> Result<(BuildRecord, T), ApiError> {
    let (owner, template, id) = (tenant.clone(), template.to_owned(), build.to_owned());
    let found = host.with_builds(move |builds| {
        let named = |run: &BuildRecord| run.template_id == template || run.name == template;
        let Some(run) = builds.run(&owner, &id)?.filter(named) else { return Ok(None) };
        let more = then(builds, &run.id)?;
        Ok(Some((run, more)))
    });
    let shown: String = build.chars().take(64).collect();
    found.await??.ok_or_else(|| ApiError::not_found(format!("there is no build `{shown}`")))
}

/// A template that a tenant built, or may use.
async fn template(host: &Host, tenant: &TenantId, id: &str) -> Result<BuiltTemplate, ApiError> {
    if_built(host, tenant, id).await?.ok_or_else(|| no_such_template(id))
}

/// The same where it may also be no template that somebody built: then `None`.
async fn if_built(
    host: &Host,
    tenant: &TenantId,
    id: &str,
) -> Result<Option<BuiltTemplate>, ApiError> {
    let Some(reference) = Reference::parse(id) else { return Ok(None) };
    base::find_template(host, tenant, &reference).await
}

fn no_such_template(id: &str) -> ApiError {
    ApiError::no_such_template(&id.chars().take(64).collect::<String>())
}

/// One that is the tenant's own, so that it may be changed. Another's is not there to be changed, also
/// where it is there to be used.
async fn own(host: &Host, tenant: &TenantId, id: &str) -> Result<BuiltTemplate, ApiError> {
    owned(template(host, tenant, id).await?, tenant, id)
}

fn owned(found: BuiltTemplate, tenant: &TenantId, id: &str) -> Result<BuiltTemplate, ApiError> {
    if found.tenant == tenant.as_str() { Ok(found) } else { Err(no_such_template(id)) }
}

/// What a name says of the template, without the tag: in whose namespace it is, too, since another's may
/// have the name of one of the tenant's own.
fn untagged(target: &Reference) -> String {
    match &target.namespace {
        Some(namespace) => format!("{namespace}/{}", target.name),
        None => target.name.clone(),
    }
}

async fn assign_tags(host: &Host, tenant: &TenantId, body: &[u8]) -> Answer {
    let (target, tags) = wish::tags(body)?;
    let template = own(host, tenant, &untagged(&target)).await?;
    let (from, moved) = (target.tag().to_owned(), tags.clone());
    let assigned =
        host.with_builds(move |builds| builds.assign_tags(&template.id, &from, &moved)).await??;
    let Some((build, freed)) = assigned else {
        let message = format!("`{}` has no build tagged `{}`", target.name, target.tag());
        return Err(ApiError::not_found(message));
    };
    forget_snapshots(host, freed).await;
    json::answer(StatusCode::CREATED, &AssignedTemplateTags { tags, build_id: build })
}

async fn remove_tags(host: &Host, tenant: &TenantId, body: &[u8]) -> Answer {
    let (target, tags) = wish::tags(body)?;
    if tags.iter().any(|tag| tag == DEFAULT_TAG) {
        let message = format!("the tag `{DEFAULT_TAG}` stays; delete the template instead");
        return Err(ApiError::bad_request(message));
    }
    let template = own(host, tenant, &untagged(&target)).await?;
    let removed = host.with_builds(move |builds| Ok(builds.remove_tags(&template.id, &tags)?));
    let Some(freed) = removed.await?? else {
        let message = format!("`{}` does not have all of these tags", target.name);
        return Err(ApiError::not_found(message));
    };
    forget_snapshots(host, freed).await;
    Ok(no_content())
}

/// Changes a template that a tenant built. `None`: it built none of that name.
///
/// # Errors
/// When it is another's, or cannot be changed.
pub async fn update(
    (host, tenant): (&Host, &TenantId),
    id: &str,
    body: &[u8],
) -> Result<Option<Response<Body>>, ApiError> {
    let Some(found) = if_built(host, tenant, id).await? else { return Ok(None) };
    let public = wish::public(body)?;
    let mut template = owned(found, tenant, id)?;
    if let Some(public) = public {
        let id = template.id.clone();
        let set = host.with_builds(move |builds| Ok(builds.set_public(&id, public)?)).await??;
        template = set.ok_or_else(|| ApiError::no_such_template(&template.id))?;
    }
    let names = vec![format!("{}/{}", template.tenant, template.name)];
    json::answer(StatusCode::OK, &TemplateNames { names }).map(Some)
}

/// Gives a template that a tenant built another name. `None`: it built none of that name.
///
/// # Errors
/// When it is another's, or the new name is taken or none.
pub async fn rename(
    (host, tenant): (&Host, &TenantId),
    id: &str,
    body: &[u8],
) -> Result<Option<Response<Body>>, ApiError> {
    let Some(found) = if_built(host, tenant, id).await? else { return Ok(None) };
    let name = wish::name(body, tenant.as_str())?;
    let template = owned(found, tenant, id)?;
    refuse_operators_name(host, &name).await?;
    let renamed = host.with_builds(move |builds| builds.rename(&template.id, &name)).await??;
    let template = renamed.ok_or_else(|| no_such_template(id))?;
    let alias = TemplateAlias { template_id: template.id, public: template.public };
    json::answer(StatusCode::OK, &alias).map(Some)
}

/// Deletes a template that a tenant built. `None`: it built none of that name.
///
/// # Errors
/// When it is another's, or cannot be deleted.
pub async fn delete(
    (host, tenant): (&Host, &TenantId),
    id: &str,
) -> Result<Option<Response<Body>>, ApiError> {
    let Some(found) = if_built(host, tenant, id).await? else { return Ok(None) };
    let template = owned(found, tenant, id)?;
    let removed = host.with_builds(move |builds| Ok(builds.remove_built(&template.id)?)).await??;
    // Somebody else deleted it meanwhile: what else has its name is not meant.
    let Some(freed) = removed else { return Err(ApiError::no_such_template(id)) };
    forget_snapshots(host, freed).await;
    Ok(Some(no_content()))
}

/// Deletes snapshots that no template names any more. What cannot be deleted goes with the next start.
async fn forget_snapshots(host: &Host, snapshots: Vec<String>) {
    for snapshot in snapshots {
        if let Err(error) = host.delete_built(&snapshot).await {
            tracing::warn!(snapshot, %error, "a snapshot of nobody's stays until the next start");
        }
    }
}

/// A page of a log, where it starts in time, and whether it goes backward.
fn page(query: &str) -> Result<(PageQuery, Option<u64>, bool), ApiError> {
    let number = |name: &str| -> Result<Option<u64>, ApiError> {
        let Some(text) = parameter(query, name)? else { return Ok(None) };
        let parsed = text.parse().map(Some);
        parsed.map_err(|_| ApiError::bad_request(format!("`{name}` must be a number of 0 or more")))
    };
    let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let level = match parameter(query, "level")? {
        None => Level::Debug,
        Some(text) => log::level(&text).ok_or_else(|| {
            ApiError::bad_request("`level` must be `debug`, `info`, `warn` or `error`")
        })?,
    };
    let limit = number("limit")?.map_or(ENTRIES_MAX, size).min(ENTRIES_MAX);
    let offset = number("logsOffset")?.map_or(0, size);
    let backward = parameter(query, "direction")?.is_some_and(|direction| direction == "backward");
    Ok((PageQuery { offset, limit, level }, number("cursor")?, backward))
}

fn tag_query(query: &str) -> Result<TagQuery, ApiError> {
    let search = parameter(query, "search")?.unwrap_or_default().to_ascii_lowercase();
    let (order, descending) = match parameter(query, "sort")?.as_deref() {
        None | Some("latest_desc") => (TagOrder::Latest, true),
        Some("latest_asc") => (TagOrder::Latest, false),
        Some("name_asc") => (TagOrder::Name, false),
        Some("name_desc") => (TagOrder::Name, true),
        Some(_) => {
            let message = "`sort` must be `latest_asc`, `latest_desc`, `name_asc` or `name_desc`";
            return Err(ApiError::bad_request(message));
        }
    };
    Ok(TagQuery { search, order, descending })
}

fn parameter(query: &str, name: &str) -> Result<Option<String>, ApiError> {
    let pairs = percent::query_pairs(query)
        .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
    Ok(pairs.into_iter().find_map(|(key, value)| (key == name).then_some(value)))
}

fn no_content() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// Milliseconds since 1970.
fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
