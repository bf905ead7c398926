//! Two tenants on one host: what is the one's does not exist for the other.
//!
//! One row for each endpoint, and a check that there is one: a new endpoint without a row here fails.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, NO_POOL, eventually, patiently};
use crate::template::TEMPLATE;

const NOBODY: &str = "i00000000000000000000";
const NO_SNAPSHOT: &str = "00000000000000000000";
/// The name of the template that the first tenant built, and one that nobody has.
const BUILT: &str = "owners-built";
const NOT_BUILT: &str = "nobodys-built";

/// A host with two tenants. The first has sandboxes, a snapshot, a template that it built, and one that it
/// builds.
struct World {
    daemon: Daemon,
    owner: String,
    other: String,
    sandbox: String,
    snapshot: String,
    /// One that is announced, and a build of it.
    template: String,
    build: String,
    /// One whose build is done, and which is not public: its owner can use it.
    built: String,
}

impl World {
    /// Builds need the real agent, and VM processes that wait would have another.
    fn new() -> Self {
        let daemon = Daemon::start_with(&NO_POOL);
        daemon.use_guest_agent();
        let owner = daemon.make_key(&["--tenant", "owner"]);
        let other = daemon.make_key(&["--tenant", "other"]);
        let body = json!({ "templateID": TEMPLATE, "timeout": 300, "metadata": { "a": "b" } });
        let made = daemon.ask_as(&owner, "POST", "/v2/sandboxes", Some(&body));
        assert_eq!(made.status, 201, "{made:?}");
        let sandbox = text(&made.json()["sandboxID"]);
        let path = format!("/sandboxes/{sandbox}/snapshots");
        let made = daemon.ask_as(&owner, "POST", &path, Some(&json!({ "name": "mine" })));
        assert_eq!(made.status, 201, "{made:?}");
        let snapshot = text(&made.json()["snapshotID"]);
        let body = json!({ "name": "owners-own" });
        let made = daemon.ask_as(&owner, "POST", "/v3/templates", Some(&body));
        assert_eq!(made.status, 202, "{made:?}");
        let (template, build) = (text(&made.json()["templateID"]), text(&made.json()["buildID"]));
        let built = String::new();
        let mut world = Self { daemon, owner, other, sandbox, snapshot, template, build, built };
        let (built, done) = world.build(&world.owner, BUILT, TEMPLATE);
        assert_eq!(done["status"], "ready", "{done}");
        world.built = built;
        world
    }

    /// Builds a template on another, to its end. What it is, and how it ended.
    fn build(&self, key: &str, name: &str, base: &str) -> (String, Value) {
        let ask = |method: &str, path: &str, body: Option<&Value>| {
            self.daemon.ask_as(key, method, path, body)
        };
        let announced = ask("POST", "/v3/templates", Some(&json!({ "name": name }))).json();
        let (template, build) = (text(&announced["templateID"]), text(&announced["buildID"]));
        let body = json!({ "fromTemplate": base, "steps": [] });
        let started = ask("POST", &format!("/v2/templates/{template}/builds/{build}"), Some(&body));
        assert_eq!(started.status, 202, "{started:?}");
        let path = format!("/templates/{template}/builds/{build}/status");
        let status = || ask("GET", &path, None).json();
        eventually("a build is over", || {
            ["ready", "error"].contains(&status()["status"].as_str().unwrap_or_default())
        });
        (template, status())
    }

    fn owner(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.daemon.ask_as(&self.owner, method, path, body)
    }

    fn other(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.daemon.ask_as(&self.other, method, path, body)
    }

