//! The code interpreter as the agent starts it: as the user, through the launch shim.
//!
//! Needs a Python with ipykernel, named by `MICA_TEST_PYTHON`. Without it the test says so and
//! checks nothing, unless `REQUIRE_TEST_PYTHON=1`, which makes that a failure.

use std::path::PathBuf;
use std::time::Instant;

use crate::support::{Agent, PATIENCE, TOKEN};

#[test]
fn code_runs_in_a_kernel_of_the_agent() {
    let Some(python) = std::env::var_os("MICA_TEST_PYTHON").map(PathBuf::from) else {
        let text = "MICA_TEST_PYTHON is not set: no kernel is started by the agent";
        assert!(std::env::var_os("REQUIRE_TEST_PYTHON").is_none(), "{text}");
        eprintln!("skipped: {text}");
        return;
    };
    let agent = Agent::start_prepared(|command, directory| {
        let settings = directory.join("template.json");
        std::fs::write(&settings, r#"{"services":{"interpreter":true}}"#).unwrap();
        let inherited = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{inherited}", python.parent().unwrap().display());
        command.arg("--template-json").arg(settings).env("PATH", path);
    });
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
