//! `mica lab simulate` as a person runs it: one seed one output, refusals of each policy, and every kind of nonsense.
//!
//! Called by `cargo test`. Refuses nothing: it needs neither root nor KVM.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// A load that takes a moment, on a fleet with room for it.
const SMALL: [&str; 8] =
    ["--hosts", "10", "--arrivals", "20000", "--rate", "40", "--templates", "5"];

const POLICIES: [&str; 6] = [
    "least-of-two",
    "least-of-two-strict",
    "least-of-two-anywhere",
    "least-loaded",
    "round-robin",
    "random",
];

fn simulate(options: &[&str]) -> Output {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_mica-lab"));
    lab.arg("simulate").args(options).output().unwrap()
}

/// What it printed, and nothing beside that.
fn printed(options: &[&str]) -> String {
    let ran = simulate(options);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.is_empty(), "{options:?}: {said}");
    String::from_utf8(ran.stdout).unwrap()
}

fn json(options: &[&str]) -> Value {
    serde_json::from_str(&printed(&[options, &["--json"]].concat())).unwrap()
}

/// A file that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, text: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("mica-simulate-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

#[test]
fn one_seed_is_one_output_and_another_is_another() {
    let with = |seed: &str, more: &[&str]| {
        printed(&[&SMALL[..], &["--burst", "5", "--seed", seed], more].concat())
    };
    for more in [&[][..], &["--json"]] {
        let first = with("7", more);
        assert_eq!(first, with("7", more));
        assert_ne!(first, with("8", more));
        for policy in POLICIES {
            assert!(first.contains(policy), "{policy} is not in {first}");
        }
    }
}

#[test]
fn what_each_policy_refuses_is_said() {
    // 2000 would be alive, and 1000 have room: about half of what comes later goes away.
    let short = ["--hosts", "10", "--slots", "100", "--arrivals", "20000", "--rate", "400"];
    let short = [&short[..], &["--life", "5", "--templates", "1"]].concat();
    let shown = json(&short);
    let results = shown["results"].as_array().unwrap();
    assert_eq!(results.len(), POLICIES.len(), "{shown}");
    let table = printed(&short);
    for (result, policy) in results.iter().zip(POLICIES) {
        assert_eq!(result["policy"], policy);
        let refused = result["refused"].as_u64().unwrap();
        let created = result["created"].as_u64().unwrap();
        assert_eq!(refused + created, 20_000, "{result}");
        assert!((6_000..=12_000).contains(&refused), "{result}");
        let mut lines = table.lines().filter(|line| line.split(' ').next() == Some(policy));
        let line = lines.next().unwrap_or_else(|| panic!("no line of {policy}: {table}"));
        assert_eq!(line.split_whitespace().nth(6), Some(&refused.to_string()[..]), "{line}");
    }
    let one = json(&[&short[..], &["--policy", "random,least-loaded"]].concat());
    let named: Vec<_> = one["results"].as_array().unwrap().iter().map(|r| &r["policy"]).collect();
    assert_eq!(
        named,
        ["random", "least-loaded"],
        "only those, in the order that they were asked for"
    );
    // With room for all, nobody is refused.
    for result in json(&SMALL)["results"].as_array().unwrap() {
        assert_eq!(result["refused"], 0, "{result}");
    }
}

#[test]
fn a_trace_is_replayed() {
    // Two hosts of one slot; the third comes while both are taken, the fourth when they are free again.
    let text = "time_s,template,life_s,memory_mib\n\n# one, two, three\n0,a,10,512\n1,b,10\n2,a,10\n60,a,1\n";
    let trace = Scratch::new("trace.csv", text);
    let shown = json(&["--trace", trace.path(), "--hosts", "2", "--slots", "1"]);
    for result in shown["results"].as_array().unwrap() {
        assert_eq!((&result["created"], &result["refused"]), (&3.into(), &1.into()), "{result}");
    }
}

/// What `mica plan` says of the same host.
fn plan(host: &str) -> Value {
    let beside = || PathBuf::from(env!("CARGO_BIN_EXE_mica-lab")).with_file_name("mica");
    let bin = std::env::var_os("MICA_BIN_DIR");
    let mica = bin.map_or_else(beside, |bin| PathBuf::from(bin).join("mica"));
    let words = ["plan", "--rps=1000", "--live=1000000", "--json", "--host", host];
    let ran = Command::new(mica).args(words).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    serde_json::from_slice(&ran.stdout).unwrap()
}

