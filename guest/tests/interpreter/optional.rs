//! Kernels that a template has only when it is asked for them: each is tested where its programs
//! are, and says so where they are not, unless `REQUIRE_OPTIONAL_KERNELS` has its name among others, which
//! makes that a failure.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::*;

async fn server(kernel: &str, needs: &[&str]) -> Option<Server> {
    let python = python()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &&&str| {
        Path::new(name).is_file()
            || std::env::split_paths(&path).any(|place| place.join(name).is_file())
    };
    if let Some(missing) = needs.iter().find(|name| !is_there(name)) {
        let required = std::env::var_os("REQUIRE_OPTIONAL_KERNELS").unwrap_or_default();
        let required = required.to_string_lossy().split_whitespace().any(|name| name == kernel);
        assert!(!required, "REQUIRE_OPTIONAL_KERNELS names {kernel}, and {missing} is not here");
        eprintln!("skipped: {missing} is not on this machine");
        return None;
    }
    let env = BTreeMap::from([("GLOBAL".to_owned(), "sandbox".to_owned())]);
    Some(server_with(python, env).await)
}

fn cell(language: &str, code: &str) -> Value {
    json!({"code": code, "language": language})
}

#[tokio::test(flavor = "multi_thread")]
async fn go_is_compiled_and_run() {
    let Some(server) = server("go", &["go"]).await else { return };
    let code = "package main\nimport (\"fmt\"; \"os\")\nfunc main() {\n\
                fmt.Println(\"out\", os.Getenv(\"GLOBAL\"), os.Getenv(\"A\"))\n\
                fmt.Fprintln(os.Stderr, \"err\")\n}";
    let request = json!({"code": code, "language": "go", "env_vars": {"A": "1"}});
    let events = server.run(request).await;
    assert_eq!(events[0], json!({"type": "number_of_executions", "execution_count": 1}));
    assert_eq!(of_type(&events, "stdout")[0]["text"], "out sandbox 1\n", "{events:?}");
    assert_eq!(of_type(&events, "stderr")[0]["text"], "err\n");
    let without = "import \"fmt\"\nfunc main() { fmt.Println(1) }";
    assert_eq!(server.stdout(cell("go", without)).await, "1\n");
    let events = server.run(cell("go", "package main\nfunc main() { x := 1 }")).await;
    let error = of_type(&events, "error")[0];
    assert_eq!(error["name"], "CompileError");
    assert!(error["value"].as_str().unwrap().starts_with("main.go:2"), "{error}");
    assert!(error["traceback"].as_str().unwrap().contains("declared"), "{error}");
    let failing = "package main\nimport \"os\"\nfunc main() { os.Exit(3) }";
    let events = server.run(cell("go", failing)).await;
    assert_eq!(of_type(&events, "error")[0]["value"], "exit status 3");
    // A program whose client leaves is ended.
    let endless = "package main\nimport \"fmt\"\nfunc main() { fmt.Println(1); for {} }";
    let request = cell("go", endless).to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    while next_event(&mut reader).await.unwrap()["type"] != "stdout" {}
    drop(reader);
    let after = timeout(Duration::from_secs(30), server.stdout(cell("go", without))).await;
    assert_eq!(after.unwrap(), "1\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn r_runs_with_its_state() {
    let Some(server) = server("r", &["R", "/usr/lib/R/site-library/IRkernel/DESCRIPTION"]).await
    else {
        return;
    };
    assert_eq!(server.stdout(cell("r", "print('out')")).await, "[1] \"out\"\n");
    let events = server.run(cell("r", "x <- 41; x + 1")).await;
    assert_eq!(of_type(&events, "result")[0]["text"], "[1] 42");
    let call = json!({"code": "cat(Sys.getenv(c('GLOBAL', 'A')))", "language": "r",
                      "env_vars": {"GLOBAL": "call", "A": "it's \"1\"\n"}});
    assert_eq!(server.stdout(call).await, "call it's \"1\"\n");
    assert_eq!(server.stdout(cell("r", "cat(Sys.getenv(c('GLOBAL', 'A')))")).await, "sandbox ");
    let events = server.run(cell("r", "stop('bad')")).await;
    assert_eq!(of_type(&events, "error").len(), 1);
    assert!(of_type(&events, "error")[0]["value"].as_str().unwrap().contains("bad"));
    let request = cell("r", "cat('begun\\n'); flush(stdout()); Sys.sleep(600)").to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    while next_event(&mut reader).await.unwrap()["type"] != "stdout" {}
    drop(reader);
    // The context can be used again; whether its variables are there is R's affair. R aborts what waits for it
    // when it looks after the interrupt, and looks again as long as it finds something: a client that asks
    // at once may be told so more than once.
    let again = async || {
        loop {
            let events = server.run(cell("r", "cat(43)")).await;
            if events.first().is_none_or(|event| event["name"] != "ExecutionAborted") {
                return events;
            }
        }
    };
    let after = timeout(Duration::from_secs(60), again()).await.unwrap();
    let said: Vec<_> = of_type(&after, "stdout").iter().map(|event| &event["text"]).collect();
    assert_eq!(said, ["43"], "{after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn java_runs_with_its_state() {
    let python = std::env::var("MICA_TEST_PYTHON").unwrap_or_default();
    let prefix = Path::new(&python).parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let jar = prefix.join("share/jupyter/kernels/java/jjava.jar").display().to_string();
    let Some(server) = server("java", &["java", &jar]).await else { return };
    assert_eq!(server.stdout(cell("java", "System.out.println(\"out\")")).await, "out\n");
    let events = server.run(cell("java", "int x = 41; x + 1")).await;
    assert_eq!(of_type(&events, "result")[0]["text"], "42", "{events:?}");
    let show = "System.getProperty(\"GLOBAL\") + System.getProperty(\"A\", \"-\")";
    let call = json!({"code": show, "language": "java", "env_vars": {"GLOBAL": "c", "A": "'\"\n"}});
    assert_eq!(of_type(&server.run(call).await, "result")[0]["text"], "c'\"\n");
    let events = server.run(cell("java", show)).await;
    assert_eq!(of_type(&events, "result")[0]["text"], "sandbox-");
    let events = server.run(cell("java", "int y = nothing;")).await;
    let traceback = of_type(&events, "error")[0]["traceback"].as_str().unwrap().to_owned();
    assert!(traceback.contains("cannot find symbol"), "{traceback}");
}
