//! A host with two tenants, what they have, and what each sees of it.
//!
//! Used by the tests of tenants beside it. Refuses nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, NO_POOL, eventually};
use crate::template::TEMPLATE;

pub const NOBODY: &str = "i00000000000000000000";
pub const NO_SNAPSHOT: &str = "00000000000000000000";
/// The name of the template that the first tenant built, and one that nobody has.
pub const BUILT: &str = "owners-built";
pub const NOT_BUILT: &str = "nobodys-built";

/// A host with two tenants. The first has sandboxes, a snapshot, a template that it built, and one that it
/// builds.
pub struct World {
    pub daemon: Daemon,
    pub owner: String,
    pub other: String,
    pub sandbox: String,
    pub snapshot: String,
    /// One that is announced, and a build of it.
    pub template: String,
    pub build: String,
    /// One whose build is done, and which is not public: its owner can use it.
    pub built: String,
}

impl World {
    /// Builds need the real agent, and VM processes that wait would have another.
    pub fn new() -> Self {
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
    pub fn build(&self, key: &str, name: &str, base: &str) -> (String, Value) {
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

    pub fn owner(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.daemon.ask_as(&self.owner, method, path, body)
    }

    pub fn other(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.daemon.ask_as(&self.other, method, path, body)
    }

    /// A request by the other tenant that names something of the owner's: the answer must be, to the
    /// byte, the one for what does not exist.
    pub fn hidden(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        found: &str,
        missing: &str,
    ) {
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
    pub fn hidden_sandbox(&self, method: &str, path: &str, body: Option<Value>) {
        let path = path.replace("{id}", &self.sandbox);
        self.hidden(method, &path, body.as_ref(), &self.sandbox, NOBODY);
        let got = self.owner("GET", &format!("/sandboxes/{}", self.sandbox), None).json();
        assert_eq!(got["state"], "running", "{method} {path} did something");
    }
}

/// What the owner sees, and the other does not.
impl World {
    /// A path that is there for the operator, and for nobody else.
    pub fn operators_alone(&self, path: &str) {
        self.daemon.ask_as("", "GET", path, None).error(401);
        assert_eq!(self.daemon.ask("GET", path, None).status, 200, "{path}");
        let said = self.other("GET", path, None).error(404);
        let missing = self.other("GET", "/nothing", None).error(404);
        let path = path.split('?').next().unwrap_or_default();
        assert_eq!(said.replace(path, "/nothing"), missing);
    }

    /// A request about the owner's template, under the ids in `path` where it says `{id}` and `{build}`.
    pub fn hidden_build(&self, method: &str, path: &str, body: Option<Value>) {
        let path = path.replace("{id}", &self.template).replace("{build}", &self.build);
        self.hidden(method, &path, body.as_ref(), &self.template, NO_SNAPSHOT);
    }
}

/// What the first tenant built.
impl World {
    /// A request about it, by id and by name where `path` and `body` say `{id}`. Its owner gets this
    /// status, so that the other's 404 is about whose it is.
    pub fn hidden_built(&self, method: &str, path: &str, body: Option<&Value>, owners: u16) {
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
    pub fn no_sandbox_of_what_is_built(&self, path: &str) {
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
    pub fn nothing_is_built_on_what_is_built(&self) {
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
    pub fn listed(&self, key: &str, path: &str) -> Vec<String> {
        let reply = self.daemon.ask_as(key, "GET", path, None);
        assert_eq!(reply.status, 200, "{reply:?}");
        let entries = reply.json();
        entries.as_array().expect("a list").iter().map(|entry| text(&entry["templateID"])).collect()
    }
}

pub fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}
