//! Templates built by clients: the requests of `Template.build`, as the SDK sends them, and what is left.
//!
//! The stand-in VM runs the real agent as a plain process here, so that steps really run, as root, in a
//! directory of the test's own. What a snapshot keeps of a guest's memory the stand-in cannot show.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{PATIENCE, Reply};
use crate::daemon::{Daemon, NO_POOL, eventually};
use crate::required;

/// A daemon whose sandboxes have the real agent, and a directory for what steps write.
pub fn daemon(options: &[&str]) -> (Daemon, PathBuf) {
    let options: Vec<&str> = NO_POOL.iter().chain(options).copied().collect();
    let daemon = Daemon::start_with(&options);
    daemon.use_guest_agent();
    let site = daemon.directory().join("site");
    std::fs::create_dir(&site).expect("a directory");
    (daemon, site)
}

pub fn announce(daemon: &Daemon, name: &str) -> (String, String) {
    let reply = daemon.ask("POST", "/v3/templates", Some(&json!({ "name": name })));
    assert_eq!(reply.status, 202, "{reply:?}");
    let text = |field: &str| reply.json()[field].as_str().expect("a text").to_owned();
    (text("templateID"), text("buildID"))
}

pub fn start(daemon: &Daemon, (template, build): &(String, String), body: &Value) {
    let reply = daemon.ask("POST", &format!("/v2/templates/{template}/builds/{build}"), Some(body));
    assert_eq!((reply.status, reply.body.len()), (202, 0), "{reply:?}");
}

