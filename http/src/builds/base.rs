//! What a client means by a template: one that it built, one of the operator's, or an image that stands for
//! one of those.
//!
//! Called by creates and by builds. Refuses images that stand for no template: nothing is pulled.

use std::time::{Duration, UNIX_EPOCH};

use mica_shards::{
    Built, BuiltDefaults, BuiltTemplate, CreateRequest, DEFAULT_TAG, Host, OneCreate, Reference,
    SandboxInfo, Seat, TemplateInfo, defaults_for_agent,
};
use mica_units::{Mebibytes, TenantId, VcpuCount};
use mica_wire::guest::Defaults;

use super::size::{self, Asked};
use super::steps::StepError;
use super::wish::From;
use crate::error::ApiError;
use crate::snapshot_name;

/// Images, without their tags, and the templates they stand for.
const IMAGES: [(&str, &str); 2] =
    [("e2bdev/base", "base"), ("e2bdev/code-interpreter", "code-interpreter-v1")];

/// Times a create starts again because the template was built anew meanwhile.
const CREATE_TRIES: usize = 3;
/// Tags that also stand for a template of the operator's, which has no others.
const PLAIN_TAGS: [&str; 2] = [DEFAULT_TAG, "latest"];

/// What a build starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// For a create.
    pub template: String,
    /// What its own build set, if it had one.
    pub defaults: Option<BuiltDefaults>,
    /// The size that it is to boot in, where that is not the one in which it runs.
    pub boots_in: Option<(VcpuCount, Mebibytes)>,
}

/// Makes a sandbox of what a client calls a template. `seat` counts it, anew for every try. However many
/// things the name might stand for, it is one create.
///
/// # Errors
/// As the host's create; 404 for a template without a build of that tag.
pub async fn create(
    host: &Host,
    tenant: &TenantId,
    wanted: CreateRequest,
    seat: &dyn Fn() -> Result<Option<Seat>, ApiError>,
) -> Result<SandboxInfo, ApiError> {
    let mut create = host.one_create();
    let made = of_any(&mut create, (host, tenant), &wanted, seat).await;
    let made =
        made.and_then(|made| made.ok_or_else(|| ApiError::no_such_template(&wanted.template)));
    // A quota that is used up is no create that failed.
    if made.as_ref().is_err_and(ApiError::is_not_found) {
        create.failed();
    }
    made
}

/// The same of whatever has that name. `None`: nothing has.
async fn of_any(
    create: &mut OneCreate<'_>,
    (host, tenant): (&Host, &TenantId),
    wanted: &CreateRequest,
    seat: &dyn Fn() -> Result<Option<Seat>, ApiError>,
) -> Result<Option<SandboxInfo>, ApiError> {
    if let Some(name) = plain(&wanted.template) {
        let request = CreateRequest { template: name, seat: seat()?, ..wanted.clone() };
        // Every other template is one that somebody built.
        if let Some(made) = create.of(request).await? {
            return Ok(Some(made));
        }
    }
    for _ in 0..CREATE_TRIES {
        let Some((template, defaults)) = named(host, tenant, &wanted.template).await? else {
            break;
        };
        let request = CreateRequest { template, defaults, seat: seat()?, ..wanted.clone() };
        // If not: built anew, or deleted, since it was looked up.
        if let Some(made) = create.of(request).await? {
            return Ok(Some(made));
        }
    }
    Ok(None)
}

/// The snapshot that a name of a tenant's stands for: what was built, or else what was kept of a sandbox.
///
/// # Errors
/// 404 when there is a template of that name, without a build of that tag, and no such snapshot.
async fn named(
    host: &Host,
    tenant: &TenantId,
    name: &str,
) -> Result<Option<(String, Option<Defaults>)>, ApiError> {
    let template = match Reference::parse(name) {
        Some(reference) => find_template(host, tenant, &reference).await?.zip(Some(reference)),
        None => None,
    };
    if let Some((template, reference)) = &template
        && let Some(built) = template.tagged(reference.tag())
    {
        return Ok(Some((built.snapshot_id.clone(), Some(defaults_for_agent(&built.defaults)))));
    }
    let all = host.snapshots(None).await?;
    match (snapshot_name::newest(&all, name, tenant), template) {
        (Some(found), _) => Ok(Some((found.id.clone(), None))),
        (None, Some((template, reference))) => Err(untagged(&template, &reference)),
        (None, None) => Ok(None),
    }
}

/// The build that a name stands for. `None`: nobody built a template of that name.
///
/// # Errors
/// 404 when its template is there, without a build of that tag that is done.
pub async fn find(host: &Host, tenant: &TenantId, name: &str) -> Result<Option<Built>, ApiError> {
    let Some(reference) = Reference::parse(name) else { return Ok(None) };
    let Some(template) = find_template(host, tenant, &reference).await? else { return Ok(None) };
    match template.tagged(reference.tag()) {
        Some(built) => Ok(Some(built.clone())),
        None => Err(untagged(&template, &reference)),
    }
}