    /// A request by the other tenant that names something of the owner's: the answer must be, to the
    /// byte, the one for what does not exist.
    fn hidden(&self, method: &str, path: &str, body: Option<&Value>, found: &str, missing: &str) {
        let swap = |text: &str| text.replace(found, missing);
        let body_missing: Option<Value> =
            body.map(|body| serde_json::from_str(&swap(&body.to_string())).expect("JSON"));
        assert!(
            path.contains(found) || body.is_some_and(|body| body.to_string().contains(found)),
            "{method} {path} does not name it"
        );
        let foreign = self.other(method, path, body);
        let nothing = self.other(method, &swap(path), body_missing.as_ref());
        nothing.error(404);
        assert_eq!(foreign.status, nothing.status, "{method} {path}: {foreign:?}");
        let said = swap(&String::from_utf8_lossy(&foreign.body));
        assert_eq!(said, String::from_utf8_lossy(&nothing.body), "{method} {path}");
        let names = |reply: &Reply| reply.headers.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(&foreign), names(&nothing), "{method} {path}");
    }

    /// A request about the owner's sandbox, under the id in `path` where it says `{id}`.
    fn hidden_sandbox(&self, method: &str, path: &str, body: Option<Value>) {
        let path = path.replace("{id}", &self.sandbox);
        self.hidden(method, &path, body.as_ref(), &self.sandbox, NOBODY);
        let got = self.owner("GET", &format!("/sandboxes/{}", self.sandbox), None).json();
        assert_eq!(got["state"], "running", "{method} {path} did something");
    }
}

/// What the owner sees, and the other does not.
impl World {
    /// A path that is there for the operator, and for nobody else.
    fn operators_alone(&self, path: &str) {
        self.daemon.ask_as("", "GET", path, None).error(401);
        assert_eq!(self.daemon.ask("GET", path, None).status, 200, "{path}");
        let said = self.other("GET", path, None).error(404);
        let missing = self.other("GET", "/nothing", None).error(404);
        let path = path.split('?').next().unwrap_or_default();
        assert_eq!(said.replace(path, "/nothing"), missing);
    }

    /// A request about the owner's template, under the ids in `path` where it says `{id}` and `{build}`.
    fn hidden_build(&self, method: &str, path: &str, body: Option<Value>) {
        let path = path.replace("{id}", &self.template).replace("{build}", &self.build);
        self.hidden(method, &path, body.as_ref(), &self.template, NO_SNAPSHOT);
    }
}

/// What the first tenant built.
impl World {
    /// A request about it, by id and by name where `path` and `body` say `{id}`. Its owner gets this
    /// status, so that the other's 404 is about whose it is.
    fn hidden_built(&self, method: &str, path: &str, body: Option<&Value>, owners: u16) {
        for (found, missing) in [(self.built.as_str(), NO_SNAPSHOT), (BUILT, NOT_BUILT)] {
            let path = path.replace("{id}", found);
            let body: Option<Value> = body.map(|body| {
                serde_json::from_str(&body.to_string().replace("{id}", found)).expect("JSON")
            });
            self.hidden(method, &path, body.as_ref(), found, missing);
            let own = self.owner(method, &path, body.as_ref());
            assert_eq!(own.status, owners, "{method} {path}: {own:?}");
        }
    }

