//! `mica top --once` against a daemon: what it prints is what the API says, and what is wrong is told.

use std::process::{Command, Output};

use crate::daemon::{Daemon, NO_POOL, free_address};

/// Runs it without what this environment may say of other hosts.
fn top(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["top", "--once"])
        .args(arguments)
        .env_remove("E2B_API_URL")
        .env_remove("E2B_API_KEY")
        .env("COLUMNS", "130")
        .output()
        .expect("mica top")
}

fn frame(arguments: &[&str]) -> String {
    let output = top(arguments);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn refused(arguments: &[&str], says: &str) {
    let output = top(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(error.contains(says), "{error}");
}

/// The words of the line that begins so.
fn words<'a>(frame: &'a str, begins: &str) -> Vec<&'a str> {
    let line = frame.lines().find(|line| line.starts_with(begins));
    line.unwrap_or_else(|| panic!("no line begins with {begins}:\n{frame}"))
        .split_whitespace()
        .collect()
}

#[test]
fn a_frame_has_what_the_host_has() {
    let daemon = Daemon::start_with(&NO_POOL);
    let (url, key) = (daemon.url(), daemon.key().to_owned());
    let asked = ["--url", &url, "--api-key", &key];
    assert!(frame(&asked).contains("no sandboxes"));
    let (first, second) = (daemon.create(), daemon.create());
    daemon.pause(&first);
    let frame = frame(&asked);
    assert!(frame.contains("2 sandboxes: 1 running, 1 paused"), "{frame}");
    assert!(frame.starts_with(&format!("Mica {} at {url}, Linux ", env!("CARGO_PKG_VERSION"))));
    let state = daemon.ask("GET", "/ui/state", None).json();
    for shard in state["host"]["shards"].as_array().expect("shards") {
        let number = |name: &str| shard[name].as_u64().expect("a number");
        let wanted = format!("{:>4} core {}", number("shard"), number("core"));
        assert!(frame.contains(&wanted), "{wanted}:\n{frame}");
    }
    assert_eq!(words(&frame, "create")[1..3], ["2", "0"]);
    assert_eq!(words(&frame, "pause")[1..3], ["1", "0"]);
    assert_eq!(words(&frame, "kill")[1..], ["0", "0", "–", "–"]);
    assert!(["ms", "s", "µs"].contains(&words(&frame, "create")[4]), "{frame}");
    assert_eq!(words(&frame, &first)[1], "paused");
    assert_eq!(words(&frame, &second)[1], "running");
    assert!(frame.lines().all(|line| !line.contains('\u{1b}') && line.chars().count() <= 130));
    // The youngest first. By memory both may be the same: a paused one is kept in its process at first.
    let by_age = self::frame(&[&asked[..], &["--sort", "age"]].concat());
    let place = |id: &str| by_age.lines().position(|line| line.starts_with(id));
    assert!(place(&second).is_some() && place(&second) < place(&first), "{by_age}");
}

#[test]
fn what_is_wrong_is_said_with_what_to_change() {
    let daemon = Daemon::start_with(&["--metrics", "off"]);
    let (url, key) = (daemon.url(), daemon.key().to_owned());
    let whole = frame(&["--url", &url, "--api-key", &key]);
    assert!(whole.contains("operations are not counted"), "{whole}");
    refused(&["--url", &url], "--api-key");
    refused(&["--url", &url, "--api-key", "e2b_00"], "does not take this key");
    let other = daemon.make_key(&["--tenant", "other"]);
    refused(&["--url", &url, "--api-key", &other], "the operator's tenant");
    refused(&["--url", &format!("http://{}", free_address())], "is `mica serve` running there?");
    refused(&["--url", "https://localhost"], "no TLS");
    // Without a terminal there is no screen to take.
    let output = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["top", "--url", &url, "--api-key", &key])
        .output()
        .expect("mica top");
    assert!(!output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("--once"), "{output:?}");
}
