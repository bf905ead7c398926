//! What lists show of templates that clients build, from the moment a build is announced.
//!
//! With the real agent as a plain process, as in `builds`.

use serde_json::json;

use crate::builds::{announce, create, daemon, once, run, start};

#[test]
fn a_template_is_listed_with_its_builds_from_the_first_on() {
    let (daemon, _) = daemon(&[]);
    let first = announce(&daemon, "app");
    let ask = |path: &str| daemon.ask("GET", path, None);
    let listed = |path: &str| {
        let all = ask(path).json();
        let entries = all.as_array().expect("a list").iter();
        let own: Vec<_> = entries.filter(|entry| entry["templateID"] == first.0.as_str()).collect();
        assert_eq!(own.len(), 1, "{path}: {all}");
        own[0].clone()
    };
    let is = |status: &str, word: &str, build: &str| {
        let one = ask("/templates/app").json();
        for entry in [listed("/templates"), listed("/v2/templates"), one] {
            assert_eq!((&entry["buildStatus"], &entry["status"]), (&json!(status), &json!(word)));
            assert_eq!((&entry["buildID"], &entry["names"]), (&json!(build), &json!(["app"])));
        }
        let alias = ask("/templates/aliases/app");
        assert_eq!(alias.json(), json!({ "templateID": first.0, "public": false }));
    };
    is("waiting", "BUILDING", &first.1);
    create(&daemon, "app").error(404);
    let body = |command| json!({ "fromTemplate": "base", "steps": [run(command)] });
    start(&daemon, &first, &body("exit 3"));
    once(&daemon, &first, &["error"]);
    is("error", "FAILED", &first.1);
    let second = announce(&daemon, "app");
    is("waiting", "BUILDING", &second.1);
    start(&daemon, &second, &body("true"));
    once(&daemon, &second, &["ready"]);
    is("ready", "READY", &second.1);
    // One that goes on beside what can be used is among the builds alone.
    let third = announce(&daemon, "app");
    is("ready", "READY", &second.1);
    let one = ask("/templates/app").json();
    let builds: Vec<_> = one["builds"].as_array().expect("builds").iter().collect();
    let shown: Vec<_> = builds.iter().map(|build| (&build["buildID"], &build["status"])).collect();
    let expected = [(&third.1, "waiting"), (&second.1, "ready"), (&first.1, "error")];
    let expected = expected.map(|(id, status)| (json!(id), json!(status)));
    assert_eq!(shown, expected.each_ref().map(|(id, status)| (id, status)));
    let has = |at: usize, field: &str| builds[at].get(field).is_some();
    assert_eq!(
        [has(0, "finishedAt"), has(1, "finishedAt"), has(2, "finishedAt")],
        [false, true, true]
    );
    assert_eq!([has(0, "envdVersion"), has(1, "envdVersion")], [false, true]);
    assert_eq!(builds[1]["memoryMB"], one["memoryMB"]);
    let page = ask("/templates/app?limit=2");
    assert_eq!(page.json()["builds"].as_array().map(Vec::len), Some(2));
    let rest = ask(&format!("/templates/app?nextToken={}", page.headers["x-next-token"]));
    assert_eq!(rest.json()["builds"], json!([builds[2]]));
    assert!(!rest.headers.contains_key("x-next-token"));
    assert!(ask("/templates/app?nextToken=x").error(400).contains("nextToken"));
}
