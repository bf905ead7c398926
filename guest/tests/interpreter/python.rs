//! Python cells, and what holds for every kernel: contexts, streams, bounds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mica_guest::interpreter::WAITING_CELLS_MAX;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_gives_its_output_and_its_result() {
    let Some(server) = server().await else { return };
    let events =
        server.code("import sys\nprint('out')\nprint('err', file=sys.stderr)\n'a' 'b'").await;
    assert_eq!(events[0], json!({"type": "number_of_executions", "execution_count": 1}));
    let stdout = of_type(&events, "stdout");
    assert_eq!(stdout[0]["text"], "out\n");
    assert!(stdout[0]["timestamp"].as_str().unwrap().contains('T'));
    assert_eq!(of_type(&events, "stderr")[0]["text"], "err\n");
    let result = of_type(&events, "result")[0];
    assert_eq!(result["text"], "ab");
    assert_eq!(result["is_main_result"], true);
    // The state stays, and the kernel's own set-up and the environment leave no mark on the count.
    assert_eq!(
        server.run(json!({"code": "x = 5", "env_vars": {"A": "1"}})).await[0]["execution_count"],
        2
    );
    let events = server.code("x + 1").await;
    assert_eq!(events[0]["execution_count"], 3);
    assert_eq!(events[1]["text"], "6");
    assert_eq!(
        server.stdout(json!({"code": "print(sorted(n for n in dir() if 'mica' in n))"})).await,
        "[]\n"
    );
    assert_eq!(server.ask("GET", "/health", "").await, (200, "\"OK\"".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_told_once_with_its_traceback() {
    let Some(server) = server().await else { return };
    let events = server.code("def f():\n    return 1 / 0\nf()").await;
    let errors = of_type(&events, "error");
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0]["name"], "ZeroDivisionError");
    assert_eq!(errors[0]["value"], "division by zero");
    let traceback = errors[0]["traceback"].as_str().unwrap();
    assert!(traceback.contains("Traceback (most recent call last)"), "{traceback}");
    let events = server.code("1 +").await;
    assert_eq!(of_type(&events, "error")[0]["name"], "SyntaxError");
    assert_eq!(server.code("input()").await.last().unwrap()["name"], "StdinNotImplementedError");
    assert!(server.code("").await.iter().all(|event| event["type"] == "number_of_executions"));
}

