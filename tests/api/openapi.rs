//! The daemon against its own OpenAPI document: whatever that says may be asked is asked, and every
//! answer is one that it says may come.
//!
//! Needs Python with `venv`, and the packages of `tests/python/schemathesis.txt`, which
//! `tools/python-env` fetches once. What is asked is derived from the document alone, so that a failure comes again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::builds;
use crate::daemon::{Daemon, NO_POOL};
use crate::template::TEMPLATE;

/// What is looked for in every answer.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance,\
                      unsupported_method,ignored_auth";

/// Cases of each endpoint, beside those at the edges of what it takes.
const CASES_MAX: &str = "8";

/// Seconds that one run may take before it is ended.
const RUN_SECONDS_MAX: &str = "240";

fn schemathesis() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = Command::new(root.join("tools/python-env"))
        .arg("tests/python/schemathesis.txt")
        .stderr(Stdio::inherit())
        .output()
        .expect("tools/python-env");
    assert!(made.status.success(), "tools/python-env ended with {}", made.status);
    let env = String::from_utf8(made.stdout).expect("a path");
    PathBuf::from(env.trim()).join("bin/schemathesis")
}

/// Asks everything but what `without` names, with these values for parameters.
fn ask_everything(daemon: &Daemon, name: &str, parameters: &str, phases: &str, without: &[&str]) {
    let chosen: Vec<&str> = without.iter().flat_map(|id| ["--exclude-operation-id", id]).collect();
    ask_for(daemon, name, parameters, phases, &chosen);
}

/// Asks what `chosen` chooses.
fn ask_for(daemon: &Daemon, name: &str, parameters: &str, phases: &str, chosen: &[&str]) {
    let directory =
        std::env::temp_dir().join(format!("mica-openapi-{}-{name}", std::process::id()));
    fs::create_dir_all(&directory).expect("a directory");
    let config = directory.join("schemathesis.toml");
    let text = format!(
        "[output.truncation]\nenabled = false\n[parameters]\n{parameters}\n[auth.openapi.ApiKey]\n\
         api_key = \"{}\"\n",
        daemon.key()
    );
    fs::write(&config, text).expect("a file");
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after", "5", RUN_SECONDS_MAX])
        .arg(schemathesis())
        .arg("--config-file")
        .arg(&config)
        .args(["run", &format!("{}/openapi.json", daemon.url())])
        .args(["--checks", CHECKS, "--phases", phases])
        .args(["--max-examples", CASES_MAX, "--generation-deterministic"])
        .args(["--exclude-tag", "not offered", "--no-color", "--warnings", "off"])
        .args(["--suppress-health-check", "all", "--no-shrink"])
        .args(chosen)
        .current_dir(&directory);
    let ran = command.output().expect("schemathesis");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    drop(fs::remove_dir_all(&directory));
    let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{name}: {}\n{said}\n{complaint}", ran.status);
    daemon.healthy();
}

/// Each takes as long as it is told, up to a minute.
const PROFILES: [&str; 2] = ["get_debug_pprof_profile", "get_debug_flamegraph"];

/// What must have succeeded when it was asked of what is there: its answer was checked then.
const SUCCEED: [(&str, &str); 22] = [
    ("GET", "/health"),
    ("GET", "/sandboxes"),
    ("GET", "/sandboxes/{sandboxID}"),
    ("GET", "/sandboxes/{sandboxID}/logs"),
    ("GET", "/sandboxes/{sandboxID}/metrics"),
    ("POST", "/sandboxes/{sandboxID}/connect"),
    ("GET", "/templates"),
    ("GET", "/templates/{templateID}"),
    ("PATCH", "/templates/{templateID}"),
    ("GET", "/templates/aliases/{alias}"),
    ("POST", "/v3/templates"),
    ("POST", "/v2/templates/{templateID}/builds/{buildID}"),
    ("GET", "/templates/{templateID}/builds/{buildID}/status"),
    ("GET", "/templates/{templateID}/builds/{buildID}/logs"),
    ("GET", "/templates/{templateID}/files/{hash}"),
    ("PUT", "/build-files/{token}"),
    ("GET", "/templates/{templateID}/tags"),
    ("GET", "/templates/{templateID}/tags/count"),
    ("GET", "/templates/{templateID}/tags/exists"),
    ("GET", "/templates/{templateID}/tags/groups"),
    ("GET", "/templates/{templateID}/tags/{tag}/assignments"),
    ("GET", "/sandboxes/metrics"),
];

