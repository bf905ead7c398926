//! Two tenants on one host: what is the one's does not exist for the other.
//!
//! One row for each endpoint, and a check that there is one: a new endpoint without a row here fails.

use std::collections::BTreeSet;

use serde_json::json;

use crate::daemon::{Daemon, patiently};
use crate::template::TEMPLATE;
use crate::two_tenants::{BUILT, NO_SNAPSHOT, World, text};

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
            // Also the one of which no build is done.
            for id in [&operators, &world.built, &world.template] {
                assert!(own.contains(id), "{path}: {own:?}");
            }
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
    ("GET /templates/{id}", |world| {
        world.hidden_built("GET", "/templates/{id}", None, 200);
        world.hidden_build("GET", "/templates/{id}", None);
    }),
    ("GET /templates/aliases/{alias}", |world| {
        world.hidden_built("GET", "/templates/aliases/{id}", None, 200);
        world.hidden_build("GET", "/templates/aliases/{id}", None);
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
    // What is wrong with a body is said before whose the template is.
    let (update, alias) = (format!("/templates/{id}"), format!("/templates/{id}/alias"));
    world.other("PATCH", &update, Some(&json!({ "public": 7 }))).error(400);
    world.other("PUT", &alias, Some(&json!({ "alias": 7 }))).error(400);
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
