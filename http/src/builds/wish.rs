//! What clients write in the bodies of builds: checked, and turned into what a build works with.
//!
//! Called by [`super`]. Refuses names and tags out of form, and steps that no build could carry out, before
//! any of them runs.

use mica_shards::{DEFAULT_TAG, Reference};
use mica_wire::api::SetAlias;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::api::json;
use crate::error::ApiError;

/// Steps of one build. The body they come in has a bound of its own.
const STEPS_MAX: usize = 1000;
/// Tags of one request.
const TAGS_MAX: usize = 50;

/// `POST /v3/templates`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AnnounceBody {
    name: Option<String>,
    alias: Option<String>,
    tags: Option<Vec<String>>,
    cpu_count: Option<u32>,
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u32>,
    min_free_disk_mb: Option<u32>,
}

/// A build that is announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The template's name.
    pub name: String,
    /// The tags it is to have.
    pub tags: Vec<String>,
    /// vCPUs, when the client minds.
    pub vcpus: Option<u32>,
    /// Memory, when the client minds.
    pub memory_mib: Option<u32>,
    /// Room on the disk, when the client minds.
    pub free_disk_mib: Option<u32>,
}

/// Reads the body of an announcement. `tenant` may stand in front of the name.
///
/// # Errors
/// 400, saying what to change.
pub fn announced(body: &[u8], tenant: &str) -> Result<Announced, ApiError> {
    let body: AnnounceBody = json::read(body)?;
    let AnnounceBody { name, alias, tags, cpu_count, memory_mb, min_free_disk_mb } = body;
    let text = name.or(alias).ok_or_else(|| ApiError::bad_request("`name` is missing"))?;
    let reference = reference(&text, "name")?;
    refuse_other_namespace(&reference, "name", tenant)?;
    let mut tags = checked_tags(tags.unwrap_or_default())?;
    tags.extend(reference.tag);
    if tags.is_empty() {
        tags.push(DEFAULT_TAG.to_owned());
    }
    tags.sort();
    tags.dedup();
    Ok(Announced {
        name: reference.name,
        tags,
        vcpus: cpu_count,
        memory_mib: memory_mb,
        free_disk_mib: min_free_disk_mb,
    })
}

/// Reads a template's name in any form.
///
/// # Errors
/// 400, naming the field.
pub fn reference(text: &str, field: &str) -> Result<Reference, ApiError> {
    Reference::parse(text).ok_or_else(|| {
        ApiError::bad_request(format!(
            "`{field}` must be the name of a template: a letter or digit, then letters, digits, `-` and \
             `_`, at most 63 together; with `:` and a tag after it, or without"
        ))
    })
}

fn checked_tags(tags: Vec<String>) -> Result<Vec<String>, ApiError> {
    let tags: Vec<String> = tags.iter().map(|tag| tag.trim().to_ascii_lowercase()).collect();
    if tags.len() > TAGS_MAX || !tags.iter().all(|tag| Reference::is_tag(tag)) {
        return Err(ApiError::bad_request(format!(
            "`tags` must be at most {TAGS_MAX} tags of letters, digits, `.`, `_` and `-`, each at most 64 \
             characters long"
        )));
    }
    Ok(tags)
}

#[derive(Debug, Deserialize, JsonSchema)]
pub struct TagsBody {
    #[serde(alias = "name")]
    target: String,
    tags: Vec<String>,
}

