//! `process.Process` of the real agent: start, output, input, signals, deadlines, terminals, and
//! requests that are wrong.

use serde_json::{Value, json};

use crate::support::{Agent, PATIENCE, TOKEN, encode};

fn shell(script: &str) -> Value {
    json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]}, "stdin": false})
}

#[test]
fn a_command_says_start_data_and_one_end() {
    let agent = Agent::start();
    let (pid, mut answer) = agent.start_process(&shell("echo out; echo err >&2; exit 3"));
    assert!(pid > 1);
    assert_eq!(answer.header("content-type"), Some("application/connect+json"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    let (out, err, end) = answer.rest();
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    let wanted = json!({"exitCode": 3, "exited": true, "status": "exit status 3",
                        "error": "exit status 3"});
    assert_eq!(end, wanted);
    let (_, mut answer) = agent.start_process(&shell("true"));
    let wanted = json!({"exitCode": 0, "exited": true, "status": "exit status 0"});
    assert_eq!(answer.rest().2, wanted);
}

/// As in a guest, where the program came in an initramfs that is gone by then.
#[test]
fn commands_start_when_the_program_has_no_name_any_more() {
    let mut program = std::path::PathBuf::new();
    let agent = Agent::start_prepared(|command, directory| {
        program = directory.join("mica-guest");
        std::fs::copy(command.get_program(), &program).unwrap();
        let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
        *command = std::process::Command::new(&program);
        command.args(args).stdout(std::process::Stdio::piped());
    });
    assert_eq!(agent.init("itest").error, None);
    std::fs::remove_file(&program).unwrap();
    let (_, mut answer) = agent.start_process(&shell("cat /proc/$PPID/comm"));
    assert_eq!(answer.rest().0, "mica-guest\n");
}

#[test]
fn input_reaches_the_process_and_its_end_too() {
    let agent = Agent::start();
    let message = json!({"process": {"cmd": "/bin/cat"}});
    let (pid, mut answer) = agent.start_process(&message);
    for text in ["one\n", "two\n"] {
        let input = json!({"process": {"pid": pid}, "input": {"stdin": encode(text)}});
        assert_eq!(agent.call("SendInput", &input), (200, json!({})));
    }
    let which = json!({"process": {"pid": pid}});
    assert_eq!(agent.call("CloseStdin", &which), (200, json!({})));
    let (out, _, end) = answer.rest();
    assert_eq!(out, "one\ntwo\n");
    assert_eq!(end["exitCode"], 0);
    let (status, error) = agent.call("CloseStdin", &which);
    assert_eq!((status, &error["code"]), (404, &json!("not_found")));
}

#[test]
fn a_process_without_input_reads_the_end_at_once() {
    let agent = Agent::start();
    let (_, mut answer) = agent.start_process(&shell("cat; echo over"));
    assert_eq!(answer.rest().0, "over\n");
    let (pid, mut answer) = agent.start_process(&shell("exec sleep 60"));
    let input = json!({"process": {"pid": pid}, "input": {"stdin": ""}});
    let (status, error) = agent.call("SendInput", &input);
    assert_eq!((status, &error["code"]), (400, &json!("failed_precondition")));
    agent.call("SendSignal", &json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGTERM"}));
    assert_eq!(answer.rest().2["status"], "signal: terminated");
}

#[test]
fn a_kill_is_told_even_while_children_hold_the_output() {
    let agent = Agent::start();
    let (pid, mut answer) = agent.start_process(&shell("echo on; sleep 60; echo x"));
    assert_eq!(answer.event().unwrap()["event"]["data"]["stdout"], encode("on\n"));
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    assert_eq!(agent.call("SendSignal", &kill), (200, json!({})));
    let wanted = json!({"exitCode": -1, "exited": false, "status": "signal: killed",
                        "error": "signal: killed"});
    assert_eq!(answer.rest().2, wanted);
    assert_eq!(agent.call("SendSignal", &kill).0, 404);
}

#[test]
fn the_deadline_ends_the_process_whether_or_not_the_client_stays() {
    let agent = Agent::start();
    let headers = "\r\nconnect-timeout-ms: 1500";
    let mut stays = agent.stream_with("Start", headers, &shell("sleep 60"));
    let mut leaves = agent.stream_with("Start", headers, &shell("sleep 60"));
    let pid = leaves.event().unwrap()["event"]["start"]["pid"].clone();
    let mut watcher = agent.stream("Connect", &json!({"process": {"pid": pid}}));
    leaves.hang_up();
    let error = stays.error();
    assert_eq!(error["code"], "deadline_exceeded");
    assert_eq!(error["message"], "context deadline exceeded");
    assert_eq!(watcher.event().unwrap()["event"]["start"]["pid"], pid);
    assert_eq!(watcher.rest().2["status"], "signal: killed");
    // A stream ends at its deadline by itself; its process is gone soon after.
    let start = std::time::Instant::now();
    while agent.call("List", &json!({})) != (200, json!({"processes": []})) {
        assert!(start.elapsed() < PATIENCE, "a process outlived its deadline");
    }
}

#[test]
fn a_client_that_leaves_leaves_the_process() {
    let agent = Agent::start();
    let message = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "read x; echo got $x; exit 4"],
        "envs": {"A": "1"}}, "tag": "mine"});
    let (pid, answer) = agent.start_process(&message);
    answer.hang_up();
    let (_, list) = agent.call("List", &json!({}));
    assert_eq!(list["processes"][0]["pid"], pid);
    assert_eq!(list["processes"][0]["tag"], "mine");
    assert_eq!(list["processes"][0]["config"], message["process"]);
    let mut first = agent.stream("Connect", &json!({"process": {"tag": "mine"}}));
    let mut second = agent.stream("Connect", &json!({"process": {"pid": pid}}));
    for watcher in [&mut first, &mut second] {
        assert_eq!(watcher.event().unwrap()["event"]["start"]["pid"], pid);
    }
    let input = json!({"process": {"tag": "mine"}, "input": {"stdin": encode("it\n")}});
    assert_eq!(agent.call("SendInput", &input).0, 200);
    for watcher in [&mut first, &mut second] {
        let (out, _, end) = watcher.rest();
        assert_eq!((out.as_str(), &end["exitCode"]), ("got it\n", &json!(4)));
    }
    // The exit can still be asked for, the process is no longer listed.
    let mut late = agent.stream("Connect", &json!({"process": {"pid": pid}}));
    assert_eq!(late.event().unwrap()["event"]["start"]["pid"], pid);
    assert_eq!(late.rest().2["exitCode"], 4);
    assert_eq!(agent.call("List", &json!({})), (200, json!({"processes": []})));
}