/// Fails where one was never answered with a 2xx.
fn succeeded(daemon: &Daemon, operations: &[(&str, &str)]) {
    let metrics = daemon.ask("GET", "/metrics", None);
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    for (method, route) in operations {
        let labels =
            [format!("method=\"{method}\""), format!("route=\"{route}\""), "status=\"2xx\"".into()];
        let counts = metrics.lines().filter(|line| {
            line.starts_with("mica_http_requests_total{")
                && labels.iter().all(|label| line.contains(label))
        });
        let counts = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        assert!(counts.sum::<f64>() > 0.0, "{method} {route} never succeeded");
    }
}

fn sandbox(daemon: &Daemon) -> String {
    let body = json!({ "templateID": TEMPLATE, "timeout": -1 });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    created.json()["sandboxID"].as_str().expect("an id").to_owned()
}

/// Builds a template with the real agent, in a daemon that has the stand-in's otherwise.
fn built(daemon: &Daemon, name: &str) -> String {
    daemon.use_guest_agent();
    let ((template, _), done) = builds::build(daemon, name, &json!([]));
    assert_eq!(done["status"], "ready", "{done}");
    daemon.change_vm_options("");
    template
}

/// Ids that are there, as schemathesis takes them: a template with a tag, another build of it that may be
/// started once, and a link that takes one file.
fn parameters(daemon: &Daemon, sandbox: &str) -> String {
    let template = built(daemon, "there");
    let (of, build) = builds::announce(daemon, "there");
    assert_eq!(of, template, "a name is one template");
    let link = builds::link(daemon, &template, "aa").expect("a link");
    let token = link.rsplit('/').next().expect("a token");
    [
        ("sandboxID", sandbox),
        ("templateID", &template),
        ("buildID", &build),
        ("alias", "there"),
        ("tag", "default"),
        ("hash", "bb"),
        ("token", token),
    ]
    .map(|(name, value)| format!("\"path.{name}\" = \"{value}\""))
    .join("\n")
}

#[test]
fn every_answer_is_one_that_the_document_declares() {
    let daemon = Daemon::start_with(&[&NO_POOL[..], &["--sandboxes-max", "4000"]].concat());
    let document = daemon.ask("GET", "/openapi.json", None);
    assert_eq!((document.status, &document.json()["openapi"]), (200, &json!("3.1.0")));

    // What would end it or copy it a thousand times is asked of others.
    let id = sandbox(&daemon);
    let there = parameters(&daemon, &id);
    let ending = [
        "delete_sandboxes_sandboxid",
        "post_sandboxes_sandboxid_timeout",
        "delete_templates_templateid",
        "post_sandboxes_sandboxid_clone",
        "post_sandboxes_sandboxid_fork",
        PROFILES[0],
        PROFILES[1],
    ];
    ask_everything(&daemon, "there", &there, "coverage,fuzzing", &ending);
    assert_eq!(daemon.get(&id).status, 200, "it was not ended");
    succeeded(&daemon, &SUCCEED);

    // Each has something of its own to end.
    for operation in &ending[..2] {
        let spare = format!("\"path.sandboxID\" = \"{}\"", sandbox(&daemon));
        ask_for(&daemon, operation, &spare, "coverage", &["--include-operation-id", operation]);
    }
    let spare = format!("\"path.templateID\" = \"{}\"", built(&daemon, "spare"));
    ask_for(&daemon, "template", &spare, "coverage", &["--include-operation-id", ending[2]]);
    succeeded(
        &daemon,
        &[
            ("DELETE", "/sandboxes/{sandboxID}"),
            ("POST", "/sandboxes/{sandboxID}/timeout"),
            ("DELETE", "/templates/{templateID}"),
        ],
    );

    ask_everything(&daemon, "anything", "", "fuzzing", &PROFILES);
}
