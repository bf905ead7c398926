//! The daemon against its own OpenAPI document: whatever that says may be asked is asked, and every
//! answer is one that it says may come.
//!
//! Needs Python with `venv`, and the packages of `tests/python/schemathesis.txt`, which
//! `tools/python-env` fetches once. What is asked is derived from the document alone, so that a failure comes again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::daemon::Daemon;
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
        .current_dir(&directory);
    for operation in without {
        command.args(["--exclude-operation-id", operation]);
    }
    let ran = command.output().expect("schemathesis");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    drop(fs::remove_dir_all(&directory));
    let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{name}: {}\n{said}\n{complaint}", ran.status);
    daemon.healthy();
}

/// Each takes as long as it is told, up to a minute.
const PROFILES: [&str; 2] = ["get_debug_pprof_profile", "get_debug_flamegraph"];

#[test]
fn every_answer_is_one_that_the_document_declares() {
    let daemon = Daemon::start_with(&["--sandboxes-max", "4000", "--pool-max", "2"]);
    let document = daemon.ask("GET", "/openapi.json", None);
    assert_eq!((document.status, &document.json()["openapi"]), (200, &json!("3.1.0")));

    // One that is there: what would end it or copy it a thousand times is asked of others.
    let body = json!({ "templateID": TEMPLATE, "timeout": -1 });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    let id = created.json()["sandboxID"].as_str().expect("an id").to_owned();
    let there = format!("\"path.sandboxID\" = \"{id}\"");
    let ending = [
        "delete_sandboxes_sandboxid",
        "post_sandboxes_sandboxid_timeout",
        "post_sandboxes_sandboxid_clone",
        "post_sandboxes_sandboxid_fork",
        PROFILES[0],
        PROFILES[1],
    ];
    ask_everything(&daemon, "there", &there, "coverage,fuzzing", &ending);
    assert_eq!(daemon.get(&id).status, 200, "it was not ended");

    ask_everything(&daemon, "anything", "", "fuzzing", &PROFILES);
}