/// Reads the body of a request that moves or removes tags: which template, and which tags.
///
/// # Errors
/// 400, saying what to change.
pub fn tags(body: &[u8]) -> Result<(Reference, Vec<String>), ApiError> {
    let TagsBody { target, tags } = json::read(body)?;
    let tags = checked_tags(tags)?;
    if tags.is_empty() {
        return Err(ApiError::bad_request("`tags` is empty; name at least one tag"));
    }
    Ok((reference(&target, "target")?, tags))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct UpdateBody {
    public: Option<bool>,
}

/// Reads whether a template is to be public.
///
/// # Errors
/// 400.
pub fn public(body: &[u8]) -> Result<Option<bool>, ApiError> {
    Ok(json::read_or_default::<UpdateBody>(body)?.public)
}

/// Reads the new name of a template. `tenant` may stand in front of it.
///
/// # Errors
/// 400, saying what to change.
pub fn name(body: &[u8], tenant: &str) -> Result<String, ApiError> {
    let SetAlias { alias } = json::read_or_default(body)?;
    let text = alias.ok_or_else(|| ApiError::bad_request("`alias` is missing"))?;
    let reference = reference(&text, "alias")?;
    refuse_other_namespace(&reference, "alias", tenant)?;
    if reference.tag.is_some() {
        return Err(ApiError::bad_request(
            "`alias` has a tag; tags stay as they are, leave it out",
        ));
    }
    Ok(reference.name)
}

fn refuse_other_namespace(name: &Reference, field: &str, tenant: &str) -> Result<(), ApiError> {
    if name.namespace.as_deref().is_some_and(|namespace| namespace != tenant) {
        let message = format!("`{field}` is in another namespace; yours is `{tenant}`");
        return Err(ApiError::bad_request(message));
    }
    Ok(())
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StartBody {
    from_image: Option<String>,
    from_template: Option<String>,
    from_image_registry: Option<serde_json::Value>,
    steps: Vec<StepBody>,
    start_cmd: Option<String>,
    ready_cmd: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepBody {
    r#type: String,
    #[serde(default)]
    args: Vec<String>,
    files_hash: Option<String>,
}

/// What a template is built on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum From {
    /// A template, in any form of its name.
    Template(String),
    /// A container image.
    Image(String),
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Unpack an uploaded archive.
    Copy {
        /// The uploaded content.
        hash: String,
        /// What of it, as a pattern.
        source: String,
        /// Where to.
        target: String,
        /// Whose it becomes; the step's user when empty.
        owner: String,
        /// Its mode in octal digits; as in the archive when empty.
        mode: String,
    },
    /// Run a command.
    Run {
        /// For bash.
        command: String,
        /// Who, when not the step's user.
        user: Option<String>,
    },
    /// Set variables.
    Env(Vec<(String, String)>),
    /// Set the directory.
    Workdir(String),
    /// Set the user.
    User(String),
}

impl Step {
    /// As a log shows it.
    pub fn shown(&self) -> String {
        match self {
            Self::Copy { source, target, .. } => format!("COPY {source} {target}"),
            Self::Run { command, .. } => format!("RUN {command}"),
            // Values are secrets more often than not.
            Self::Env(pairs) => {
                let names: Vec<&str> = pairs.iter().map(|(name, _)| name.as_str()).collect();
                format!("ENV {}", names.join(" "))
            }
            Self::Workdir(path) => format!("WORKDIR {path}"),
            Self::User(user) => format!("USER {user}"),
        }
    }
}

/// A build that is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// What it starts from.
    pub from: From,
    /// Its steps.
    pub steps: Vec<Step>,
    /// What is to run in every sandbox from the start.
    pub start: Option<String>,
    /// What says that it does.
    pub ready: Option<String>,
}

/// Reads the body that starts a build.
///
/// # Errors
/// 400, naming the step and what to change.
pub fn started(body: &[u8]) -> Result<Started, ApiError> {
    let body: StartBody = json::read(body)?;
    if body.from_image_registry.is_some_and(|registry| !registry.is_null()) {
        return Err(ApiError::bad_request(
            "`fromImageRegistry` is not supported: this host pulls no images; use `fromTemplate`",
        ));
    }
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let from = match (given(body.from_template), given(body.from_image)) {
        (Some(template), None) => From::Template(template),
        (None, Some(image)) => From::Image(image),
        (Some(_), Some(_)) => {
            let message =
                "`fromImage` and `fromTemplate` exclude each other; leave one of them out";
            return Err(ApiError::bad_request(message));
        }
        (None, None) => {
            return Err(ApiError::bad_request("one of `fromTemplate` and `fromImage` is needed"));
        }
    };
    if body.steps.len() > STEPS_MAX {
        let message = format!("`steps` has {}, at most {STEPS_MAX} are allowed", body.steps.len());
        return Err(ApiError::bad_request(message));
    }
    let steps = body.steps.into_iter().enumerate();
    let steps = steps.map(|(at, step)| {
        self::step(step).map_err(|what| ApiError::bad_request(format!("step {}: {what}", at + 1)))
    });
    let steps = steps.collect::<Result<_, _>>()?;
    Ok(Started { from, steps, start: given(body.start_cmd), ready: given(body.ready_cmd) })
}

fn step(body: StepBody) -> Result<Step, String> {
    if body.args.iter().any(|arg| arg.contains('\0')) {
        return Err("an argument has a zero byte".to_owned());
    }
    let kind = body.r#type.to_ascii_uppercase();
    let mut args = body.args.into_iter();
    let mut arg = || args.next().unwrap_or_default();
    match kind.as_str() {
        "COPY" => copy(body.files_hash, arg(), arg(), arg(), arg()),
        "RUN" => {
            let (command, user) = (needed(arg(), "RUN needs a command")?, arg());
            let user = (!user.is_empty()).then(|| checked_user(&user)).transpose()?;
            Ok(Step::Run { command, user })
        }
        "ENV" => {
            let all: Vec<String> = args.collect();
            if all.is_empty() || !all.len().is_multiple_of(2) {
                return Err("ENV needs names and values, in turn".to_owned());
            }
            let pairs = all.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone()));
            let pairs: Vec<_> = pairs.collect();
            if pairs.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
                return Err("the name of a variable is not empty and has no `=`".to_owned());
            }
            Ok(Step::Env(pairs))
        }
        "WORKDIR" => Ok(Step::Workdir(needed(arg(), "WORKDIR needs a directory")?)),
        "USER" => Ok(Step::User(checked_user(&arg())?)),
        other => Err(format!(
            "`{}` is not a step; use COPY, RUN, ENV, WORKDIR or USER",
            other.chars().take(50).collect::<String>()
        )),
    }
}