fn untagged(template: &BuiltTemplate, reference: &Reference) -> ApiError {
    let (name, tag) = (&template.name, reference.tag());
    ApiError::not_found(format!("template `{name}` has no build tagged `{tag}` that is ready"))
}

/// The built template that a tenant means.
///
/// # Errors
/// When the store cannot be read.
pub async fn find_template(
    host: &Host,
    tenant: &TenantId,
    reference: &Reference,
) -> Result<Option<BuiltTemplate>, ApiError> {
    let (tenant, reference) = (tenant.clone(), reference.clone());
    Ok(host.with_builds(move |builds| Ok(builds.find_built(&tenant, &reference)?)).await??)
}

/// As it is listed beside the operator's. `None` until a build of it is done.
pub fn info_of(template: &BuiltTemplate) -> Option<TemplateInfo> {
    let built = template.tagged(DEFAULT_TAG).or(template.builds.last())?;
    Some(TemplateInfo {
        id: template.id.clone(),
        name: template.name.parse().ok()?,
        vcpus: VcpuCount::new(built.vcpus).ok()?,
        memory: Mebibytes::new(built.memory_mib),
        disk: Mebibytes::new(built.disk_mib),
        envd_version: built.envd_version.clone(),
        created_at: UNIX_EPOCH + Duration::from_millis(template.created_unix_ms),
        spawn_count: 0,
        last_spawned_at: None,
        build_count: template.build_count,
        public: template.public,
        build_id: Some(built.build_id.clone()),
    })
}

/// What a build is to start from, in the size that was asked for.
///
/// # Errors
/// [`StepError`], which says what there is.
pub async fn of_build(
    host: &Host,
    tenant: &TenantId,
    from: &From,
    asked: Asked,
    limit_mib: u32,
) -> Result<Base, StepError> {
    let templates = host.templates().await?;
    let most_mib = size::most_memory(&templates, limit_mib);
    let wanted = match from {
        From::Template(name) => name.clone(),
        From::Image(image) => of_image(image, &templates)?,
    };
    if let Some(name) = plain(&wanted)
        && let Some(found) = templates.iter().find(|t| t.name.as_str() == name || t.id == name)
    {
        return of_operator(found, asked, &templates, most_mib);
    }
    let found =
        find(host, tenant, &wanted).await.map_err(|error| StepError(error.to_body().message))?;
    let Some(built) = found else {
        return Err(StepError(format!(
            "there is no template `{}`; build on one of {}",
            wanted.chars().take(100).collect::<String>(),
            names(&templates)
        )));
    };
    let boots_in = size::to_boot_in(asked, (built.vcpus, built.memory_mib), most_mib)?;
    Ok(Base { template: built.snapshot_id, defaults: Some(built.defaults), boots_in })
}

/// A template of the operator's in this size: itself, or the variant whose name says it, or itself booted so.
fn of_operator(
    found: &TemplateInfo,
    asked: Asked,
    templates: &[TemplateInfo],
    most_mib: u32,
) -> Result<Base, StepError> {
    let size_of = |t: &TemplateInfo| (u32::from(t.vcpus.get()), t.memory.count());
    let base = |t: &TemplateInfo, boots_in| {
        let template = t.name.to_string();
        Base { template, defaults: None, boots_in }
    };
    let wanted = size::completed(asked, size_of(found));
    let variant = format!("{}-{}x{}", found.name, wanted.0, wanted.1);
    let variant = templates.iter().find(|t| t.name.as_str() == variant && size_of(t) == wanted);
    match variant.filter(|_| !size::fits(asked, size_of(found))) {
        Some(variant) => Ok(base(variant, None)),
        None => Ok(base(found, size::to_boot_in(asked, size_of(found), most_mib)?)),
    }
}

/// The template that an image stands for: one of ours, or the operator's that has its name.
fn of_image(image: &str, templates: &[TemplateInfo]) -> Result<String, StepError> {
    let (path, tag) = parts(image);
    if let Some((_, template)) = IMAGES.iter().find(|(known, _)| *known == path) {
        return Ok((*template).to_owned());
    }
    let wanted = named_after(path, tag);
    if templates.iter().any(|template| template.name.as_str() == wanted) {
        return Ok(wanted);
    }
    let images: Vec<&str> = IMAGES.iter().map(|(image, _)| *image).collect();
    Err(StepError(format!(
        "image `{}` is not pulled: this host builds on templates. Have the operator make one of it (`mica \
         template build --name {wanted} --image FILE`), or use `fromTemplate` with one of {}, or one of the \
         images {}, and install what is missing in a RUN step",
        image.chars().take(100).collect::<String>(),
        names(templates),
        images.join(", ")
    )))
}

