//! The other kernels of the default template: JavaScript, TypeScript, bash.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::*;

async fn server(env: &[(&str, &str)]) -> Option<Server> {
    let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let env: BTreeMap<String, String> = env.iter().map(pair).collect();
    Some(server_of(python()?, env, &["javascript", "bash"]).await)
}

fn js(code: &str) -> Value {
    json!({"code": code, "language": "js"})
}

fn bash(code: &str) -> Value {
    json!({"code": code, "language": "bash"})
}

/// The text of the main result.
fn text(events: &[Value]) -> &str {
    let results = of_type(events, "result");
    let main = results.iter().find(|result| result["is_main_result"] == true);
    main.unwrap_or_else(|| panic!("no main result: {events:?}"))["text"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_and_typescript_run_with_their_state() {
    let Some(server) = server(&[]).await else { return };
    let events = server.run(js("console.log('out'); console.error('err'); const x = 1; 'a'")).await;
    // What was run before the sandbox was there has left no mark on the count.
    assert_eq!(events[0], json!({"type": "number_of_executions", "execution_count": 1}));
    assert_eq!(of_type(&events, "stdout")[0]["text"], "out\n");
    assert!(of_type(&events, "stdout")[0]["timestamp"].as_str().unwrap().contains('T'));
    assert_eq!(of_type(&events, "stderr")[0]["text"], "err\n");
    assert_eq!(text(&events), "a");
    let events = server.run(js("x + 1")).await;
    assert_eq!((&events[0]["execution_count"], text(&events)), (&json!(2), "2"));
    let code =
        "function subtract(x: number, y: number): number {\n  return x - y\n}\nsubtract(1, 2)";
    for language in ["ts", "typescript", "deno"] {
        let events = server.run(json!({"code": code, "language": language})).await;
        assert_eq!(text(&events), "-1");
    }
    for (code, wanted) in [
        ("async function main() { return 'later' }\nawait main()", "later"),
        ("require('fs').existsSync('/proc')", "true"),
        ("[1, {a: 2}]", "[ 1, { a: 2 } ]"),
        ("Deno.env.has('NO_COLOR')", "false"),
    ] {
        assert_eq!(text(&server.run(js(code)).await), wanted);
    }
}

/// Deno says that it is idle before it has published all; each of many results must be there.
#[tokio::test(flavor = "multi_thread")]
async fn no_result_comes_too_late() {
    let Some(server) = server(&[]).await else { return };
    for round in 0..40 {
        let code =
            format!("console.log('out {round}'); process.stdout.write('own {round}\\n'); {round}");
        let events = server.run(js(&code)).await;
        assert_eq!(text(&events), round.to_string());
        let mut printed: String =
            of_type(&events, "stdout").iter().map(|e| e["text"].as_str().unwrap()).collect();
        // The two ways out are not in order with each other.
        printed = printed.replacen(&format!("own {round}\n"), "", 1);
        assert_eq!(printed, format!("out {round}\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rich_results_of_javascript_have_their_fields() {
    let Some(server) = server(&[]).await else { return };
    for (code, field, wanted) in [
        ("Deno.jupyter.html`<b>`", "html", json!("<b>")),
        ("Deno.jupyter.md`m`", "markdown", json!("m")),
        ("Deno.jupyter.svg`<svg/>`", "svg", json!("<svg/>")),
        (
            "({[Symbol.for('Jupyter.display')]: () => ({'text/latex': 'l', 'image/png': 'p', \
             'application/json': {a: 1}, 'application/javascript': 'j'})})",
            "latex",
            json!("l"),
        ),
    ] {
        let events = server.run(js(code)).await;
        assert_eq!(of_type(&events, "result")[0][field], wanted, "{events:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_javascript_say_what_is_wrong() {
    let Some(server) = server(&[]).await else { return };
    let events = server.run(js("function f() { throw new TypeError('bad') }\nf()")).await;
    let errors = of_type(&events, "error");
    assert_eq!(errors.len(), 1);
    assert_eq!((&errors[0]["name"], &errors[0]["value"]), (&json!("TypeError"), &json!("bad")));
    assert!(errors[0]["traceback"].as_str().unwrap().contains("at f"), "{errors:?}");
    // Not read, so not run; and the message has the line of the cell.
    let events = server.run(js("globalThis.ran = true\nlet y = 5 +")).await;
    let errors = of_type(&events, "error");
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0]["name"], "SyntaxError");
    let value = errors[0]["value"].as_str().unwrap();
    assert!(value.contains("Expression expected") && value.contains("2 | let y = 5 +"), "{value}");
    assert_eq!(text(&server.run(js("typeof ran")).await), "undefined");
}

#[tokio::test(flavor = "multi_thread")]
async fn bash_keeps_its_state_and_tells_failures() {
    let Some(server) = server(&[]).await else { return };
    let events = server.run(bash("x=5\ncd /\necho \"a\nb\"")).await;
    assert_eq!(events[0], json!({"type": "number_of_executions", "execution_count": 1}));
    assert_eq!(server.stdout(bash("echo $x; pwd")).await, "5\n/\n");
    let events = server.run(bash("ls /no/such/place")).await;
    assert_eq!(of_type(&events, "error")[0]["value"], "2");
    let printed = of_type(&events, "stdout")[0]["text"].as_str().unwrap();
    assert!(printed.contains("No such file"), "{printed}");
    // A module of this name in the working directory is not the kernel's.
    let made =
        bash("cd /tmp && mkdir -p mica-cwd && echo 'raise SystemExit(9)' > mica-cwd/random.py");
    assert_eq!(of_type(&server.run(made).await, "error").len(), 0);
    let create = r#"{"language":"bash","cwd":"/tmp/mica-cwd"}"#;
    assert_eq!(server.ask("POST", "/contexts", create).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_are_right_in_every_language() {
    let Some(server) = server(&[("GLOBAL", "sandbox")]).await else { return };
    let odd = "it's \"1\" $HOME\t\\ \u{e9}\nend";
    let call = json!({"GLOBAL": "call", "A": odd});
    let cells = [
        ("js", "console.log(Deno.env.get('GLOBAL') + '|' + (process.env.A ?? 'none'))"),
        ("bash", "printf '%s|%s\\n' \"$GLOBAL\" \"${A-none}\""),
        ("python", "import os\nprint(os.environ['GLOBAL'], os.environ.get('A', 'none'), sep='|')"),
    ];
    for (language, code) in cells {
        let plain = json!({"code": code, "language": language});
        let with = json!({"code": code, "language": language, "env_vars": call});
        assert_eq!(server.stdout(plain.clone()).await, "sandbox|none\n", "{language}");
        assert_eq!(server.stdout(with).await, format!("call|{odd}\n"), "{language}");
        assert_eq!(server.stdout(plain.clone()).await, "sandbox|none\n", "{language}");
        let failing = json!({"code": "nonsense(", "language": language, "env_vars": call});
        assert_eq!(of_type(&server.run(failing).await, "error").len(), 1, "{language}");
        assert_eq!(server.stdout(plain).await, "sandbox|none\n", "{language}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_interrupts_any_kernel() {
    let Some(server) = server(&[]).await else { return };
    // The kernel gives way and keeps its state.
    for (language, before, endless, after, wanted) in [
        ("js", "var kept = 1", "console.log('begun'); while (true) {}", "console.log(kept)", "1\n"),
        ("bash", "kept=1", "echo begun; sleep 600", "echo $kept", "1\n"),
    ] {
        server.run(json!({"code": before, "language": language})).await;
        leave(&server, language, endless).await;
        let seen = json!({"code": after, "language": language});
        let stdout = timeout(Duration::from_secs(120), server.stdout(seen)).await.unwrap();
        assert_eq!(stdout, wanted, "{language}");
    }
    // Code that awaits gives way to nothing: its kernel is replaced.
    leave(&server, "js", "console.log('begun'); await new Promise(() => {})").await;
    let seen = js("console.log(typeof kept)");
    let stdout = timeout(Duration::from_secs(60), server.stdout(seen)).await.unwrap();
    assert_eq!(stdout, "undefined\n");
}

/// What a child of a cell prints without pause holds back neither the end of the cell, nor the next cell, nor
/// the interrupt of one whose client has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_floods_holds_nothing_back() {
    let Some(server) = server(&[]).await else { return };
    let flood = "var flood = new Deno.Command('yes', {args: ['flood'], stdin: 'null', \
                 stdout: 'inherit', stderr: 'null'}).spawn();";
    let within = |request| timeout(Duration::from_secs(60), server.run(request));
    // One is enough to keep the pipe full for as long as it lives.
    let events = within(js(&format!("{flood} 'started'"))).await.expect("the cell ends");
    assert_eq!(text(&events), "started");
    // The next cell, which is run while the child prints.
    let events = within(js("1 + 1")).await.expect("the next cell runs");
    assert_eq!(text(&events), "2");
    leave(&server, "js", "console.log('begun'); while (true) {}").await;
    let events = within(js("flood.kill(); 'gave way'")).await.expect("it is interrupted");
    assert_eq!(text(&events), "gave way");
    // What was still in the pipe goes to whoever runs next, and then there is no more.
    within(js("await flood.status; 0")).await.expect("the child has ended");
}

/// Sends a cell that prints that it has begun and does not end, and hangs up then.
async fn leave(server: &Server, language: &str, code: &str) {
    let request = json!({"code": code, "language": language}).to_string();
    let (_, mut reader) = server.open("POST", "/execute", &request).await;
    let begun = |event: Value| event["text"].as_str().is_some_and(|text| text.contains("begun"));
    while !begun(next_event(&mut reader).await.unwrap()) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn any_kernel_that_dies_is_told_and_replaced() {
    let Some(server) = server(&[]).await else { return };
    for (language, code) in [("js", "Deno.exit(3)"), ("bash", "kill -9 $PPID")] {
        let events = server.run(json!({"code": code, "language": language})).await;
        let error = of_type(&events, "error")[0];
        assert_eq!(error["name"], "UnexpectedEndOfExecution", "{language}");
        let again = json!({"code": "echo", "language": language});
        assert!(!server.run(again).await.is_empty());
    }
    assert_eq!(text(&server.run(js("1+1")).await), "2");
    assert_eq!(server.stdout(bash("echo back")).await, "back\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn contexts_of_every_language_are_listed_in_their_order() {
    let Some(server) = server(&[]).await else { return };
    let create = |body: Value| {
        let (server, body) = (&server, body.to_string());
        async move {
            let (status, text) = server.ask("POST", "/contexts", &body).await;
            assert_eq!(status, 200, "{text}");
            serde_json::from_str::<Value>(&text).unwrap()
        }
    };
    let made = create(json!({"language": "ts", "cwd": "/"})).await;
    assert_eq!((&made["language"], &made["cwd"]), (&json!("typescript"), &json!("/")));
    let here = |code: &str| json!({"code": code, "context_id": made["id"]});
    assert_eq!(text(&server.run(here("const y = 1; process.cwd()")).await), "/");
    assert_eq!(text(&server.run(js("typeof y")).await), "undefined");
    // As with E2B: Python starts at home where the directory is not there.
    let nowhere = create(json!({"language": "python", "cwd": "/no/such/place"})).await;
    assert_eq!(nowhere["cwd"], "/no/such/place");
    let listed: Value = serde_json::from_str(&server.ask("GET", "/contexts", "").await.1).unwrap();
    let languages: Vec<_> =
        listed.as_array().unwrap().iter().map(|context| context["language"].clone()).collect();
    assert_eq!(languages, ["python", "javascript", "bash", "typescript", "python"]);
    let restart = format!("/contexts/{}/restart", made["id"].as_str().unwrap());
    assert_eq!(server.ask("POST", &restart, "").await.0, 200);
    assert_eq!(text(&server.run(here("typeof y")).await), "undefined");
    let (status, text) = server.ask("POST", "/contexts", r#"{"language":"cobol"}"#).await;
    assert_eq!(status, 400);
    assert!(text.contains("'cobol'") && text.contains("typescript"), "{text}");
}