pub fn status(daemon: &Daemon, (template, build): &(String, String)) -> Value {
    let path = format!("/templates/{template}/builds/{build}/status?logsOffset=0&limit=100");
    let reply = daemon.ask("GET", &path, None);
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

/// The status once it is one of these.
pub fn once(daemon: &Daemon, build: &(String, String), wanted: &[&str]) -> Value {
    let deadline = Instant::now() + 4 * PATIENCE;
    loop {
        let status = status(daemon, build);
        let now = status["status"].as_str().expect("a status").to_owned();
        if wanted.contains(&now.as_str()) {
            return status;
        }
        assert!(Instant::now() < deadline, "not {wanted:?}: {status}");
        assert!(!matches!(now.as_str(), "ready" | "error"), "not {wanted:?}: {status}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Builds a template of these steps, to its end.
pub fn build(daemon: &Daemon, name: &str, steps: &Value) -> ((String, String), Value) {
    let build = announce(daemon, name);
    start(daemon, &build, &json!({ "fromTemplate": "base", "steps": steps, "force": false }));
    let status = once(daemon, &build, &["ready", "error"]);
    (build, status)
}

pub fn run(command: &str) -> Value {
    json!({ "type": "RUN", "args": [command], "force": false })
}

pub fn step(kind: &str, args: &[&str]) -> Value {
    json!({ "type": kind, "args": args, "force": false })
}

pub fn create(daemon: &Daemon, template: &str) -> Reply {
    daemon.ask("POST", "/v2/sandboxes", Some(&json!({ "templateID": template, "timeout": 300 })))
}

pub fn messages(status: &Value) -> Vec<String> {
    let entries = status["logEntries"].as_array().expect("entries");
    entries.iter().map(|entry| entry["message"].as_str().expect("a message").to_owned()).collect()
}

/// Nothing of builds is left that runs or that only they need.
pub fn nothing_runs(daemon: &Daemon) {
    eventually("no sandbox is left", || {
        std::fs::read_dir(daemon.directory().join("store/sandboxes")).expect("a list").count() == 0
    });
}

/// An archive as the SDK makes it, of files with their paths in it.
fn archive(directory: &Path, files: &[(&str, &str)]) -> Vec<u8> {
    let context = directory.join("context");
    std::fs::create_dir_all(&context).expect("a directory");
    let mut tar = Command::new("tar");
    tar.arg("-czf").arg(directory.join("archive")).arg("-C").arg(&context);
    for (path, content) in files {
        let file = context.join(path);
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("a directory");
        std::fs::write(file, content).expect("a file");
        tar.arg(path);
    }
    assert!(tar.status().expect("tar").success());
    std::fs::read(directory.join("archive")).expect("the archive")
}

/// Asks for a link. `None`: the file is there.
pub fn link(daemon: &Daemon, template: &str, hash: &str) -> Option<String> {
    let reply = daemon.ask("GET", &format!("/templates/{template}/files/{hash}"), None);
    assert_eq!(reply.status, 201, "{reply:?}");
    if reply.json()["present"] == true {
        return None;
    }
    let url = reply.json()["url"].as_str().expect("a url").to_owned();
    let path = url.strip_prefix("http://localhost").expect("the host that the client wrote");
    Some(path.to_owned())
}

/// Uploads without a key, as to a store elsewhere.
fn put(daemon: &Daemon, path: &str, length: Option<usize>, body: &[u8]) -> Reply {
    let length = length.map(|length| format!("content-length: {length}\r\n"));
    let head =
        format!("PUT {path} HTTP/1.1\r\nhost: localhost\r\n{}\r\n", length.unwrap_or_default());
    let mut connection = daemon.connect();
    connection.send([head.as_bytes(), body].concat()).reply()
}

/// Runs bash in a sandbox through envd, as a client that names neither user nor directory.
fn bash(daemon: &Daemon, id: &str, token: &str, command: &str) {
    let message = json!({
        "process": { "cmd": "/bin/bash", "args": ["-c", command] }, "stdin": false,
    })
    .to_string();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).expect("a length").to_be_bytes());
    body.extend(message.as_bytes());
    let mut connection = daemon.to_sandbox(id, 49983, "POST /process.Process/Start");
    connection.send(format!(
        "x-access-token: {token}\r\ncontent-type: application/connect+json\r\n\
         connect-protocol-version: 1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    ));
    let reply = connection.send(body).reply();
    assert_eq!(reply.status, 200, "{reply:?}");
    let said = String::from_utf8_lossy(&reply.body).into_owned();
    assert!(said.contains("\"exitCode\":0"), "{said}");
}

#[test]
fn a_template_is_built_as_the_sdk_builds_it_and_used() {
    let (daemon, site) = daemon(&[]);
    let body = json!({ "name": "app:v1", "tags": ["stable"], "cpuCount": 2, "memoryMB": 16 });
    let reply = daemon.ask("POST", "/v3/templates", Some(&body));
    assert_eq!(reply.status, 202, "{reply:?}");
    let said = reply.json();
    assert_eq!((&said["public"], &said["aliases"]), (&json!(false), &json!(["app"])));
    assert_eq!(
        (&said["names"], &said["tags"]),
        (&json!(["default/app"]), &json!(["stable", "v1"]))
    );
    let text = |field: &str| said[field].as_str().expect("a text").to_owned();
    let (template, id) = (text("templateID"), text("buildID"));
    assert_eq!(id.len(), 36, "a UUID");
    let build = (template.clone(), id);
    assert_eq!(status(&daemon, &build)["status"], "waiting");

    let hash = "37dc".repeat(16);
    let path = link(&daemon, &template, &hash).expect("it is not there yet");
    let tar = archive(&site, &[("src/f.txt", "hello"), ("src/deep/g.txt", "there")]);
    assert_eq!(put(&daemon, &path, Some(tar.len()), &tar).status, 200);
    assert_eq!(link(&daemon, &template, &hash), None, "it is there now");
    assert_eq!(put(&daemon, &path, Some(tar.len()), &tar).status, 404, "a link works once");

    let at = site.display();
    let body = json!({
        "fromImage": "e2bdev/base", "force": false,
        "steps": [
            { "type": "COPY", "args": ["src", format!("{at}/copied/"), "root", "0640"],
              "filesHash": hash, "force": false },
            step("ENV", &["A", "1", "SECRET", "s3cret"]),
            step("ENV", &["B", "${A}:2"]),
            step("WORKDIR", &[&format!("{at}/work")]),
            step("USER", &["root"]),
            run("echo \"$A $B $PWD $(id -un)\"; echo complaint >&2"),
        ],
        "startCmd": "touch started; sleep 3; exit 0", "readyCmd": "test -e started",
    });
    start(&daemon, &build, &body);
    let done = once(&daemon, &build, &["ready"]);
    let log = messages(&done);
    assert!(log.contains(&format!("1 1:2 {at}/work root")), "{log:?}");
    let complaint = done["logEntries"].as_array().expect("entries").iter();
    let complaint: Vec<_> = complaint.filter(|entry| entry["message"] == "complaint").collect();
    assert_eq!((&complaint[0]["level"], &complaint[0]["step"]), (&json!("warn"), &json!("6")));
    assert!(!log.iter().any(|line| line.contains("s3cret")), "values stay out of the log");
    let read = |path: &str| std::fs::read_to_string(site.join(path)).expect("a file");
    assert_eq!((read("copied/f.txt"), read("copied/deep/g.txt")), ("hello".into(), "there".into()));
    let again =
        daemon.ask("POST", &format!("/v2/templates/{template}/builds/{}", build.1), Some(&body));
    assert!(again.error(409).contains("announce another"));
    nothing_runs(&daemon);

    // A page goes on where the one before ended, and the last is empty.
    let page = |query: &str| {
        let path = format!("/templates/{template}/builds/{}/status?{query}", build.1);
        messages(&daemon.ask("GET", &path, None).json())
    };
    assert_eq!(page("logsOffset=1&limit=2"), log[1..3]);
    assert!(page(&format!("logsOffset={}", log.len())).is_empty());
    assert_eq!(page("level=warn"), ["complaint"]);

    assert!(create(&daemon, "app").error(404).contains("tagged `default`"));
    for name in ["app:v1", "default/app:stable", &format!("{template}:v1")] {
        let reply = create(&daemon, name);
        assert_eq!(reply.status, 201, "{name}: {reply:?}");
        let (made, file) = (reply.json(), site.join("seen"));
        assert_eq!(made["templateID"], json!(template), "{name}");
        let sandbox = made["sandboxID"].as_str().expect("an id");
        let token = made["envdAccessToken"].as_str().expect("a token");
        let command = format!("echo \"$A $B $PWD $(id -un)\" > {}", file.display());
        bash(&daemon, sandbox, token, &command);
        assert_eq!(read("seen"), format!("1 1:2 {at}/work root\n"), "{name}");
        assert_eq!(daemon.delete(sandbox).status, 204);
    }
}

#[test]
fn a_deleted_template_leaves_its_sandboxes() {
    let (daemon, _) = daemon(&[]);
    let before = daemon.snapshots_kept();
    let ((template, _), done) = build(&daemon, "gone", &json!([run("true")]));
    assert_eq!(done["status"], "ready", "{done}");
    assert_eq!(daemon.snapshots_kept(), before + 1);
    let sandbox = create(&daemon, "gone").json()["sandboxID"].as_str().expect("an id").to_owned();
    let snapshots = daemon.ask("GET", "/snapshots", None).json();
    assert_eq!(snapshots, json!([]), "what a template is made of is no client's snapshot");
    assert_eq!(daemon.ask("DELETE", &format!("/templates/{template}"), None).status, 204);
    assert_eq!(daemon.state(&sandbox), "running");
    create(&daemon, "gone").error(404);
    create(&daemon, &template).error(404);
    assert_eq!(daemon.snapshots_kept(), before);
    daemon.ask("DELETE", &format!("/templates/{template}"), None).error(404);
    daemon.pause(&sandbox);
    assert_eq!(daemon.act_with(&sandbox, "connect", &json!({ "timeout": 60 })).status, 201);
}

#[test]
fn a_step_that_fails_is_named_and_nothing_is_left() {
    let (daemon, _) = daemon(&[]);
    let before = daemon.snapshots_kept();
    let steps = json!([run("echo one"), run("echo two >&2; exit 3"), run("echo three")]);
    let (_, done) = build(&daemon, "broken", &steps);
    assert_eq!((&done["status"], &done["reason"]["step"]), (&json!("error"), &json!("2")));
    let message = done["reason"]["message"].as_str().expect("a message");
    assert!(message.contains("exit status 3"), "{message}");
    let entries = done["reason"]["logEntries"].as_array().expect("entries");
    assert!(entries.iter().any(|entry| entry["message"] == "two"), "{done}");
    assert!(!messages(&done).contains(&"three".to_owned()), "{done}");
    for (steps, said) in [
        (json!([step("WORKDIR", &["/proc/nothing/here"])]), "exit status"),
        (
            json!([{ "type": "COPY", "args": ["a", "/x", "", ""], "filesHash": "ab" }]),
            "not uploaded",
        ),
    ] {
        let (_, done) = build(&daemon, "broken", &steps);
        assert_eq!(done["reason"]["step"], "1", "{done}");
        assert!(done["reason"]["message"].as_str().expect("a message").contains(said), "{done}");
    }
    nothing_runs(&daemon);
    assert_eq!(daemon.snapshots_kept(), before);
    create(&daemon, "broken").error(404);
}

#[test]
fn bases_that_are_not_there_say_what_is() {
    let (daemon, _) = daemon(&[]);
    for (wish, body, said) in [
        (json!({}), json!({ "fromImage": "python:3.12" }), "`base`"),
        (json!({}), json!({ "fromTemplate": "nope" }), "`base`"),
        // More than it has, and too little to boot in.
        (json!({ "memoryMB": 64 }), json!({ "fromTemplate": "base" }), "128"),
    ] {
        let mut wish = wish;
        wish["name"] = json!("app");
        let reply = daemon.ask("POST", "/v3/templates", Some(&wish)).json();
        let text = |field: &str| reply[field].as_str().expect("a text").to_owned();
        let build = (text("templateID"), text("buildID"));
        start(&daemon, &build, &body);
        let done = once(&daemon, &build, &["error"]);
        assert_eq!(done["reason"]["step"], "base", "{done}");
        assert!(done["reason"]["message"].as_str().expect("a message").contains(said), "{done}");
    }
    let name = json!({ "name": "base" });
    assert!(daemon.ask("POST", "/v3/templates", Some(&name)).error(409).contains("another name"));
    daemon.ask("POST", "/templates", Some(&json!({}))).error(501);
    let build = announce(&daemon, "app");
    let path = format!("/v2/templates/{}/builds/{}", build.0, build.1);
    let bad = json!({ "fromTemplate": "base", "steps": [step("ADD", &["x"])] });
    assert!(daemon.ask("POST", &path, Some(&bad)).error(400).contains("step 1"));
    daemon.ask("GET", "/templates/nope/builds/nope/status", None).error(404);
}

#[test]
fn uploads_are_bounded_and_need_a_link() {
    let (daemon, _) = daemon(&["--upload-mib", "1", "--uploads-mib", "1"]);
    let (template, _) = announce(&daemon, "app");
    let nowhere = format!("/build-files/{}", "0".repeat(64));
    for path in [nowhere.as_str(), "/build-files/x", "/build-files/..%2fx"] {
        put(&daemon, path, Some(1), b"x").error(404);
    }
    let path = link(&daemon, &template, "aa").expect("a link");
    assert_eq!(path.len(), "/build-files/".len() + 64);
    put(&daemon, &path, None, b"").error(411);
    put(&daemon, &path, Some((1 << 20) + 1), b"").error(413);
    // Cut off: nothing of it stays, and the link still works.
    let mut connection = daemon.connect();
    connection.send(format!("PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"));
    drop(connection);
    assert!(link(&daemon, &template, "aa").is_some());
    assert_eq!(put(&daemon, &path, Some(4), b"more").status, 200);
    assert_eq!(link(&daemon, &template, "aa"), None);
    // The older file goes for the newer.
    let path = link(&daemon, &template, "bb").expect("a link");
    assert_eq!(put(&daemon, &path, Some(1 << 20), &vec![0; 1 << 20]).status, 200);
    assert!(link(&daemon, &template, "aa").is_some());
    daemon.ask("GET", &format!("/templates/{template}/files/..%2Fx"), None).error(400);
    daemon.ask("GET", "/templates/nope/files/aa", None).error(404);
    let uploads = daemon.directory().join("store/builds/uploads/default");
    eventually("what was cut off is gone", || {
        std::fs::read_dir(&uploads).expect("a list").count() == 1
    });
}

#[test]
fn builds_wait_for_their_turn_and_a_restart_ends_them() {
    let (mut daemon, site) = daemon(&["--builds-at-once", "1"]);
    let before = daemon.snapshots_kept();
    let go = site.join("go");
    let wait = run(&format!("until test -e {}; do sleep 0.1; done", go.display()));
    let body = json!({ "fromTemplate": "base", "steps": [wait] });
    let builds = [announce(&daemon, "one"), announce(&daemon, "two")];
    start(&daemon, &builds[0], &body);
    once(&daemon, &builds[0], &["building"]);
    start(&daemon, &builds[1], &body);
    eventually("the second waits", || {
        messages(&status(&daemon, &builds[1])).iter().any(|line| line.starts_with("Waiting"))
    });
    assert_eq!(status(&daemon, &builds[1])["status"], "waiting");
    std::fs::write(&go, "").expect("a file");
    once(&daemon, &builds[0], &["ready"]);
    let over = Instant::now();
    once(&daemon, &builds[1], &["ready"]);
    // It is woken: by itself it would look every 30 s.
    assert!(over.elapsed() < Duration::from_secs(20), "{:?}", over.elapsed());
    std::fs::remove_file(&go).expect("a file");
    let third = announce(&daemon, "three");
    start(&daemon, &third, &body);
    eventually("the step runs", || {
        messages(&status(&daemon, &third)).iter().any(|line| line.starts_with("[1/1]"))
    });
    daemon.crash();
    daemon.restart();
    let done = status(&daemon, &third);
    assert_eq!(done["status"], "error", "{done}");
    let message = done["reason"]["message"].as_str().expect("a message");
    assert!(message.contains("restarted"), "{message}");
    nothing_runs(&daemon);
    assert_eq!(daemon.snapshots_kept(), before + 2, "those that were done are there");
    std::fs::write(&go, "").expect("a file");
    assert_eq!(create(&daemon, "one").status, 201);
}

#[test]
fn a_build_that_runs_when_the_host_is_stopped_ends_with_it() {
    let (mut daemon, site) = daemon(&[]);
    let wait = run(&format!("until test -e {}; do sleep 0.1; done", site.join("go").display()));
    let build = announce(&daemon, "one");
    start(&daemon, &build, &json!({ "fromTemplate": "base", "steps": [wait] }));
    once(&daemon, &build, &["building"]);
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    daemon.restart();
    let done = status(&daemon, &build);
    assert_eq!(done["status"], "error", "{done}");
    // However the build saw its sandbox end: the start that came after had nothing to end.
    let message = done["reason"]["message"].as_str().expect("a message");
    assert!(message.contains("was stopped"), "{message}");
    nothing_runs(&daemon);
}

/// The unmodified SDK, where `MICA_TEST_PYTHON` names a Python that has it.
#[test]
fn the_sdk_builds_a_template() {
    let Some(python) = std::env::var_os("MICA_TEST_PYTHON") else {
        let text = "MICA_TEST_PYTHON is not set: nothing is built with the SDK";
        return required::skip("TEST_PYTHON", text);
    };
    let (daemon, site) = daemon(&[]);
    std::fs::write(site.join("hello.txt"), "from the SDK").expect("a file");
    let script = r#"
import sys
from e2b import Template, Sandbox
site = sys.argv[1]
def build(template, name, **more):
    lines = []
    kept = lambda entry: lines.append(entry.message)
    Template.build(template, name, cpu_count=2, memory_mb=16, on_build_logs=kept, **more)
    return lines
base = Template(file_context_path=site).from_base_image() if hasattr(Template(), "from_base_image") \
    else Template(file_context_path=site).from_image("e2bdev/base")
lines = build(base.copy("hello.txt", site + "/copied.txt", user="root").set_envs({"GREETING": "hi"})
    .set_workdir(site).run_cmd("cat copied.txt; echo; echo $GREETING"), "from-sdk:v1")
assert "from the SDK" in lines and "hi" in lines, lines
sandbox = Sandbox.create("from-sdk:v1", timeout=60)
out = sandbox.commands.run("echo $GREETING $PWD").stdout.strip()
assert out == "hi " + site, out
sandbox.kill()
try:
    build(Template().from_template("base").run_cmd("exit 7"), "from-sdk")
except Exception as error:
    assert type(error).__name__ == "BuildException" and "exit status 7" in str(error), repr(error)
else:
    raise SystemExit("a step that fails ends the build")
print("fine")
"#;
    let url = daemon.url();
    let output = Command::new(python)
        .args(["-c", script])
        .arg(&site)
        .env("E2B_API_URL", &url)
        .env("E2B_SANDBOX_URL", &url)
        .env("E2B_API_KEY", daemon.key())
        .output()
        .expect("python");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim(), "fine", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn sandboxes_of_a_built_template_count_for_their_key() {
    let (daemon, _) = daemon(&[]);
    let (_, done) = build(&daemon, "counted", &json!([run("true")]));
    assert_eq!(done["status"], "ready", "{done}");
    nothing_runs(&daemon);
    // Of the tenant that built it.
    let key = daemon.make_key(&["--tenant", "default", "--sandboxes-max", "1"]);
    let body = json!({ "templateID": "counted", "timeout": 300 });
    let create = || daemon.ask_as(&key, "POST", "/v2/sandboxes", Some(&body));
    assert_eq!(create().status, 201);
    create().error(429);
}