fn copy(
    hash: Option<String>,
    source: String,
    target: String,
    owner: String,
    mode: String,
) -> Result<Step, String> {
    let hash = hash.filter(|hash| mica_shards::BuildStore::is_hash(hash));
    let hash = hash.ok_or("COPY needs the `filesHash` of what was uploaded")?;
    let source = needed(source, "COPY needs a source")?;
    let target = needed(target, "COPY needs a target")?;
    if !owner.is_empty() {
        let (user, group) = owner.split_once(':').unwrap_or((&owner, "x"));
        if !is_account(user) || !is_account(group) {
            return Err("the owner of a COPY is `user` or `user:group`".to_owned());
        }
    }
    if mode.len() > 5 || !mode.bytes().all(|b| matches!(b, b'0'..=b'7')) {
        return Err("the mode of a COPY is octal, such as 0755".to_owned());
    }
    Ok(Step::Copy { hash, source, target, owner, mode })
}

fn needed(text: String, problem: &str) -> Result<String, String> {
    if text.is_empty() { Err(problem.to_owned()) } else { Ok(text) }
}

/// Of `user:group` the user.
fn checked_user(text: &str) -> Result<String, String> {
    let user = text.split(':').next().unwrap_or_default();
    match is_account(user) {
        true => Ok(user.to_owned()),
        false => Err("a user is named with letters, digits, `_`, `.` and `-`".to_owned()),
    }
}