#[test]
fn a_terminal_has_its_size_and_is_the_controlling_one() {
    let agent = Agent::start();
    let script = "stty size; read x; stty size; echo from $x > /dev/tty; exit 5";
    let message = json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]},
        "pty": {"size": {"cols": 90, "rows": 30}}});
    let (pid, mut answer) = agent.start_process(&message);
    assert_eq!(answer.event().unwrap()["event"]["data"]["pty"], encode("30 90\r\n"));
    let update = json!({"process": {"pid": pid}, "pty": {"size": {"cols": 100, "rows": 40}}});
    assert_eq!(agent.call("Update", &update), (200, json!({})));
    let (status, error) = agent.call("CloseStdin", &json!({"process": {"pid": pid}}));
    assert_eq!((status, &error["code"]), (400, &json!("failed_precondition")));
    let input = json!({"process": {"pid": pid}, "input": {"pty": encode("tty\n")}});
    assert_eq!(agent.call("SendInput", &input).0, 200);
    let (out, _, end) = answer.rest();
    assert!(out.contains("40 100\r\n") && out.contains("from tty\r\n"), "{out:?}");
    assert_eq!(end["exitCode"], 5);
}

#[test]
fn silence_is_filled_with_keepalives() {
    let agent = Agent::start();
    let headers = "\r\nkeepalive-ping-interval: 1";
    let mut answer = agent.stream_with("Start", headers, &shell("sleep 1.5; echo x"));
    answer.event().unwrap();
    assert_eq!(answer.event().unwrap(), json!({"event": {"keepalive": {}}}));
    assert_eq!(answer.rest().0, "x\n");
}

#[test]
fn the_environment_is_the_users_the_sandboxs_and_the_calls() {
    let agent = Agent::start();
    let script = "echo $HOME $USER $LOGNAME $OF_THE_SANDBOX $E2B_SANDBOX $E2B_SANDBOX_ID $E2B_TEMPLATE_ID $A; \
                  pwd; test -n \"$PATH\" && echo path";
    let message = json!({"process": {"cmd": "sh", "args": ["-c", script],
        "envs": {"A": "call", "OF_THE_SANDBOX": "2", "": "x", "B=C": "y"}, "cwd": "~"},
        "stdin": false});
    let (out, _, _) = agent.start_process(&message).1.rest();
    assert_eq!(out, "/root root root 2 true itest template call\n/root\npath\n");
}

#[test]
fn much_output_comes_whole_and_a_slow_client_slows_its_process() {
    let agent = Agent::start();
    let message = shell("head -c 3000000 /dev/zero | tr '\\0' a");
    let (_, mut answer) = agent.start_process(&message);
    assert_eq!(answer.rest().0.len(), 3_000_000);
    // Nobody reads this one: the process must not get far ahead, and must not be in the way.
    let (pid, stuck) = agent.start_process(&shell("yes"));
    let (_, mut other) = agent.start_process(&shell("echo here"));
    assert_eq!(other.rest().0, "here\n");
    stuck.hang_up();
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    assert_eq!(agent.call("SendSignal", &kill).0, 200);
}

