//! What each endpoint takes and gives.
//!
//! Read by [`super`]. One row for each row of the router's table; the test there fails where one is
//! missing.

use mica_wire::api::{
    AssignedTemplateTags, ConnectSandbox, CopySandbox, ForkResult, Health, HostState, Logs, LogsV2,
    NetworkConfig, NewSandbox, NewSnapshot, PauseSandbox, RefreshSandbox, ResumeSandbox,
    RollbackSandbox, RolledBack, Sandbox, SandboxDetail, SandboxMetric, SandboxesWithMetrics,
    SetAlias, SetTimeout, Snapshot, Template, TemplateAlias, TemplateBuildFileUpload,
    TemplateBuildInfo, TemplateBuildLogsResponse, TemplateNames, TemplateRequestResponseV3,
    TemplateTag, TemplateTagAssignmentsResponse, TemplateTagExistsResponse,
    TemplateTagGroupsResponse, TemplateTagsCountResponse, TemplateWithBuilds, UpdateTemplate,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::builds::wish::{AnnounceBody, StartBody, TagsBody};

/// Makes a schema.
type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// What is answered with a 2xx.
pub enum Answer {
    /// No body.
    Nothing,
    /// Text.
    Text,
    /// A file of this kind.
    File(&'static str),
    /// JSON.
    Json(MakeSchema),
}

/// What a query parameter may be.
pub enum Kind {
    /// Any text.
    Text,
    /// A whole number, from one to the other.
    Integer(i64, i64),
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// A query parameter.
pub struct Parameter {
    pub name: &'static str,
    pub kind: Kind,
    pub required: bool,
    pub about: &'static str,
}

/// A JSON body.
pub struct RequestBody {
    pub required: bool,
    pub schema: MakeSchema,
}

/// One endpoint.
pub struct Operation {
    pub method: &'static str,
    pub path: &'static str,
    pub summary: &'static str,
    pub tag: &'static str,
    pub query: &'static [Parameter],
    pub body: Option<RequestBody>,
    /// Statuses of success, and what comes with them.
    pub answers: [Option<(u16, Answer)>; 2],
    /// What it may be answered with beyond what every endpoint may.
    pub errors: &'static [u16],
    /// Whether it takes no key.
    pub is_open: bool,
    /// Whether the answer says where the next page is.
    pub has_pages: bool,
}

/// The schema of a type.
fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const fn op(method: &'static str, path: &'static str, summary: &'static str) -> Operation {
    Operation {
        method,
        path,
        summary,
        tag: "sandboxes",
        query: &[],
        body: None,
        answers: [None, None],
        errors: &[],
        is_open: false,
        has_pages: false,
    }
}

/// One that E2B or CubeSandbox have, and this host has not.
const fn none(method: &'static str, path: &'static str) -> Operation {
    let mut operation = op(method, path, "Not offered by this host.").fails(&[501]);
    operation.tag = "not offered";
    operation
}

impl Operation {
    const fn json(mut self, status: u16, schema: MakeSchema) -> Self {
        self.answers = [Some((status, Answer::Json(schema))), None];
        self
    }

    /// The same body with either status.
    const fn json_either(mut self, statuses: [u16; 2], schema: MakeSchema) -> Self {
        let [one, other] = statuses;
        self.answers = [Some((one, Answer::Json(schema))), Some((other, Answer::Json(schema)))];
        self
    }

    const fn nothing(self) -> Self {
        self.without_body(204)
    }

    const fn without_body(mut self, status: u16) -> Self {
        self.answers = [Some((status, Answer::Nothing)), None];
        self
    }

    const fn text(mut self) -> Self {
        self.answers = [Some((200, Answer::Text)), None];
        self
    }

    const fn file(mut self, kind: &'static str) -> Self {
        self.answers = [Some((200, Answer::File(kind))), None];
        self
    }

    const fn takes(mut self, schema: MakeSchema) -> Self {
        self.body = Some(RequestBody { required: true, schema });
        self
    }

    const fn may_take(mut self, schema: MakeSchema) -> Self {
        self.body = Some(RequestBody { required: false, schema });
        self
    }

    const fn asks(mut self, query: &'static [Parameter]) -> Self {
        self.query = query;
        self
    }

    const fn fails(mut self, errors: &'static [u16]) -> Self {
        self.errors = errors;
        self
    }

    const fn about(mut self, tag: &'static str) -> Self {
        self.tag = tag;
        self
    }

    const fn open(mut self) -> Self {
        self.is_open = true;
        self
    }

    const fn pages(mut self) -> Self {
        self.has_pages = true;
        self
    }
}

const fn query(name: &'static str, kind: Kind, about: &'static str) -> Parameter {
    Parameter { name, kind, required: false, about }
}

const METADATA: Parameter =
    query("metadata", Kind::Text, "Labels, as a query string that is encoded once more.");
const NEXT_TOKEN: Parameter =
    query("nextToken", Kind::Text, "The `x-next-token` of the page before.");
const PAGE_LIMIT: Parameter = query("limit", Kind::Integer(1, 100), "Entries of a page.");
const PROFILE: [Parameter; 1] =
    [query("seconds", Kind::Integer(1, 60), "How long; 10 unless told.")];
const PAGE: [Parameter; 2] = [NEXT_TOKEN, PAGE_LIMIT];
const LIST: [Parameter; 7] = [
    METADATA,
    query("state", Kind::Text, "`running`, `paused` or both, separated by a comma."),
    query("order", Kind::OneOf(&["asc", "desc"]), "By start; newest first unless told."),
    query("startedAfter", Kind::Text, "RFC 3339."),
    query("template", Kind::Text, "Id or name of a template."),
    NEXT_TOKEN,
    PAGE_LIMIT,
];
const SNAPSHOTS: [Parameter; 4] = [
    query("sandboxID", Kind::Text, "Of this sandbox alone."),
    query("name", Kind::Text, "With this name alone."),
    NEXT_TOKEN,
    PAGE_LIMIT,
];
const LOG_LIMIT: Parameter = query("limit", Kind::Integer(0, 1000), "Entries of the answer.");
const LOGS_V1: [Parameter; 2] = [
    query("start", Kind::Integer(0, i64::MAX), "Milliseconds since 1970: nothing older."),
    LOG_LIMIT,
];
const LOGS_V2: [Parameter; 5] = [
    query("cursor", Kind::Integer(0, i64::MAX), "Milliseconds since 1970: where to start."),
    LOG_LIMIT,
    query("direction", Kind::OneOf(&["forward", "backward"]), "Oldest or newest first."),
    query("level", Kind::OneOf(&["debug", "info", "warn", "error"]), "Nothing below it."),
    query("search", Kind::Text, "What the message contains: 256 characters at most."),
];
const SPAN: [Parameter; 2] = [
    query("start", Kind::Integer(0, i64::MAX), "Seconds since 1970."),
    query("end", Kind::Integer(0, i64::MAX), "Seconds since 1970."),
];
const SANDBOX_IDS: [Parameter; 1] = [Parameter {
    name: "sandbox_ids",
    kind: Kind::Text,
    required: true,
    about: "Ids, separated by commas; 100 at most.",
}];

/// Of what makes a sandbox run.
const START_ERRORS: &[u16] = &[403, 404, 409, 422, 504, 507];
/// Of one that is made, with what this host does not have.
const CREATE_ERRORS: &[u16] = &[403, 404, 409, 422, 501, 504, 507];
/// Of what is done with one that is there.
const SANDBOX_ERRORS: &[u16] = &[404];
const BUSY_ERRORS: &[u16] = &[404, 409, 507];
const TEMPLATE_ERRORS: &[u16] = &[403, 404];
const BUILD_ERRORS: &[u16] = &[403, 404, 409, 507];
const LOG_LEVEL: Parameter =
    query("level", Kind::OneOf(&["debug", "info", "warn", "error"]), "Nothing below it.");
const TAG_GROUPS: [Parameter; 2] = [
    query("search", Kind::Text, "What the tag contains."),
    query(
        "sort",
        Kind::OneOf(&["latest_asc", "latest_desc", "name_asc", "name_desc"]),
        "By when it was given, or by name; newest first unless told.",
    ),
];
const BUILD_STATUS: [Parameter; 3] = [
    query("logsOffset", Kind::Integer(0, i64::MAX), "Entries of the log that are known."),
    query("limit", Kind::Integer(0, 100), "Entries of the answer."),
    LOG_LEVEL,
];
const BUILD_LOGS: [Parameter; 4] = [
    query("cursor", Kind::Integer(0, i64::MAX), "Milliseconds since 1970: where to start."),
    query("limit", Kind::Integer(0, 100), "Entries of the answer."),
    query("direction", Kind::OneOf(&["forward", "backward"]), "Oldest or newest first."),
    LOG_LEVEL,
];

/// Every endpoint.
pub static OPERATIONS: [Operation; crate::route::ENDPOINT_COUNT] = [
    op("GET", "/health", "Whether the host answers.").json(200, of::<Health>).about("host").open(),
    op("GET", "/metrics", "Numbers of the host, as Prometheus reads them.")
        .text()
        .fails(&[404])
        .about("host"),
    op("GET", "/metrics/sandboxes", "Numbers of each sandbox, as Prometheus reads them.")
        .text()
        .fails(&[404])
        .about("host"),
    op("GET", "/ui/state", "Nodes, shards and sandboxes of the host, for its operator.")
        .asks(&PAGE)
        .json(200, of::<HostState>)
        .fails(&[404])
        .about("host")
        .pages(),
    op("GET", "/debug/pprof/profile", "Where the daemon spends its processors: pprof's protobuf.")
        .asks(&PROFILE)
        .file("application/octet-stream")
        .fails(&[404, 409])
        .about("host"),
    op("GET", "/debug/flamegraph", "The same as a picture.")
        .asks(&PROFILE)
        .file("image/svg+xml")
        .fails(&[404, 409])
        .about("host"),
    op("GET", "/openapi.json", "This document.")
        .json(200, of::<serde_json::Map<String, serde_json::Value>>)
        .about("host")
        .open(),
    op("POST", "/sandboxes", "Makes a sandbox.")
        .takes(of::<NewSandbox>)
        .json(201, of::<Sandbox>)
        .fails(CREATE_ERRORS),
    op("POST", "/v2/sandboxes", "Makes a sandbox.")
        .takes(of::<NewSandbox>)
        .json(201, of::<Sandbox>)
        .fails(CREATE_ERRORS),
    op("GET", "/sandboxes", "Running sandboxes.")
        .asks(&[METADATA])
        .json(200, of::<Vec<SandboxDetail>>),
    op("GET", "/v2/sandboxes", "Sandboxes.")
        .asks(&LIST)
        .json(200, of::<Vec<SandboxDetail>>)
        .pages(),
    op("GET", "/sandboxes/metrics", "What several sandboxes use.")
        .asks(&SANDBOX_IDS)
        .json(200, of::<SandboxesWithMetrics>),
    op("GET", "/sandboxes/{sandboxID}", "One sandbox.")
        .json(200, of::<SandboxDetail>)
        .fails(SANDBOX_ERRORS),
    op("DELETE", "/sandboxes/{sandboxID}", "Ends a sandbox.").nothing().fails(BUSY_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/timeout", "Sets how long a sandbox lives on.")
        .takes(of::<SetTimeout>)
        .nothing()
        .fails(SANDBOX_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/refreshes", "Lets a sandbox live on for a while.")
        .may_take(of::<RefreshSandbox>)
        .nothing()
        .fails(SANDBOX_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/connect", "Makes sure that a sandbox runs.")
        .may_take(of::<ConnectSandbox>)
        .json_either([200, 201], of::<Sandbox>)
        .fails(START_ERRORS),
    op("POST", "/v2/sandboxes/{sandboxID}/connect", "Makes sure that a sandbox runs.")
        .may_take(of::<ConnectSandbox>)
        .json_either([200, 201], of::<Sandbox>)
        .fails(START_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/pause", "Pauses a sandbox.")
        .may_take(of::<PauseSandbox>)
        .nothing()
        .fails(BUSY_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/resume", "Lets a paused sandbox go on.")
        .may_take(of::<ResumeSandbox>)
        .json(201, of::<Sandbox>)
        .fails(START_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/snapshots", "Makes a snapshot of a sandbox.")
        .may_take(of::<NewSnapshot>)
        .json(201, of::<Snapshot>)
        .fails(BUSY_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/rollback", "Puts a sandbox back to a snapshot of its own.")
        .takes(of::<RollbackSandbox>)
        .json(200, of::<RolledBack>)
        .fails(BUSY_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/clone", "Makes sandboxes like this one: all or none.")
        .may_take(of::<CopySandbox>)
        .json(201, of::<Vec<Sandbox>>)
        .fails(START_ERRORS),
    op("POST", "/sandboxes/{sandboxID}/fork", "Makes sandboxes like this one, each by itself.")
        .may_take(of::<CopySandbox>)
        .json(201, of::<Vec<ForkResult>>)
        .fails(START_ERRORS),
    op("PUT", "/sandboxes/{sandboxID}/network", "Replaces who may reach it, and whom it may.")
        .may_take(of::<NetworkConfig>)
        .nothing()
        .fails(BUSY_ERRORS),
    op("GET", "/sandboxes/{sandboxID}/metrics", "What a sandbox used.")
        .asks(&SPAN)
        .json(200, of::<Vec<SandboxMetric>>)
        .fails(SANDBOX_ERRORS),
    op("GET", "/sandboxes/{sandboxID}/logs", "What was written about a sandbox.")
        .asks(&LOGS_V1)
        .json(200, of::<Logs>)
        .fails(SANDBOX_ERRORS),
    op("GET", "/v2/sandboxes/{sandboxID}/logs", "What was written about a sandbox.")
        .asks(&LOGS_V2)
        .json(200, of::<LogsV2>)
        .fails(SANDBOX_ERRORS),
    op("GET", "/snapshots", "Snapshots.")
        .asks(&SNAPSHOTS)
        .json(200, of::<Vec<Snapshot>>)
        .about("snapshots")
        .pages(),
    op("GET", "/templates", "Templates.").json(200, of::<Vec<Template>>).about("templates"),
    none("POST", "/templates"),
    op("GET", "/v2/templates", "Templates.")
        .asks(&[NEXT_TOKEN, PAGE_LIMIT])
        .json(200, of::<Vec<Template>>)
        .about("templates")
        .pages(),
    op("GET", "/default-templates", "Templates that clients use unless they are told another.")
        .json(200, of::<Vec<Template>>)
        .about("templates"),
    op("POST", "/v3/templates", "Announces the build of a template.")
        .takes(of::<AnnounceBody>)
        .json(202, of::<TemplateRequestResponseV3>)
        .about("builds")
        .fails(&[403, 409, 507]),
    op(
        "PUT",
        "/build-files/{token}",
        "Takes a file for a build, from whoever was given its address.",
    )
    .without_body(200)
    .about("builds")
    .fails(&[404, 411, 500, 507])
    .open(),
    op("POST", "/v2/templates/{templateID}/builds/{buildID}", "Starts a build.")
        .takes(of::<StartBody>)
        .without_body(202)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/builds/{buildID}/status", "How far a build is.")
        .asks(&BUILD_STATUS)
        .json(200, of::<TemplateBuildInfo>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/builds/{buildID}/logs", "What was written in a build.")
        .asks(&BUILD_LOGS)
        .json(200, of::<TemplateBuildLogsResponse>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/files/{hash}", "Where a file for a build is to go.")
        .json(201, of::<TemplateBuildFileUpload>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("POST", "/templates/tags", "Gives a build more tags.")
        .takes(of::<TagsBody>)
        .json(201, of::<AssignedTemplateTags>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("DELETE", "/templates/tags", "Takes tags from a template.")
        .takes(of::<TagsBody>)
        .nothing()
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/tags", "The tags of a template.")
        .json(200, of::<Vec<TemplateTag>>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/tags/count", "How many tags a template has.")
        .json(200, of::<TemplateTagsCountResponse>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/tags/exists", "Whether a template has a tag.")
        .asks(&[query("tag", Kind::Text, "The tag.")])
        .json(200, of::<TemplateTagExistsResponse>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/tags/groups", "The tags of a template and their builds.")
        .asks(&TAG_GROUPS)
        .json(200, of::<TemplateTagGroupsResponse>)
        .about("builds")
        .fails(BUILD_ERRORS),
    op("GET", "/templates/{templateID}/tags/{tag}/assignments", "The build that a tag stands for.")
        .json(200, of::<TemplateTagAssignmentsResponse>)
        .about("builds")
        .fails(BUILD_ERRORS),
    none("GET", "/templates/compat"),
    op("GET", "/templates/aliases/{alias}", "What a name stands for.")
        .json(200, of::<TemplateAlias>)
        .about("templates")
        .fails(TEMPLATE_ERRORS),
    op("GET", "/templates/{templateID}", "One template, and its builds.")
        .asks(&PAGE)
        .json(200, of::<TemplateWithBuilds>)
        .about("templates")
        .fails(TEMPLATE_ERRORS)
        .pages(),
    none("POST", "/templates/{templateID}"),
    op("PATCH", "/templates/{templateID}", "Says whether others may use a template.")
        .may_take(of::<UpdateTemplate>)
        .json(200, of::<TemplateNames>)
        .about("templates")
        .fails(TEMPLATE_ERRORS),
    op("DELETE", "/templates/{templateID}", "Deletes a snapshot.")
        .nothing()
        .about("templates")
        .fails(&[403, 404, 409, 507]),
    op("PATCH", "/v2/templates/{templateID}", "Says whether others may use a template.")
        .may_take(of::<UpdateTemplate>)
        .json(200, of::<TemplateNames>)
        .about("templates")
        .fails(TEMPLATE_ERRORS),
    op("PUT", "/templates/{templateID}/alias", "Gives a template a name.")
        .may_take(of::<SetAlias>)
        .json(200, of::<TemplateAlias>)
        .about("templates")
        .fails(BUILD_ERRORS),
    none("GET", "/volumes"),
    none("POST", "/volumes"),
    none("GET", "/volumes/{volumeID}"),
    none("DELETE", "/volumes/{volumeID}"),
    none("GET", "/volumecontent/{volumeID}/{kind}"),
    none("POST", "/volumecontent/{volumeID}/{kind}"),
    none("PUT", "/volumecontent/{volumeID}/{kind}"),
    none("PATCH", "/volumecontent/{volumeID}/{kind}"),
    none("DELETE", "/volumecontent/{volumeID}/{kind}"),
    none("GET", "/secrets"),
    none("POST", "/secrets"),
    none("GET", "/secrets/{secretID}"),
    none("POST", "/secrets/{secretID}"),
    none("DELETE", "/secrets/{secretID}"),
    none("GET", "/teams"),
];