/// An image's name without what every image of Docker's own has before it, and its tag.
fn parts(image: &str) -> (&str, &str) {
    let path = ["docker.io/", "index.docker.io/"].iter().find_map(|own| image.strip_prefix(own));
    let path = path.unwrap_or(image);
    let path = path.strip_prefix("library/").unwrap_or(path);
    let path = path.split('@').next().unwrap_or(path);
    // A colon before the last slash belongs to the registry's port.
    match path.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, tag),
        _ => (path, ""),
    }
}

/// The name of the template that an operator makes of an image: the image's, with a dash for each character that
/// a template's name cannot have. `latest` goes without saying.
fn named_after(path: &str, tag: &str) -> String {
    let whole =
        if matches!(tag, "" | "latest") { path.to_owned() } else { format!("{path}-{tag}") };
    let allowed = |c: char| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9' | '_') => c,
        _ => '-',
    };
    whole.chars().map(allowed).take(63).collect()
}

fn names(templates: &[TemplateInfo]) -> String {
    let names: Vec<String> = templates.iter().map(|t| format!("`{}`", t.name)).collect();
    if names.is_empty() {
        "none, for this host has no template yet".to_owned()
    } else {
        names.join(", ")
    }
}

/// Whether a template of the operator's may be asked for with this tag.
pub fn is_plain_tag(tag: &str) -> bool {
    PLAIN_TAGS.contains(&tag)
}

/// What of a name can be a template of the operator's, or an id: without a namespace, and without a tag that
/// such a template cannot have.
fn plain(text: &str) -> Option<String> {
    let (name, tag) = text.split_once(':').unwrap_or((text, DEFAULT_TAG));
    let may_be = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let is_plain = name.bytes().all(may_be) && is_plain_tag(tag);
    is_plain.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_stand_for_templates_or_are_refused_with_a_way_out() {
        for image in ["e2bdev/base", "e2bdev/base:latest", "docker.io/e2bdev/base@sha256:00"] {
            assert_eq!(of_image(image, &[]).unwrap(), "base", "{image}");
        }
        let known = of_image("e2bdev/code-interpreter:v1", &[]).unwrap();
        assert_eq!(known, "code-interpreter-v1");
        for image in ["python:3.12", "ubuntu", "localhost:5000/e2bdev", "evil/e2bdev/base"] {
            let said = of_image(image, &[]).unwrap_err().0;
            assert!(said.contains(image) && said.contains("fromTemplate"), "{said}");
        }
        let said = of_image("python:3.12", &[]).unwrap_err().0;
        assert!(said.contains("--name python-3-12 --image"), "{said}");
    }

    #[test]
    fn an_image_has_the_template_that_is_named_after_it() {
        for (image, name) in [
            ("python:3.12", "python-3-12"),
            ("docker.io/library/python:3.12@sha256:00", "python-3-12"),
            ("node:latest", "node"),
            ("debian", "debian"),
            ("ghcr.io:443/Some/App_1:v2.0", "ghcr-io-443-some-app_1-v2-0"),
        ] {
            let (path, tag) = parts(image);
            assert_eq!(named_after(path, tag), name, "{image}");
            assert_eq!(of_image(image, &[template(name, 2, 512)]).unwrap(), name);
        }
    }

    #[test]
    fn plain_names() {
        assert_eq!(plain("base").as_deref(), Some("base"));
        assert_eq!(plain("base:latest").as_deref(), Some("base"));
        assert_eq!(plain("base:v2"), None);
        assert_eq!(plain("ns/base"), None);
        assert_eq!((plain("a label"), plain("..")), (None, None));
    }

    fn template(name: &str, vcpus: u32, memory_mib: u32) -> TemplateInfo {
        TemplateInfo {
            id: String::new(),
            name: name.parse().unwrap(),
            vcpus: VcpuCount::new(vcpus).unwrap(),
            memory: Mebibytes::new(memory_mib),
            disk: Mebibytes::new(0),
            envd_version: String::new(),
            created_at: UNIX_EPOCH,
            spawn_count: 0,
            last_spawned_at: None,
            build_count: 1,
            public: true,
            build_id: None,
        }
    }

    #[test]
    fn a_variant_spares_the_boot() {
        let base = template("base", 2, 512);
        // One that is not what its name says is none.
        let all = [base.clone(), template("base-4x1024", 4, 1024), template("base-1x512", 2, 512)];
        let of = |asked| of_operator(&base, asked, &all, 8192).unwrap();
        let as_it_runs =
            |name: &str| Base { template: name.to_owned(), defaults: None, boots_in: None };
        assert_eq!(of((None, None)), as_it_runs("base"));
        assert_eq!(of((Some(2), Some(512))), as_it_runs("base"));
        assert_eq!(of((Some(4), Some(1024))), as_it_runs("base-4x1024"));
        let boots_in = Some((VcpuCount::new(1).unwrap(), Mebibytes::new(512)));
        assert_eq!(of((Some(1), None)), Base { boots_in, ..as_it_runs("base") });
    }
}
