//! The code interpreter as the agent starts it: as the user, through the launch shim, warmed before
//! there is a sandbox, and taken along into another one.
//!
//! Needs a Python with ipykernel, named by `MICA_TEST_PYTHON`. Without it the tests say so and
//! check nothing, unless `REQUIRE_TEST_PYTHON=1`, which makes that a failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mica_wire::guest::{ControlRequest, InitRequest, Verdict};
use serde_json::{Value, json};

use crate::required;
use crate::support::{Agent, PATIENCE, TOKEN, identity};

/// How long a kernel may take to be warm on a machine under load.
const WARM: ControlRequest = ControlRequest::Warm { deadline_ms: 200_000 };

fn agent_with_interpreter() -> Option<Agent> {
    let Some(python) = std::env::var_os("MICA_TEST_PYTHON").map(PathBuf::from) else {
        required::skip("TEST_PYTHON", "MICA_TEST_PYTHON is not set: the agent starts no kernel");
        return None;
    };
    Some(agent_with_path(python.parent()?.to_str()?))
}

fn agent_with_path(first: &str) -> Agent {
    Agent::start_prepared(|command, directory| {
        let settings = directory.join("template.json");
        std::fs::write(&settings, r#"{"services":{"interpreter":true}}"#).unwrap();
        let inherited = std::env::var("PATH").unwrap_or_default();
        command.arg("--template-json").arg(settings).env("PATH", format!("{first}:{inherited}"));
    })
}

/// The events of a cell, but for those that only say that it lives.
fn run(agent: &Agent, token: &str, code: &str) -> Vec<Value> {
    let head = format!(
        "POST /execute HTTP/1.1\r\ncontent-type: application/json\r\nx-access-token: {token}"
    );
    let cell = json!({ "code": code }).to_string();
    let mut answer = agent.request_to(49999, &head, cell.as_bytes());
    assert_eq!(answer.status, 200);
    let body = String::from_utf8(answer.body()).unwrap();
    let events = body.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["type"] != "keepalive").collect()
}

/// What a cell printed.
fn printed(agent: &Agent, token: &str, code: &str) -> String {
    let events = run(agent, token, code);
    let texts = events.iter().filter(|event| event["type"] == "stdout");
    texts.map(|event| event["text"].as_str().unwrap()).collect()
}