#[tokio::test(flavor = "multi_thread")]
async fn charts_and_frames_come_as_data() {
    let Some(server) = server().await else { return };
    let code = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [4, 5, 6])\n\
                plt.title('T')\nplt.xlabel('X')\nplt.show()";
    let events = server.code(code).await;
    let result = of_type(&events, "result")[0];
    assert!(result["png"].as_str().unwrap().starts_with("iVBORw0KGgo"), "a PNG in base64");
    assert_eq!(result["chart"]["type"], "line");
    assert_eq!(result["chart"]["title"], "T");
    assert_eq!(result["chart"]["elements"][0]["points"][2], json!([3.0, 6.0]));
    assert_eq!(result["is_main_result"], false);
    let code = "import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', 'y'], \
                't': pd.to_datetime(['2026-01-02', '2026-01-03'])})";
    let events = server.code(code).await;
    let result = of_type(&events, "result")[0];
    assert_eq!(result["data"]["a"], json!([1, 2]));
    assert_eq!(result["data"]["b"], json!(["x", "y"]));
    assert_eq!(result["data"]["t"][0], "2026-01-02T00:00:00");
    assert!(result["html"].as_str().unwrap().contains("<table"));
    let code = "from IPython.display import *\ndisplay(HTML('<b>'), Markdown('m'), \
                Latex('l'), JSON({'a': 1}), Javascript('j'), SVG('<svg/>'))";
    let events = server.code(code).await;
    let results = of_type(&events, "result");
    for (result, (field, wanted)) in results.iter().zip([
        ("html", json!("<b>")),
        ("markdown", json!("m")),
        ("latex", json!("l")),
        ("json", json!({"a": 1})),
        ("javascript", json!("j")),
        ("svg", json!("<svg/>")),
    ]) {
        assert_eq!(result[field], wanted);
    }
    assert_eq!(results.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_are_set_for_the_call_and_put_back() {
    let Some(python) = python() else { return };
    let global = BTreeMap::from([("GLOBAL".to_owned(), "sandbox".to_owned())]);
    let server = server_with(python, global).await;
    let show = "import os\nprint([os.environ.get(n) for n in ('GLOBAL', 'A', 'HOME')][:2])";
    let sandbox_only = "['sandbox', None]\n";
    assert_eq!(server.stdout(json!({"code": show})).await, sandbox_only);
    let both = json!({"code": show, "env_vars": {"GLOBAL": "call", "A": "it's \"1\"\n"}});
    assert_eq!(server.stdout(both).await, "['call', 'it\\'s \"1\"\\n']\n");
    assert_eq!(server.stdout(json!({"code": show})).await, sandbox_only);
    let failing = json!({"code": "1/0", "env_vars": {"A": "2"}});
    assert_eq!(of_type(&server.run(failing).await, "error").len(), 1);
    assert_eq!(server.stdout(json!({"code": show})).await, sandbox_only);
    let request = json!({"code": "1", "env_vars": {"a=b": "2"}}).to_string();
    assert_eq!(server.ask("POST", "/execute", &request).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_flushed_one_by_one_and_silence_is_filled() {
    let Some(server) = server().await else { return };
    let code = "import time\nprint('one', flush=True)\ntime.sleep(6)\nprint('two')";
    let request = json!({"code": code}).to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    let mut kinds = Vec::new();
    while let Some(event) = next_event(&mut reader).await {
        kinds.push(event["type"].as_str().unwrap().to_owned());
    }
    // The start of the kernel may have been filled with keepalives too.
    let from = kinds.iter().position(|kind| kind == "stdout").unwrap();
    assert_eq!(kinds[from..], ["stdout", "keepalive", "stdout", "end_of_execution"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_interrupts_its_cell() {
    let Some(server) = server().await else { return };
    // The interrupt may come as soon as the client has read the output: all of it is in the `try`.
    let code = "import time\ntry:\n  print('begun', flush=True); time.sleep(600)\n\
                except KeyboardInterrupt:\n  interrupted = True";
    let request = json!({"code": code, "env_vars": {"LEFT": "1"}}).to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    while next_event(&mut reader).await.unwrap()["type"] != "stdout" {}
    // Waiting behind it, and given up before it begins: it must not run at all.
    let waiting = json!({"code": "skipped = False"}).to_string();
    drop(server.open("POST", "/execute", &waiting).await);
    drop(reader);
    let seen =
        json!({"code": "import os\nprint(interrupted, 'skipped' in dir(), 'LEFT' in os.environ)"});
    let stdout = timeout(Duration::from_secs(30), server.stdout(seen)).await.unwrap();
    assert_eq!(stdout, "True False False\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_dies_is_told_and_replaced() {
    let Some(server) = server().await else { return };
    let events =
        server.code("x = 1\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)").await;
    let error = of_type(&events, "error")[0];
    assert_eq!(error["name"], "UnexpectedEndOfExecution");
    assert!(error["value"].as_str().unwrap().contains("signal: 9"), "{error}");
    let events = server.code("'x' in dir()").await;
    assert_eq!(of_type(&events, "result")[0]["text"], "False");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_off_at_the_start_is_there_when_wanted() {
    let Some(server) = server().await else { return };
    let code = "import gc, sys; print(gc.isenabled(), 'jupyter_client.manager' in sys.modules)";
    assert_eq!(server.stdout(json!({ "code": code })).await, "True False\n");
    let code = "import jupyter_client, jupyter_client.connect\n\
                from jupyter_client import KernelManager, BlockingKernelClient\n\
                from jupyter_client import find_connection_file as find\n\
                print(KernelManager.__name__, BlockingKernelClient.__name__)\n\
                print(find is jupyter_client.connect.find_connection_file)\n\
                print(jupyter_client.__version__ == jupyter_client._version.__version__)\n\
                print(hasattr(jupyter_client, 'nothing'), hasattr(jupyter_client, '__wrapped__'))";
    assert_eq!(
        server.stdout(json!({ "code": code })).await,
        "KernelManager BlockingKernelClient\nTrue\nTrue\nFalse False\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn contexts_are_apart() {
    let Some(server) = server().await else { return };
    let (status, body) = server.ask("POST", "/contexts", r#"{"cwd":"/tmp"}"#).await;
    assert_eq!(status, 200);
    let made: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&made["language"], &made["cwd"]), (&json!("python"), &json!("/tmp")));
    let id = made["id"].as_str().unwrap();
    let here = |code: &str| json!({"code": code, "context_id": id});
    assert_eq!(server.stdout(here("y = 1\nimport os\nprint(os.getcwd())")).await, "/tmp\n");
    assert_eq!(server.stdout(json!({"code": "print('y' in dir())"})).await, "False\n");
    let listed: Value = serde_json::from_str(&server.ask("GET", "/contexts", "").await.1).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    let restart = format!("/contexts/{id}/restart");
    assert_eq!(server.ask("POST", &restart, "").await.0, 200);
    assert_eq!(server.stdout(here("print('y' in dir())")).await, "False\n");
    let path = format!("/contexts/{id}");
    assert_eq!(server.ask("DELETE", &path, "").await.0, 200);
    let gone = format!("Context {id} not found");
    for (method, path) in [("DELETE", path.as_str()), ("POST", restart.as_str())] {
        assert_eq!(server.ask(method, path, "").await, (404, gone.clone()));
    }
    let request = here("1").to_string();
    assert_eq!(server.ask("POST", "/execute", &request).await, (404, gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_answered_in_text() {
    let Some(server) = server().await else { return };
    for (path, body, wanted) in [
        ("/execute", r#"{"code":"1","context_id":"a","language":"python"}"#, 400),
        ("/execute", r#"{"code":"1","language":"cobol"}"#, 400),
        ("/execute", r#"{"code":1}"#, 400),
        ("/execute", "{", 400),
        ("/execute", "", 400),
        ("/execute", r#"{"code":"1","context_id":"../../etc"}"#, 404),
        ("/contexts", r#"{"language":"cobol"}"#, 400),
        ("/contexts", r#"{"language":"bash","cwd":"/no/such/place"}"#, 400),
    ] {
        let (status, text) = server.ask("POST", path, body).await;
        assert_eq!(status, wanted, "{path} {body}: {text}");
        assert!(!text.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn much_output_arrives_whole_and_odd_text_survives() {
    let Some(server) = server().await else { return };
    let code = "for i in range(20000): print(i)\n'é\\n\\x00😀'";
    let events = server.code(code).await;
    let text: String =
        of_type(&events, "stdout").iter().map(|e| e["text"].as_str().unwrap()).collect();
    assert_eq!(text.lines().count(), 20_000);
    assert_eq!(of_type(&events, "result")[0]["text"], "é\\n\\x00😀");
    assert_eq!(server.stdout(json!({"code": "print('after')"})).await, "after\n");
    // Half of a surrogate pair has no place in UTF-8; the cell must end all the same.
    server.code("print('\\ud800')").await;
    server.code("'\\ud800'").await;
    let columns = "import pandas as pd\npd.DataFrame([[float('nan')]], columns=[('a', 1)])";
    assert_eq!(of_type(&server.code(columns).await, "error").len(), 0);
    assert_eq!(server.stdout(json!({"code": "print('still')"})).await, "still\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_of_a_context_is_bounded() {
    let Some(server) = server().await else { return };
    let sleeping = json!({"code": "import time; time.sleep(600)"}).to_string();
    let mut held = vec![server.open("POST", "/execute", &sleeping).await];
    // One may be running already, so one more than the bound must be refused at the latest.
    while held.len() <= WAITING_CELLS_MAX + 1 && held.last().unwrap().0 == 200 {
        held.push(server.open("POST", "/execute", &sleeping).await);
    }
    assert_eq!(held.pop().unwrap().0, 429);
    drop(held);
    // Those that nobody waits for any more make room once the first has been interrupted.
    let free = json!({"code": "1"}).to_string();
    let room = async {
        while server.ask("POST", "/execute", &free).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, room).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_context_leaves_nothing() {
    let Some(server) = server().await else { return };
    let (_, body) = server.ask("POST", "/contexts", "{}").await;
    let made: Value = serde_json::from_str(&body).unwrap();
    let id = made["id"].as_str().unwrap();
    let code = "import os, subprocess\np = subprocess.Popen(['sleep', '600'])\n\
                print(os.getpid(), p.pid)";
    let pids = server.stdout(json!({"code": code, "context_id": id})).await;
    let pids: Vec<PathBuf> =
        pids.split_whitespace().map(|pid| Path::new("/proc").join(pid).join("cwd")).collect();
    let kernels = || std::fs::read_dir(&server.directory).unwrap().count();
    // Of a process that has ended and is not waited for yet, nothing can be read but its status.
    let alive = || pids.iter().filter(|path| std::fs::read_link(path).is_ok()).count();
    assert_eq!((kernels(), alive()), (2, 2));
    // In the middle of a cell.
    let request = json!({"code": "import time; time.sleep(600)", "context_id": id}).to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    while next_event(&mut reader).await.unwrap()["type"] != "number_of_executions" {}
    assert_eq!(server.ask("DELETE", &format!("/contexts/{id}"), "").await.0, 200);
    assert_eq!(next_event(&mut reader).await.unwrap()["name"], "ExecutionAborted");
    let gone = async {
        while (kernels(), alive()) != (1, 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
}
