//! A kernel that gives back what it is sent, as one does that was just interrupted.
//!
//! The real one for bash, with a part before it that answers some requests `aborted` and does not run them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mica_guest::interpreter::{LaunchSpec, Launcher};
use serde_json::json;

use crate::support::*;

/// Gives back the first of every `ABORT_EVERY` requests, and notes its code.
const ABORTING: &str = r#"
import os
from ipykernel.kernelbase import Kernel
execute, every, heard = Kernel.execute_request, int(os.environ["ABORT_EVERY"]), 0
async def aborting(self, stream, ident, parent):
    global heard
    heard += 1
    if heard % every != 1 % every:
        return await execute(self, stream, ident, parent)
    with open(os.environ["ABORTED"], "a") as file:
        file.write(parent["content"]["code"] + "\n")
    content = {"status": "aborted"}
    self.session.send(stream, "execute_reply", content, parent=parent, ident=ident)
Kernel.execute_request = aborting
"#;

fn aborting(every: u32, aborted: &Path) -> Launcher {
    let (plain, aborted) = (plain_launcher(), aborted.display().to_string());
    Arc::new(move |spec: &LaunchSpec| {
        let mut spec = spec.clone();
        let is_bash = |arg: &&mut std::ffi::OsString| arg.to_string_lossy().contains("BashKernel");
        if let Some(code) = spec.args.iter_mut().find(is_bash) {
            *code = format!("{ABORTING}\n{}", code.to_string_lossy()).into();
        }
        spec.env.insert("ABORT_EVERY".to_owned(), every.to_string());
        spec.env.insert("ABORTED".to_owned(), aborted.clone());
        plain(&spec)
    })
}

/// A server whose bash gives back the first of so many requests, and the file of what it gave back.
async fn server(every: u32) -> Option<(Server, std::path::PathBuf)> {
    let python = python()?;
    let name = format!("mica-aborted-{}-{every}", std::process::id());
    let aborted = std::env::temp_dir().join(name);
    std::fs::write(&aborted, "").unwrap();
    let server = server_by(aborting(every, &aborted), python, BTreeMap::new(), &[]).await;
    Some((server, aborted))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_back_is_sent_again_and_runs_once() {
    let Some((server, aborted)) = server(2).await else { return };
    let ran = server.directory.join("ran");
    for round in 1..=3 {
        // Around the cell go silent ones, which set the variable and take it back.
        let code = format!("echo {round} >> {}; echo ${{A-none}}", ran.display());
        let with = json!({"code": code, "language": "bash", "env_vars": {"A": "1"}});
        let events = server.run(with).await;
        assert_eq!(of_type(&events, "error").len(), 0, "{events:?}");
        assert_eq!(of_type(&events, "number_of_executions").len(), 1, "{events:?}");
        assert_eq!(of_type(&events, "stdout")[0]["text"], "1\n", "{events:?}");
        let plain = json!({"code": "echo ${A-none}", "language": "bash"});
        assert_eq!(server.stdout(plain).await, "none\n");
    }
    assert_eq!(std::fs::read_to_string(&ran).unwrap(), "1\n2\n3\n", "each ran once");
    let given_back = std::fs::read_to_string(&aborted).unwrap();
    assert_eq!(
        given_back.matches("${A-none}").count(),
        6,
        "each was given back once: {given_back}"
    );
    assert!(given_back.contains("unset"), "and so was what is around it: {given_back}");
    std::fs::remove_file(aborted).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_gives_everything_back_is_not_asked_for_ever() {
    let Some((server, aborted)) = server(1).await else { return };
    let events = server.run(json!({"code": "echo never", "language": "bash"})).await;
    let errors = of_type(&events, "error");
    assert_eq!((events.len(), errors.len()), (1, 1), "{events:?}");
    assert_eq!(errors[0]["name"], "ExecutionAborted");
    let given_back = std::fs::read_to_string(&aborted).unwrap();
    assert_eq!(given_back.matches("echo never").count(), 4, "{given_back}");
    std::fs::remove_file(aborted).unwrap();
}