#[test]
fn wrong_requests_are_told_so() {
    let agent = Agent::start();
    let refused = |message: &Value| {
        let error = agent.stream("Start", message).error();
        (error["code"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
    };
    let (code, text) = refused(&json!({"process": {"cmd": "/bin/true", "cwd": "/no/such"}}));
    assert_eq!(
        (code.as_str(), text.as_str()),
        ("invalid_argument", "cwd '/no/such' does not exist")
    );
    let (code, text) = refused(&json!({"process": {"cmd": "/no/such"}}));
    assert_eq!(code, "invalid_argument");
    assert!(text.starts_with("error starting process: fork/exec /no/such: No such file"), "{text}");
    assert_eq!(refused(&json!({"process": {"cmd": ""}})).0, "invalid_argument");
    assert_eq!(refused(&json!({"nothing": 1})).0, "invalid_argument");

    for (method, message) in [
        ("SendSignal", json!({"process": {"pid": 4_000_000}, "signal": "SIGNAL_SIGKILL"})),
        ("SendInput", json!({"process": {"tag": "no"}, "input": {"stdin": ""}})),
        ("Update", json!({"process": {"pid": 4_000_000}})),
    ] {
        let (status, error) = agent.call(method, &message);
        assert_eq!((status, &error["code"]), (404, &json!("not_found")), "{method}");
    }
    let error = agent.stream("Connect", &json!({"process": {"pid": 4_000_000}})).error();
    assert_eq!(error["message"], "process with pid 4000000 not found");
    let (status, error) =
        agent.call("SendSignal", &json!({"process": {"pid": 1}, "signal": "SIGNAL_SIGHUP"}));
    assert_eq!((status, &error["code"]), (400, &json!("invalid_argument")));
}

#[test]
fn wrong_bytes_are_told_so_and_hurt_nobody() {
    let agent = Agent::start();
    let head = |kind: &str, more: &str| {
        format!(
            "POST /process.Process/Start HTTP/1.1\r\nx-access-token: {TOKEN}\r\n\
             content-type: {kind}{more}"
        )
    };
    let stream = "application/connect+json";
    for (body, code) in [
        (&b"\0\0\0\0\x01{"[..], "invalid_argument"),
        (&b"\0\xff\xff\xff\xff{}"[..], "resource_exhausted"),
        (&b"\x01\0\0\0\x02{}"[..], "unimplemented"),
        (&b""[..], "invalid_argument"),
    ] {
        let mut answer = agent.request(&head(stream, ""), body);
        assert_eq!((answer.status, &answer.error()["code"]), (200, &json!(code)), "{body:?}");
    }
    let answer = agent.request(&head("application/connect+xml", ""), b"");
    assert_eq!(answer.status, 415);
    let wanted = "application/connect+json, application/connect+proto";
    assert_eq!(answer.header("accept-post"), Some(wanted));
    assert_eq!(agent.request(&head("application/json", ""), b"{}").status, 415);
    let large = format!("\r\nx-large: {}", "a".repeat(100_000));
    assert_eq!(agent.request(&head(stream, &large), b"").status, 431);

    let list = "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json";
    let authorised = format!("{list}\r\nx-access-token: {TOKEN}");
    let mut answer = agent.request(&authorised, b"{");
    let error: Value = serde_json::from_slice(&answer.body()).unwrap();
    assert_eq!((answer.status, &error["code"]), (400, &json!("invalid_argument")));
    assert_eq!(agent.call("List", &json!({"unknown": 1})).0, 200);
}

#[test]
fn another_user_is_another_user() {
    let agent = Agent::start();
    // `nobody:` and `no-such-user:` in base64.
    let start = |user: &str, script: &str| {
        let mut message = shell(script);
        message["process"]["cwd"] = json!("/");
        agent.stream_with("Start", &format!("\r\nauthorization: Basic {user}"), &message)
    };
    let error = start("bm8tc3VjaC11c2VyOg==", "id").error();
    assert_eq!(error["code"], "unauthenticated");
    assert_eq!(error["message"], "invalid username: 'no-such-user'");
    let script =
        "id -u; id -G; cat /proc/self/oom_score_adj; ps -o sid= -p $$ | tr -d ' '; echo $$";
    let (out, _, end) = {
        let mut answer = start("bm9ib2R5Og==", script);
        answer.event().unwrap();
        answer.rest()
    };
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..3], ["65534", "65534", "100"], "{end}");
    assert_eq!(lines[3], lines[4], "a command leads its own session");

    let mut message = shell("stat -c %u $(tty)");
    message["process"]["cwd"] = json!("/");
    message["pty"] = json!({"size": {"cols": 80, "rows": 24}});
    let mut answer = agent.stream_with("Start", "\r\nauthorization: Basic bm9ib2R5Og==", &message);
    answer.event().unwrap();
    assert_eq!(answer.rest().0, "65534\r\n", "a terminal belongs to its user");
}

#[test]
fn commands_end_with_their_agent() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let agent = Agent::start();
    let (pid, _answer) = agent.start_process(&shell("exec sleep 600"));
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    drop(agent);
    let patience = Timespec::try_from(crate::support::PATIENCE).unwrap();
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)).unwrap();
    assert_eq!(ended, 1, "the command outlived its agent");
}