    /// Nor under the name that says whose it is.
    fn no_sandbox_of_what_is_built(&self, path: &str) {
        let full = format!("owner/{BUILT}");
        let names = [(self.built.as_str(), NO_SNAPSHOT), (BUILT, NOT_BUILT), (&full, "owner/none")];
        for (found, missing) in names {
            let body = json!({ "templateID": found });
            self.hidden("POST", path, Some(&body), found, missing);
            let made = self.owner("POST", path, Some(&body));
            assert_eq!(made.status, 201, "{made:?}");
            let id = text(&made.json()["sandboxID"]);
            assert_eq!(self.owner("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
        }
    }

    /// A build on it ends as one on what nobody has, in the same words.
    fn nothing_is_built_on_what_is_built(&self) {
        let reason = |base: &str| {
            let (_, done) = self.build(&self.other, "on-it", base);
            assert_eq!(done["status"], "error", "{base}: {done}");
            text(&done["reason"]["message"])
        };
        for (found, missing) in [(self.built.as_str(), NO_SNAPSHOT), (BUILT, NOT_BUILT)] {
            let said = reason(found);
            assert!(said.contains("there is no template"), "{said}");
            assert_eq!(said.replace(found, missing), reason(missing));
            let (_, done) = self.build(&self.owner, "on-it", found);
            assert_eq!(done["status"], "ready", "{done}");
        }
    }

    /// Ids of the templates that a key lists.
    fn listed(&self, key: &str, path: &str) -> Vec<String> {
        let reply = self.daemon.ask_as(key, "GET", path, None);
        assert_eq!(reply.status, 200, "{reply:?}");
        let entries = reply.json();
        entries.as_array().expect("a list").iter().map(|entry| text(&entry["templateID"])).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

/// An endpoint as the route table writes it, and what is shown of it.
type Row = (&'static str, fn(&World));

const ROWS: &[Row] = &[
    ("GET /health", |world| {
        for (key, sandboxes) in [("", 0), ("e2b_00", 0), (&world.owner, 1), (&world.other, 0)] {
            let reply = world.daemon.ask_as(key, "GET", "/health", None);
            let wanted = json!({ "status": "ok", "sandboxes": sandboxes });
            assert_eq!((reply.status, reply.json()), (200, wanted), "{key}");
        }
    }),
    ("GET /metrics", |world| {
        world.operators_alone("/metrics");
    }),
    ("GET /metrics/sandboxes", |world| world.operators_alone("/metrics/sandboxes")),
    ("GET /ui/state", |world| world.operators_alone("/ui/state")),
    ("GET /debug/pprof/profile", |world| {
        world.operators_alone("/debug/pprof/profile?seconds=1");
    }),
    ("GET /debug/flamegraph", |world| world.operators_alone("/debug/flamegraph?seconds=1")),
    ("POST /sandboxes", |world| {
        for path in ["/sandboxes", "/v2/sandboxes"] {
            let body = json!({ "templateID": world.snapshot });
            world.hidden("POST", path, Some(&body), &world.snapshot, NO_SNAPSHOT);
            let made = world.owner("POST", path, Some(&body));
            assert_eq!(made.status, 201, "{made:?}");
            let id = text(&made.json()["sandboxID"]);
            assert_eq!(world.owner("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
            world.no_sandbox_of_what_is_built(path);
        }
    }),
    ("GET /sandboxes", |world| {
        for path in [
            "/sandboxes",
            "/v2/sandboxes",
            "/sandboxes?metadata=a%3Db",
            "/v2/sandboxes?metadata=a%3Db&state=running,paused&limit=1",
        ] {
            let reply = world.other("GET", path, None);
            assert_eq!((reply.status, reply.json()), (200, json!([])), "{path}");
            assert_eq!(reply.headers["x-total-running"], "0", "{path}");
            assert_eq!(reply.headers.get("x-next-token"), None, "{path}");
            let own = world.owner("GET", path, None);
            assert_eq!(own.json()[0]["sandboxID"], world.sandbox.as_str(), "{path}");
            assert_eq!(own.headers["x-total-running"], "1", "{path}");
        }
    }),
    ("GET /sandboxes/{id}", |world| world.hidden_sandbox("GET", "/sandboxes/{id}", None)),
    ("DELETE /sandboxes/{id}", |world| world.hidden_sandbox("DELETE", "/sandboxes/{id}", None)),
    ("POST /sandboxes/{id}/timeout", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/timeout", Some(json!({ "timeout": 0 })));
    }),
    ("POST /sandboxes/{id}/connect", |world| {
        let body = || Some(json!({ "timeout": 60 }));
        world.hidden_sandbox("POST", "/sandboxes/{id}/connect", body());
        world.hidden_sandbox("POST", "/v2/sandboxes/{id}/connect", body());
    }),
    ("POST /sandboxes/{id}/snapshots", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/snapshots", None);
    }),
    ("POST /sandboxes/{id}/rollback", |world| {
        let body = json!({ "snapshotID": world.snapshot });
        world.hidden_sandbox("POST", "/sandboxes/{id}/rollback", Some(body.clone()));
        // Nor does a sandbox of its own go back to what is another's.
        let made = world.other("POST", "/v2/sandboxes", Some(&json!({ "templateID": TEMPLATE })));
        let id = text(&made.json()["sandboxID"]);
        let path = format!("/sandboxes/{id}/rollback");
        world.hidden("POST", &path, Some(&body), &world.snapshot, NO_SNAPSHOT);
        assert_eq!(world.other("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
        let path = format!("/sandboxes/{}/rollback", world.sandbox);
        assert_eq!(world.owner("POST", &path, Some(&body)).status, 200);
    }),
    ("POST /sandboxes/{id}/pause", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/pause", None);
        let healthy = Some(json!({ "requireHealthyGuest": true }));
        world.hidden_sandbox("POST", "/sandboxes/{id}/pause", healthy);
    }),
    ("POST /sandboxes/{id}/resume", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/resume", None);
    }),
    ("POST /sandboxes/{id}/clone", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/clone", Some(json!({ "count": 2 })));
    }),
    ("POST /sandboxes/{id}/fork", |world| {
        world.hidden_sandbox("POST", "/sandboxes/{id}/fork", Some(json!({ "count": 2 })));
    }),
    ("GET /snapshots", |world| {
        let mine = format!("/snapshots?sandboxID={}", world.sandbox);
        for path in ["/snapshots", &mine, "/snapshots?name=mine"] {
            assert_eq!(world.other("GET", path, None).json(), json!([]), "{path}");
            let own = world.owner("GET", path, None).json();
            assert_eq!(own[0]["snapshotID"], world.snapshot.as_str(), "{path}");
        }
    }),
    ("GET /templates", |world| {
        let operators = world.owner("GET", &format!("/templates/{TEMPLATE}"), None).json();
        let operators = text(&operators["templateID"]);
        for path in ["/templates", "/v2/templates"] {
            let own = world.listed(&world.owner, path);
            assert!(own.contains(&operators) && own.contains(&world.built), "{path}: {own:?}");
            assert_eq!(
                world.listed(&world.other, path),
                std::slice::from_ref(&operators),
                "{path}"
            );
        }
    }),
    ("GET /openapi.json", |world| {
        assert_eq!(world.daemon.ask_as("", "GET", "/openapi.json", None).status, 200);
    }),
    ("GET /sandboxes/metrics", |world| {
        let path = format!("/sandboxes/metrics?sandbox_ids={}", world.sandbox);
        assert_eq!(world.other("GET", &path, None).json(), json!({ "sandboxes": {} }));
    }),
    ("GET /sandboxes/{id}/metrics", |world| {
        world.hidden_sandbox("GET", "/sandboxes/{id}/metrics", None);
    }),
    ("GET /sandboxes/{id}/logs", |world| {
        world.hidden_sandbox("GET", "/sandboxes/{id}/logs", None);
        world.hidden_sandbox("GET", "/v2/sandboxes/{id}/logs", None);
    }),
    ("POST /sandboxes/{id}/refreshes", |world| {
        let body = Some(json!({ "duration": 60 }));
        world.hidden_sandbox("POST", "/sandboxes/{id}/refreshes", body);
    }),
    ("PUT /sandboxes/{id}/network", |world| {
        let body = Some(json!({ "allowPublicTraffic": false }));
        world.hidden_sandbox("PUT", "/sandboxes/{id}/network", body);
    }),
    ("GET /default-templates", |world| {
        let (own, other) = ("/default-templates", "/default-templates");
        assert_eq!(world.owner("GET", own, None).json(), world.other("GET", other, None).json());
    }),
    ("GET /templates/{id}", |world| world.hidden_built("GET", "/templates/{id}", None, 200)),
    ("GET /templates/aliases/{alias}", |world| {
        world.hidden_built("GET", "/templates/aliases/{id}", None, 200);
        assert_eq!(world.other("GET", &format!("/templates/aliases/{TEMPLATE}"), None).status, 200);
    }),
    ("PATCH /templates/{id}", |world| {
        let body = || Some(json!({ "public": true }));
        world.hidden_build("PATCH", "/templates/{id}", body());
        world.hidden_build("PATCH", "/v2/templates/{id}", body());
    }),
    ("PUT /templates/{id}/alias", |world| {
        let body = json!({ "alias": BUILT });
        world.hidden_built("PUT", "/templates/{id}/alias", Some(&body), 200);
    }),
    ("POST /v3/templates", |world| {
        // Names are each tenant's own.
        let made = world.other("POST", "/v3/templates", Some(&json!({ "name": "owners-own" })));
        assert_eq!(made.status, 202, "{made:?}");
        assert_ne!(text(&made.json()["templateID"]), world.template);
    }),
    ("PUT /build-files/{token}", |world| {
        // Whoever has the link was given it; without one there is nothing to see.
        world.daemon.ask_as("", "PUT", "/build-files/00", None).error(404);
    }),
    ("GET /templates/{id}/files/{hash}", |world| {
        world.hidden_build("GET", "/templates/{id}/files/abc", None);
        let path = format!("/templates/{}/files/abc", world.template);
        assert_eq!(world.owner("GET", &path, None).status, 201);
    }),
    ("POST /v2/templates/{id}/builds/{buildID}", |world| {
        let body = Some(json!({ "fromTemplate": TEMPLATE }));
        world.hidden_build("POST", "/v2/templates/{id}/builds/{build}", body);
        world.nothing_is_built_on_what_is_built();
    }),
    ("GET /templates/{id}/builds/{buildID}/status", |world| {
        world.hidden_build("GET", "/templates/{id}/builds/{build}/status", None);
        let path = format!("/templates/{}/builds/{}/status", world.template, world.build);
        assert_eq!(world.owner("GET", &path, None).status, 200);
    }),
    ("GET /templates/{id}/builds/{buildID}/logs", |world| {
        world.hidden_build("GET", "/templates/{id}/builds/{build}/logs", None);
    }),
    ("POST /templates/tags", |world| {
        let body = json!({ "target": world.template, "tags": ["v1"] });
        world.hidden("POST", "/templates/tags", Some(&body), &world.template, NO_SNAPSHOT);
    }),
    ("DELETE /templates/tags", |world| {
        let body = json!({ "name": world.template, "tags": ["v1"] });
        world.hidden("DELETE", "/templates/tags", Some(&body), &world.template, NO_SNAPSHOT);
    }),
    ("GET /templates/{id}/tags", |world| world.hidden_build("GET", "/templates/{id}/tags", None)),
    ("GET /templates/{id}/tags/count", |world| {
        world.hidden_build("GET", "/templates/{id}/tags/count", None);
    }),
    ("GET /templates/{id}/tags/exists", |world| {
        world.hidden_build("GET", "/templates/{id}/tags/exists?tag=v1", None);
    }),
    ("GET /templates/{id}/tags/groups", |world| {
        world.hidden_built("GET", "/templates/{id}/tags/groups", None, 200);
    }),
    ("GET /templates/{id}/tags/{tag}/assignments", |world| {
        world.hidden_built("GET", "/templates/{id}/tags/default/assignments", None, 200);
    }),
    ("DELETE /templates/{id}", |world| {
        world.hidden_build("DELETE", "/templates/{id}", None);
        let path = format!("/templates/{}", world.snapshot);
        world.hidden("DELETE", &path, None, &world.snapshot, NO_SNAPSHOT);
        assert_eq!(world.owner("DELETE", &path, None).status, 204);
    }),
];

/// The endpoints of the route table that this host offers. What is there on both versions is one row.
fn route_table() -> BTreeSet<String> {
    let source = include_str!("../../http/src/route.rs");
    let (_, rest) = source.split_once("pub static ENDPOINTS").expect("the table");
    let (table, _) = rest.split_once("];").expect("its end");
    let offered = table.split("at(Method::").skip(1).filter(|row| !row.contains("NotOffered"));
    let endpoints: BTreeSet<String> = offered
        .map(|row| {
            let (method, rest) = row.split_once(", \"").expect("a method");
            let (path, _) = rest.split_once('"').expect("a path");
            let path = path.replace("{sandboxID}", "{id}").replace("{templateID}", "{id}");
            format!("{method} {path}")
        })
        .collect();
    let of_v1 = |endpoint: &String| {
        let plain = endpoint.replace(" /v2/", " /");
        if endpoints.contains(&plain) { plain } else { endpoint.clone() }
    };
    endpoints.iter().map(of_v1).collect()
}

#[test]
fn every_endpoint_has_a_row() {
    let rows: BTreeSet<String> = ROWS.iter().map(|(endpoint, _)| (*endpoint).to_owned()).collect();
    assert_eq!(rows.len(), ROWS.len(), "one row each");
    let table = route_table();
    assert!(table.contains("POST /sandboxes/{id}/fork"), "the table is not found: {table:?}");
    assert_eq!(rows, table, "left: the rows here; right: the endpoints of http/src/route.rs");
}

#[test]
fn what_is_anothers_does_not_exist() {
    let world = World::new();
    for (endpoint, show) in ROWS {
        eprintln!("{endpoint}");
        show(&world);
    }
}

/// Public is for everybody to use, and for its owner alone to change.
#[test]
fn a_public_template_is_not_there_for_others_to_change() {
    let world = World::new();
    let id = &world.template;
    // The body of an update may be absent, and then it changes nothing.
    let path = format!("/templates/{id}");
    let same = world.owner("PATCH", &path, None);
    assert_eq!((same.status, same.json()), (200, json!({ "names": ["owner/owners-own"] })));
    let public = world.owner("PATCH", &path, Some(&json!({ "public": true })));
    assert_eq!(public.status, 200, "{public:?}");
    for path in ["/templates/owner%2Fowners-own/tags", &format!("{path}/tags")] {
        assert_eq!(world.other("GET", path, None).status, 200, "it may be used: {path}");
    }
    let no = || Some(json!({ "public": false }));
    for (method, path, body) in [
        ("PATCH", "/templates/{id}", no()),
        ("PATCH", "/v2/templates/{id}", no()),
        ("PATCH", "/templates/{id}", None),
        ("PUT", "/templates/{id}/alias", Some(json!({ "alias": "x" }))),
        ("DELETE", "/templates/{id}", None),
        ("POST", "/templates/tags", Some(json!({ "target": id, "tags": ["v1"] }))),
        ("DELETE", "/templates/tags", Some(json!({ "name": id, "tags": ["v1"] }))),
    ] {
        world.hidden_build(method, path, body);
    }
    // Nor does the name of another's stand for one of the same name that the caller has.
    let made = world.other("POST", "/v3/templates", Some(&json!({ "name": "owners-own" })));
    assert_eq!(made.status, 202, "{made:?}");
    let body = json!({ "target": "owner/owners-own", "tags": ["v1"] });
    for method in ["POST", "DELETE"] {
        let path = "/templates/tags";
        world.hidden(method, path, Some(&body), "owner/owners-own", "owner/nobodys-own");
    }
    let name = "/templates/owner%2Fowners-own";
    world.hidden("DELETE", name, None, "owners-own", "nobodys-own");
    world.hidden("PATCH", name, no().as_ref(), "owners-own", "nobodys-own");
    assert_eq!(world.owner("GET", &format!("{path}/tags"), None).status, 200, "it is as it was");
}

#[test]
fn two_keys_of_a_tenant_see_the_same() {
    let daemon = Daemon::start();
    let (a, b) = (daemon.make_key(&["--tenant", "t"]), daemon.make_key(&["--tenant", "t"]));
    let made = daemon.ask_as(&a, "POST", "/v2/sandboxes", Some(&json!({ "templateID": TEMPLATE })));
    let id = text(&made.json()["sandboxID"]);
    assert_eq!(daemon.ask_as(&b, "GET", &format!("/sandboxes/{id}"), None).status, 200);
    daemon.get(&id).error(404);
    assert_eq!(daemon.ask_as(&b, "DELETE", &format!("/sandboxes/{id}"), None).status, 204);
}

/// What a paused sandbox waits in is nobody's to start from, not its owner's either; and whose a
/// sandbox is outlives the daemon, while it runs and while it is paused.
#[test]
fn pauses_are_started_from_by_nobody_and_tenants_outlive_the_daemon() {
    let mut world = World::new();
    let before = world.daemon.snapshot_directories();
    let body = json!({ "templateID": TEMPLATE, "timeout": 300 });
    let paused = world.owner("POST", "/v2/sandboxes", Some(&body)).json();
    let paused = text(&paused["sandboxID"]);
    let path = format!("/sandboxes/{paused}/pause");
    assert_eq!(world.owner("POST", &path, None).status, 204);
    let after = world.daemon.snapshot_directories();
    let [pause] = after.difference(&before).collect::<Vec<_>>()[..] else { panic!("{after:?}") };
    let check = |world: &World| {
        for key in [&world.owner, &world.other, world.daemon.key()] {
            let body = json!({ "templateID": pause });
            let reply = world.daemon.ask_as(key, "POST", "/v2/sandboxes", Some(&body));
            assert!(reply.error(404).contains("neither a template nor a snapshot"), "{reply:?}");
        }
        for id in [&paused, &world.sandbox] {
            world.other("GET", &format!("/sandboxes/{id}"), None).error(404);
            assert_eq!(world.owner("GET", &format!("/sandboxes/{id}"), None).status, 200);
        }
    };
    check(&world);
    world.daemon.crash();
    world.daemon.restart();
    check(&world);
    let (path, body) = (format!("/sandboxes/{paused}/connect"), json!({ "timeout": 60 }));
    // The daemon may still be taking it over.
    let resumed = patiently(|| world.owner("POST", &path, Some(&body)));
    assert_eq!(resumed.status, 201, "{resumed:?}");
}