fn is_account(text: &str) -> bool {
    matches!(text.len(), 1..=64)
        && !text.starts_with('-')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_captured_build_of_the_sdk() {
        let started = started(
            br#"{"fromImage":"python:3.12","force":false,"steps":[
             {"type":"COPY","args":["f.txt","/app/","",""],"filesHash":"37dc","force":false},
             {"type":"RUN","args":["echo a"],"force":false},
             {"type":"ENV","args":["A","1"]},{"type":"WORKDIR","args":["/app"]},
             {"type":"USER","args":["root"]}],"startCmd":"sleep 1","readyCmd":"true"}"#,
        )
        .unwrap();
        assert_eq!(started.from, From::Image("python:3.12".to_owned()));
        assert_eq!(started.steps.len(), 5);
        assert_eq!(started.steps[1], Step::Run { command: "echo a".to_owned(), user: None });
        assert_eq!(started.steps[2].shown(), "ENV A", "values stay out of logs");
        assert_eq!(started.ready.as_deref(), Some("true"));
    }

    #[test]
    fn bad_builds_say_which_step() {
        let message = |steps: &str| {
            let body = format!(r#"{{"fromTemplate":"base","steps":[{steps}]}}"#);
            started(body.as_bytes()).unwrap_err().message()
        };
        for bad in [
            r#"{"type":"ADD","args":["x"]}"#,
            r#"{"type":"RUN","args":[]}"#,
            r#"{"type":"RUN","args":["a","--x"]}"#,
            r#"{"type":"RUN","args":["a\u0000"]}"#,
            r#"{"type":"ENV","args":["A"]}"#,
            r#"{"type":"ENV","args":["A=B","c"]}"#,
            r#"{"type":"WORKDIR","args":[""]}"#,
            r#"{"type":"USER","args":["a b"]}"#,
            r#"{"type":"COPY","args":["a","b","",""]}"#,
            r#"{"type":"COPY","args":["a","b","",""],"filesHash":"../x"}"#,
            r#"{"type":"COPY","args":["a","b","-R",""],"filesHash":"aa"}"#,
            r#"{"type":"COPY","args":["a","b","","u+s"],"filesHash":"aa"}"#,
        ] {
            let good = r#"{"type":"RUN","args":["true"]}"#;
            assert!(message(&format!("{good},{bad}")).contains("step 2"), "{bad}");
        }
        for bad in ["{}", r#"{"fromImage":"a","fromTemplate":"b"}"#, r#"{"fromImage":""}"#] {
            assert!(started(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_carry_tags() {
        let of = |body: &str| announced(body.as_bytes(), "default").map_err(|e| e.message());
        let app =
            of(r#"{"name":"App:V1","tags":["v1","x"],"cpuCount":2,"memoryMB":1024}"#).unwrap();
        assert_eq!((app.name.as_str(), app.vcpus, app.memory_mib), ("app", Some(2), Some(1024)));
        assert_eq!(app.tags, ["v1", "x"]);
        assert_eq!(of(r#"{"alias":"app"}"#).unwrap().tags, [DEFAULT_TAG]);
        assert_eq!(of(r#"{"name":"default/app"}"#).unwrap().name, "app");
        for bad in
            ["{}", r#"{"name":"a b"}"#, r#"{"name":"other/app"}"#, r#"{"name":"a","tags":["/"]}"#]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
        let renamed = |body: &str| name(body.as_bytes(), "default").map_err(|e| e.message());
        assert_eq!(renamed(r#"{"alias":"default/App"}"#).unwrap(), "app");
        for bad in ["", "{}", r#"{"alias":"a b"}"#, r#"{"alias":"app:v1"}"#, r#"{"alias":"x/app"}"#]
        {
            assert!(renamed(bad).is_err(), "{bad}");
        }
        assert_eq!(public(b"").unwrap(), None, "the body may be absent");
        assert!(tags(br#"{"target":"app:v1","tags":[]}"#).is_err());
        assert_eq!(tags(br#"{"name":"app","tags":["A"]}"#).unwrap().1, ["a"]);
    }
}