#[test]
fn code_runs_in_a_kernel_of_the_agent() {
    let Some(agent) = agent_with_interpreter() else { return };
    assert_eq!(agent.init("itest").error, None);

    let start = Instant::now();
    while agent.request_to(49999, "GET /health HTTP/1.1", b"").status != 200 {
        assert!(start.elapsed() < 4 * PATIENCE, "the kernel did not become ready");
    }
    let head = "POST /execute HTTP/1.1\r\ncontent-type: application/json";
    let cell = br#"{"code":"import os; os.getsid(0)"}"#;
    assert_eq!(agent.request_to(49999, head, cell).status, 401);
    let head = format!("{head}\r\nx-access-token: {TOKEN}");
    let mut answer = agent.request_to(49999, &head, cell);
    assert_eq!(answer.status, 200);
    let body = String::from_utf8(answer.body()).unwrap();
    assert!(body.contains(r#""type":"result""#), "{body}");
    assert!(body.trim_end().ends_with(r#"{"type":"end_of_execution"}"#), "{body}");
}

#[test]
fn warm_means_that_a_cell_runs_at_once_and_leaves_no_trace() {
    let Some(agent) = agent_with_interpreter() else { return };
    let reply = agent.control(&WARM);
    assert_eq!(reply.error, None);
    assert_eq!(agent.init("itest").error, None);
    let health = agent.request_to(49999, "GET /health HTTP/1.1", b"");
    assert_eq!(health.status, 200);
    let code = "import sys\nprint(_ == __ == '', Out, [n for n in dir() if n[0] != '_'])\n\
                print([n in sys.modules for n in ('numpy', 'pandas', 'matplotlib.pyplot')])\n\
                import gc, matplotlib.pyplot as p\n\
                print(p.get_fignums(), gc.isenabled(), gc.get_freeze_count() > 100_000)";
    let events = run(&agent, TOKEN, code);
    assert_eq!(events[0], json!({"type": "number_of_executions", "execution_count": 1}));
    assert_eq!(
        events[1]["text"],
        "True {} ['In', 'Out', 'exit', 'get_ipython', 'open', 'quit', 'sys']\n\
         [True, True, True]\n[] True True\n"
    );
    // And once more: a kernel that is in use is not disturbed.
    assert_eq!(run(&agent, TOKEN, "x = 7\nx")[1]["text"], "7");
    assert_eq!(agent.control(&WARM).error, None);
    assert_eq!(printed(&agent, TOKEN, "print(x)"), "7\n");
}

#[test]
fn a_template_whose_services_do_not_start_is_told_why() {
    let directory = std::env::temp_dir().join(format!("mica-no-python-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let python = directory.join("python3");
    std::fs::write(&python, "#!/bin/sh\necho no such kernel >&2\nexit 3\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&python, mode).unwrap();
    let agent = agent_with_path(directory.to_str().unwrap());
    let error = agent.control(&WARM).error.unwrap();
    std::fs::remove_dir_all(directory).unwrap();
    assert!(error.contains("cannot run a cell") && error.contains("no such kernel"), "{error}");
    // A template without identity, and without a service, is still no sandbox.
    assert_eq!(agent.port(49999).1, Some(Verdict::Refused));
}

#[test]
fn warming_keeps_to_its_deadline() {
    let Some(agent) = agent_with_interpreter() else { return };
    let error = agent.control(&ControlRequest::Warm { deadline_ms: 1 }).error.unwrap();
    assert!(error.contains("not warm after 1 ms"), "{error}");
    assert_eq!(agent.control(&WARM).error, None);
}

#[test]
fn a_kernel_goes_on_as_another_sandbox_and_drops_the_cell_of_the_former() {
    let Some(agent) = agent_with_interpreter() else { return };
    assert_eq!(agent.control(&WARM).error, None);
    assert_eq!(agent.init("itest").error, None);
    let code = "import os, random\nkept = os.getpid()\nrandom.seed(7)\n\
                print([os.environ.get(n) for n in ('OF_THE_SANDBOX', 'OF_THE_OTHER')])";
    assert_eq!(printed(&agent, TOKEN, code), "['1', None]\n");
    // A cell that is in flight, its client reading, when the state is saved.
    let (mut stream, verdict) = agent.port(49999);
    assert_eq!(verdict, Some(Verdict::Open));
    let cell = json!({"code": "import time; print('in flight', flush=True); time.sleep(600)"});
    let cell = cell.to_string();
    let head = format!(
        "POST /execute HTTP/1.1\r\nhost: x\r\nx-access-token: {TOKEN}\r\n\
         content-length: {}\r\n\r\n",
        cell.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(cell.as_bytes()).unwrap();
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.any(|line| line.unwrap().contains("in flight")));

    let other = InitRequest {
        access_token: Some("another-token".to_owned()),
        env_vars: [("OF_THE_OTHER".to_owned(), "it's \"2\"\n".to_owned())].into(),
        new_sandbox: true,
        ..identity("other")
    };
    assert_eq!(agent.control(&ControlRequest::Init(other)).error, None);
    let start = Instant::now();
    let code = "print(kept == os.getpid(), os.environ.get('OF_THE_SANDBOX'), \
                repr(os.environ['OF_THE_OTHER']), os.environ['E2B_SANDBOX_ID'], \
                random.random() == random.Random(7).random())";
    assert_eq!(printed(&agent, "another-token", code), "True None 'it\\'s \"2\"\\n' other False\n");
    assert!(start.elapsed() < Duration::from_secs(60), "the cell was not interrupted");
    assert!(lines.all(|line| !line.is_ok_and(|line| line.contains("end_of_execution"))));
}

#[test]
fn clones_draw_their_own_numbers_and_a_resumed_sandbox_goes_on_with_its_own() {
    let Some(agent) = agent_with_interpreter() else { return };
    assert_eq!(agent.control(&WARM).error, None);
    let seed = "import random, ssl, numpy as np\nrandom.seed(7); np.random.seed(7)\n\
                wanted = random.Random(7).random(), np.random.RandomState(7).rand()";
    let compare = "print(random.random() == wanted[0], np.random.rand() == wanted[1])";
    let init = |id: &str, new_sandbox: bool| {
        let request = InitRequest { new_sandbox, ..identity(id) };
        assert_eq!(agent.control(&ControlRequest::Init(request)).error, None);
    };
    init("first", true);
    // (who comes next, and whether the generators go on)
    for (id, new_sandbox, goes_on) in
        [("a", true, false), ("a", false, true), ("b", true, false), ("b", true, false)]
    {
        run(&agent, TOKEN, seed);
        init(id, new_sandbox);
        let wanted = if goes_on { "True True\n" } else { "False False\n" };
        assert_eq!(printed(&agent, TOKEN, compare), wanted, "{id} {new_sandbox}");
    }
}

#[test]
fn what_a_cell_set_itself_stays_unless_the_sandbox_says_otherwise() {
    let Some(agent) = agent_with_interpreter() else { return };
    assert_eq!(agent.control(&WARM).error, None);
    let with = |id: &str, variables: &[(&str, &str)]| {
        let env_vars = variables.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let request = InitRequest { env_vars, new_sandbox: true, ..identity(id) };
        assert_eq!(agent.control(&ControlRequest::Init(request)).error, None);
    };
    with("a", &[("SAME", "1"), ("LANG", "de"), ("BAD=NAME", "1"), ("NUL", "a\0b")]);
    let show = "print([os.environ.get(n) for n in ('SAME', 'OWN', 'LANG', 'NUL')])";
    let set = "import os; os.environ['SAME'] = os.environ['OWN'] = 'mine'";
    assert_eq!(printed(&agent, TOKEN, &format!("import os\n{show}")), "['1', None, 'de', None]\n");
    run(&agent, TOKEN, set);
    // A variable of the former sandbox goes back to what it would have been without it.
    with("b", &[("SAME", "1")]);
    assert_eq!(printed(&agent, TOKEN, show), "['mine', 'mine', 'C.UTF-8', None]\n");
    with("c", &[("SAME", "2")]);
    assert_eq!(printed(&agent, TOKEN, show), "['2', 'mine', 'C.UTF-8', None]\n");
}