#[test]
fn a_host_of_a_plan_holds_as_many_as_the_plan_says() {
    let host = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/host.json");
    // More than have room, that live longer than all of it takes.
    let load = ["--host", host, "--hosts", "1", "--arrivals", "6000", "--rate", "10000"];
    let load =
        [&load[..], &["--life", "100000", "--templates", "1", "--policy", "random"]].concat();
    let with = |more: &[&str]| json(&[&load[..], more].concat());
    let (simulated, planned) = (with(&[]), plan(host));
    let allowed = &planned["host"]["sandboxes_max"];
    assert_eq!(simulated["host"]["slots"].as_f64(), allowed.as_f64());
    assert_eq!(simulated["results"][0]["live_max"].as_f64(), allowed.as_f64(), "{simulated}");
    assert_eq!(simulated["host"]["shards"].as_f64(), planned["host"]["shards"].as_f64());
    let mib = simulated["host"]["memory_mib"].as_f64().unwrap();
    assert_eq!(Some(mib * 1024.0 * 1024.0), planned["host"]["memory_bytes"].as_f64());
    // What is said beside the file wins, each by itself.
    let own = with(&["--slots", "10", "--shards", "1"]);
    assert_eq!((&own["host"]["slots"], &own["host"]["shards"]), (&10.into(), &1.into()));
    assert_eq!(own["host"]["memory_mib"], simulated["host"]["memory_mib"]);
    assert_eq!(own["results"][0]["live_max"], 10);
    let full = with(&["--memory-mib", "2400"]);
    assert_eq!(full["results"][0]["live_max"], 100, "of 24 MiB each, as the plan has it");
    let large = with(&["--sandbox-mib", "2048"]);
    assert_eq!(large["results"][0]["live_max"], 187, "384000 MiB by 2048");
}

#[test]
fn nonsense_is_refused_and_named() {
    let bad_trace = Scratch::new("bad.csv", "0,a,1\n1,a,soon\n");
    let backwards = Scratch::new("backwards.csv", "5,a,1\n1,a,1\n");
    let empty = Scratch::new("empty.csv", "# nothing\n");
    let report = Scratch::new("report.json", "{\"results\": 7}");
    let text = Scratch::new("text.json", "not JSON");
    let other = Scratch::new("host.json", "{\"cores\": 4, \"sockets\": 2}");
    for (options, expected) in [
        (&["--hosts", "0"][..], "hosts"),
        (&["--hosts", "many"], "--hosts"),
        (&["--slots", "0"], "slot"),
        (&["--host", "/nonexistent/host.json"], "cannot open /nonexistent/host.json"),
        (&["--host", other.path()], "unknown field `sockets`"),
        (&["--sandbox-mib", "0"], "--sandbox-mib"),
        (&["--rate", "0"], "the rate must be"),
        (&["--rate=-5"], "the rate must be"),
        (&["--rate", "NaN"], "the rate must be"),
        (&["--life", "0"], "a life must have"),
        (&["--burst", "0.5"], "a burst must be"),
        (&["--templates", "0"], "templates must be"),
        (&["--arrivals", "0"], "arrivals must be"),
        (&["--policy", "best"], "least-of-two"),
        (&["--seed=-1"], "--seed"),
        (&["--trace", "/nonexistent/trace.csv"], "cannot open /nonexistent/trace.csv"),
        (&["--trace", bad_trace.path()], "line 2: life_s is not a number: \"soon\""),
        (&["--trace", backwards.path()], "line 2: its time is before that of the last"),
        (&["--trace", empty.path()], "there are no arrivals in it"),
        (&["--trace", empty.path(), "--rate", "5"], "--rate"),
        (&["--measured", "/nonexistent/report.json"], "cannot open /nonexistent/report.json"),
        (&["--measured", text.path()], "is not JSON"),
        (&["--measured", report.path()], report.path()),
    ] {
        let ran = simulate(options);
        let said = String::from_utf8(ran.stderr).unwrap();
        assert!(!ran.status.success(), "{options:?} is taken");
        assert!(ran.stdout.is_empty(), "{options:?}");
        assert!(said.contains(expected), "{options:?}: {said}");
        assert!(!said.contains("panicked"), "{options:?}: {said}");
    }
}
