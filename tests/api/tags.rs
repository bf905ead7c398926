//! Tags of built templates: they move, keep builds, and are shown with what they stand for.
//!
//! Builds as [`crate::builds`] does, with the real agent in the stand-in VM.

use serde_json::{Value, json};

use crate::builds::{announce, build, create, daemon, once, run, start, step};
use crate::daemon::Daemon;

#[test]
fn tags_move_and_templates_build_on_templates() {
    let (daemon, site) = daemon(&[]);
    let before = daemon.snapshots_kept();
    let ((template, first), done) = build(&daemon, "app", &json!([step("ENV", &["A", "1"])]));
    assert_eq!(done["status"], "ready", "{done}");
    let tag = |target: &str, tags: &[&str]| {
        daemon.ask("POST", "/templates/tags", Some(&json!({ "target": target, "tags": tags })))
    };
    let tagged = tag("app:default", &["v1", "old"]);
    assert_eq!((tagged.status, &tagged.json()["buildID"]), (201, &json!(first)));
    // Built on itself: what the base says holds, and the first build stays, for tags stand for it.
    let second = announce(&daemon, "app");
    let file = site.join("seen");
    let steps = json!([step("ENV", &["B", "2"]), run(&format!("echo $A$B > {}", file.display()))]);
    start(&daemon, &second, &json!({ "fromTemplate": "app:v1", "steps": steps }));
    assert_eq!(once(&daemon, &second, &["ready"])["status"], "ready");
    assert_eq!(std::fs::read_to_string(&file).expect("a file"), "12\n");
    assert_eq!(daemon.snapshots_kept(), before + 2);

    let tags = daemon.ask("GET", &format!("/templates/{template}/tags"), None).json();
    let mut tags: Vec<_> = tags.as_array().expect("tags").iter().collect();
    tags.sort_by_key(|tag| tag["tag"].as_str());
    let names: Vec<_> = tags.iter().map(|tag| (&tag["tag"], &tag["buildID"])).collect();
    let (d, o, v) = (json!("default"), json!("old"), json!("v1"));
    let (one, two) = (json!(first), json!(second.1));
    assert_eq!(names, [(&d, &two), (&o, &one), (&v, &one)]);
    tags_are_shown_with_their_builds(&daemon, &template, (&first, &second.1));
    let remove = |body: Value| daemon.ask("DELETE", "/templates/tags", Some(&body));
    remove(json!({ "name": "app", "tags": ["default"] })).error(400);
    remove(json!({ "name": "app", "tags": ["none"] })).error(404);
    assert_eq!(remove(json!({ "name": "app", "tags": ["old", "v1"] })).status, 204);
    assert_eq!(daemon.snapshots_kept(), before + 1, "the first build is nobody's now");
    tag("app:v1", &["x"]).error(404);
    let exists = |tag: &str| {
        let path = format!("/templates/app/tags/exists?tag={tag}");
        daemon.ask("GET", &path, None).json()["exists"].clone()
    };
    assert_eq!((exists("default"), exists("v1")), (json!(true), json!(false)));
}

#[test]
fn what_is_made_of_a_template_is_counted_and_a_snapshot_beside_it_is_deleted_alone() {
    let (daemon, _) = daemon(&[]);
    let ((template, _), done) = build(&daemon, "app", &json!([run("true")]));
    assert_eq!(done["status"], "ready", "{done}");
    let path = format!("/templates/{template}");
    let shown = || {
        let listed = daemon.ask("GET", "/templates", None).json();
        let mut listed = listed.as_array().expect("a list").iter();
        let listed = listed.find(|entry| entry["templateID"] == *template).expect("it").clone();
        let mut one = daemon.ask("GET", &path, None).json();
        one.as_object_mut().expect("an object").remove("builds");
        assert_eq!(one, listed);
        listed
    };
    let fresh = shown();
    assert_eq!((&fresh["spawnCount"], &fresh["lastSpawnedAt"]), (&json!(0), &Value::Null));
    assert_eq!((&fresh["buildCount"], &fresh["status"]), (&json!(1), &json!("READY")));
    let made = create(&daemon, "app").json();
    let sandbox = made["sandboxID"].as_str().expect("an id");
    let (_, done) = build(&daemon, "app", &json!([run("true")]));
    assert_eq!(done["status"], "ready", "{done}");
    let used = shown();
    assert_eq!((&used["spawnCount"], &used["buildCount"]), (&json!(1), &json!(2)));
    assert!(used["lastSpawnedAt"].is_string(), "{used}");

    let named = daemon.act_with(sandbox, "snapshots", &json!({ "name": "app:v9" }));
    assert_eq!(named.json()["names"], json!(["default/app:v9"]), "{named:?}");
    let delete = || daemon.ask("DELETE", "/templates/default%2Fapp%3Av9", None);
    assert_eq!(delete().status, 204);
    assert_eq!(daemon.ask("GET", "/snapshots", None).json(), json!([]));
    // Who asks again must not have the template deleted.
    delete().error(404);
    assert_eq!(shown(), used);
}

/// `default` stands for the second build, `old` and `v1` for the first.
fn tags_are_shown_with_their_builds(daemon: &Daemon, id: &str, (first, second): (&str, &str)) {
    let ask = |path: &str| daemon.ask("GET", &format!("/templates/{id}/tags/{path}"), None);
    let groups = ask("groups").json();
    assert_eq!(groups["nextCursor"], Value::Null);
    assert_eq!(groups["tags"][0]["tag"], "default", "the one that moved last is first: {groups}");
    for group in groups["tags"].as_array().expect("groups") {
        let tag = group["tag"].as_str().expect("a tag");
        assert_eq!(group["hasMore"], false, "{group}");
        let [one] = &group["assignments"].as_array().expect("a list")[..] else {
            panic!("{group}")
        };
        assert_eq!(one["buildId"], if tag == "default" { second } else { first }, "{group}");
        assert_eq!(one["assignmentId"].as_str().expect("an id").len(), 36, "a UUID: {one}");
        let time = |field: &str| one[field].as_str().expect("a time").to_owned();
        assert!(time("buildCreatedAt") <= time("buildFinishedAt"), "{one}");
        assert!(time("buildFinishedAt") <= time("assignedAt"), "{one}");
        let alone = ask(&format!("{}/assignments", tag.to_ascii_uppercase())).json();
        assert_eq!(alone, json!({ "data": [one], "nextCursor": null }));
    }
    let names = |query: &str| {
        let said = ask(&format!("groups?{query}")).json();
        let tags = said["tags"].as_array().expect("groups").clone();
        tags.iter()
            .map(|group| group["tag"].as_str().expect("a tag").to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names("sort=name_asc"), ["default", "old", "v1"]);
    assert_eq!(names("sort=name_desc"), ["v1", "old", "default"]);
    assert_eq!(names("sort=latest_asc")[2], "default");
    assert_eq!(names("search=L&sort=name_asc"), ["default", "old"]);
    assert!(ask("groups?sort=x").error(400).contains("`name_asc`"));
    assert_eq!(ask("none/assignments").json(), json!({ "data": [], "nextCursor": null }));
}
