//! Other names for templates that clients built: what changes with them, and what does not.
//!
//! The stand-in VM runs the real agent here, as in [`crate::builds`].

use serde_json::{Value, json};

use crate::builds::{announce, build, create, daemon, run, status};

#[test]
fn a_built_template_takes_another_name_and_keeps_all_else() {
    let (daemon, _) = daemon(&[]);
    let ((template, build), done) = build(&daemon, "before", &json!([run("true")]));
    assert_eq!(done["status"], "ready", "{done}");
    let other = announce(&daemon, "other").0;
    let rename = |id: &str, alias: Value| {
        let body = json!({ "alias": alias });
        daemon.ask("PUT", &format!("/templates/{id}/alias"), Some(&body))
    };
    let said = json!({ "templateID": template, "public": false });
    for (id, alias) in [("before", "after"), ("after", "default/after"), (&template, "after")] {
        let renamed = rename(id, json!(alias));
        assert_eq!((renamed.status, renamed.json()), (200, said.clone()), "{id}: {renamed:?}");
    }
    assert_eq!(create(&daemon, "after").json()["templateID"], json!(template));
    create(&daemon, "before").error(404);
    let tags = daemon.ask("GET", "/templates/after/tags", None).json();
    assert_eq!((&tags[0]["tag"], &tags[0]["buildID"]), (&json!("default"), &json!(build)));
    assert_eq!(status(&daemon, &(template.clone(), build.clone()))["status"], "ready");
    assert!(rename(&template, json!("other")).error(409).contains("another template of yours"));
    assert!(rename(&template, json!("base")).error(409).contains("operator"));
    assert!(rename(&template, json!("a b")).error(400).contains("`alias`"));
    assert!(rename(&template, Value::Null).error(400).contains("`alias`"));
    assert!(rename("base", json!("mine")).error(403).contains("operator"));
    rename("nope", json!("mine")).error(404);
    // The name is free again, for another template.
    assert_eq!(rename(&other, json!("before")).status, 200);
    assert_ne!(announce(&daemon, "other").0, other);
}
