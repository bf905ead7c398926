//! Style as a test: the layer table, file headers, sizes, unsafe code, words that must not appear,
//! documents that name what is not there.
//!
//! Called by `cargo test --test tidy`. Refuses exceptions without a line in the tables below. Each
//! check is a pure function over the tree, and each has a test that shows it can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Which of our crates each crate may name in its manifest: arrows point down, and `lab` is above
/// everything. `vmm` and `guest` are programs of their own.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("wire", &["units"]),
    ("numa", &["units"]),
    ("storage", &["units", "numa"]),
    ("shards", &["units", "wire", "numa", "storage"]),
    ("http", &["units", "wire", "shards"]),
    ("vmm", &["units", "wire"]),
    ("guest", &["units", "wire"]),
    ("mica", &["units", "wire", "numa", "storage", "shards", "http"]),
    ("lab", &["units", "wire", "numa", "storage", "shards", "http", "vmm", "guest"]),
];

/// The only crates that may import these packages.
const OWNED_PACKAGES: &[(&str, &[&str])] = &[
    ("glommio", &["numa"]),
    ("hwloc2", &["numa"]),
    ("core_affinity", &["numa"]),
    // `lab` holds the benchmark's floor: the same KVM calls in a bare loop.
    ("kvm-ioctls", &["vmm", "lab"]),
    ("kvm-bindings", &["vmm", "lab"]),
    ("io-uring", &["vmm", "numa"]),
    ("hyper", &["http", "guest"]),
    ("anyhow", &["mica", "lab"]),
];

/// Where `unsafe` may stand. Everything else is `forbid(unsafe_code)` or `deny`.
const UNSAFE_MODULES: &[&str] = &[
    "numa/src/sys.rs",
    "numa/src/arena.rs",
    "numa/src/io/buf.rs",
    // Pushing an entry hands the kernel addresses and descriptor numbers. They are good because the
    // same module owns the buffer and the file until the completion; apart, neither half is an argument.
    "numa/src/io/ring.rs",
    // A signal handler, and the clocks and signals of single threads.
    "numa/src/watchdog/capture.rs",
    "vmm/src/kvm/",
    "vmm/src/memory/",
    // madvise(2) takes a raw address.
    "vmm/src/discard.rs",
    "vmm/src/ring.rs",
    // close_range(2) and fork(2) have no safe wrappers.
    "vmm/src/jail/descriptors.rs",
    "vmm/src/jail/process.rs",
    // Raw system calls that break out of the jail, for its tests.
    "vmm/src/breakout.rs",
];

/// The user's names for the top level, which stay where they are.
const TOP_LEVEL: &[&str] =
    &["Cargo.toml", "src", "shards", "numa", "vmm", "storage", "http", "benches", "tests", "docs"];

const FILE_LINES_MAX: usize = 500;

/// Words that must not appear in a Rust file, and what to write instead.
const BANNED: &[(&str, &str)] = &[
    (concat!("FIX", "ME"), "mend it, or say in a comment what is missing and why"),
    (concat!("TO", "DO"), "do it, or say in a comment what is missing and why"),
    (concat!("dbg", "!("), "tracing"),
    (concat!("trivially", " safe"), "an argument: which precondition, and why it holds"),
    (concat!("Safe", " because values are valid"), "which values, and who checked them"),
    (concat!("#[ig", "nore]"), "a test that runs, or none"),
    (concat!("#[al", "low("), "#[expect(..., reason = \"...\")]"),
    (concat!("#![al", "low("), "#![expect(..., reason = \"...\")]"),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn folder(crate_name: &str) -> PathBuf {
    if crate_name == "mica" { root() } else { root().join(crate_name) }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

/// Every file below `dir` with one of the `extensions`, build output left out.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("list {}: {e}", dir.display()));
        for entry in entries {
            let entry = entry.expect("read a directory entry");
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && !name.starts_with("target") && name != "goldens" {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}

fn rust_files() -> Vec<(String, String)> {
    files(&root(), &["rs"]).iter().map(|p| (relative(p), read(p))).collect()
}

fn assert_clean(what: &str, complaints: &[String]) {
    assert!(complaints.is_empty(), "{what}:\n  {}", complaints.join("\n  "));
}

/// The names a manifest depends on, in any of its dependency tables.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let table: toml::Table = manifest.parse().expect("manifest is TOML");
    ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|section| table.get(*section)?.as_table())
        .flat_map(|section| section.keys().cloned())
        .collect()
}

fn layer_complaints(crate_name: &str, manifest: &str) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = LAYERS.iter().copied().collect();
    let allowed = allowed.get(crate_name).copied().unwrap_or(&[]);
    let mut complaints = Vec::new();
    for name in dependencies(manifest) {
        if let Some(ours) = name.strip_prefix("mica-")
            && !allowed.contains(&ours)
        {
            complaints.push(format!("{crate_name} must not depend on {ours}: arrows point down"));
        }
        let owners = OWNED_PACKAGES.iter().find(|(package, _)| *package == name);
        if let Some((package, owners)) = owners
            && !owners.contains(&crate_name)
        {
            complaints.push(format!("{crate_name} must not import {package}: only {owners:?} may"));
        }
    }
    complaints
}

#[test]
fn arrows_point_down() {
    let mut complaints = Vec::new();
    for (name, _) in LAYERS {
        complaints.extend(layer_complaints(name, &read(&folder(name).join("Cargo.toml"))));
    }
    assert_clean("layers", &complaints);
}

#[test]
fn every_workspace_member_is_in_the_layer_table() {
    let manifest: toml::Table = read(&root().join("Cargo.toml")).parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap();
    for member in members.iter().map(|m| m.as_str().unwrap()) {
        assert!(LAYERS.iter().any(|(name, _)| *name == member), "{member} has no layer");
    }
}

#[test]
fn the_layer_check_can_fail() {
    let upward = "[dependencies]\nmica-shards.workspace = true\nglommio.workspace = true\n";
    assert_eq!(layer_complaints("storage", upward).len(), 2);
    let sideways = "[dev-dependencies]\nmica-lab = { path = \"../lab\" }\n";
    assert_eq!(layer_complaints("vmm", sideways).len(), 1);
}

#[test]
fn the_top_level_keeps_its_names() {
    for name in TOP_LEVEL {
        assert!(root().join(name).exists(), "{name} is gone from the top level");
    }
}

fn header_complaint(path: &str, text: &str) -> Option<String> {
    let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!/"));
    let opens = first.is_some_and(|line| line.starts_with("//!"));
    (!opens).then(|| format!("{path} does not open with `//!`: say what it is, who calls it"))
}

#[test]
fn every_file_says_what_it_is() {
    let complaints: Vec<_> =
        rust_files().iter().filter_map(|(path, text)| header_complaint(path, text)).collect();
    assert_clean("headers", &complaints);
    assert!(header_complaint("x.rs", "use std::fs;\n").is_some(), "the check cannot fail");
}

/// Files above [`FILE_LINES_MAX`], each with the length it may not pass: `tests/tidy/ratchet.txt`.
fn ratchet() -> BTreeMap<String, usize> {
    read(&root().join("tests/tidy/ratchet.txt"))
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (path, lines) = line.rsplit_once(' ').expect("PATH LINES");
            (path.to_owned(), lines.parse().expect("a number of lines"))
        })
        .collect()
}

#[test]
fn files_stay_small() {
    let ratchet = ratchet();
    let mut complaints = Vec::new();
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        let limit = ratchet.get(&path).copied().unwrap_or(FILE_LINES_MAX);
        if lines > limit {
            complaints.push(format!("{path}: {lines} lines, limit {limit}: split it by meaning"));
        } else if ratchet.contains_key(&path) && lines <= FILE_LINES_MAX {
            complaints.push(format!("{path}: {lines} lines now: take it out of the ratchet"));
        }
    }
    for path in ratchet.keys().filter(|path| !root().join(path).exists()) {
        complaints.push(format!("{path} is in the ratchet and does not exist"));
    }
    assert_clean("sizes", &complaints);
}

/// Whether the file contains the keyword outside a comment.
fn has_unsafe(text: &str) -> bool {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).any(|code| {
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe("]
            .iter()
            .any(|form| code.contains(form))
    })
}

#[test]
fn unsafe_code_stays_in_its_modules() {
    let mut complaints = Vec::new();
    for (path, text) in rust_files() {
        let named = UNSAFE_MODULES.iter().any(|module| path.starts_with(module));
        if has_unsafe(&text) && !named && path != "tests/tidy.rs" {
            complaints.push(format!("{path} has unsafe code and is not one of {UNSAFE_MODULES:?}"));
        }
    }
    for (name, _) in LAYERS {
        for entry in ["src/lib.rs", "src/main.rs"] {
            let path = folder(name).join(entry);
            if !path.exists() {
                continue;
            }
            let text = read(&path);
            let level = if matches!(*name, "numa" | "vmm") { "deny" } else { "forbid" };
            let attribute = format!("#![{level}(unsafe_code)]");
            if !text.contains(&attribute) && !text.contains("#![forbid(unsafe_code)]") {
                complaints.push(format!("{} lacks {attribute}", relative(&path)));
            }
        }
    }
    assert_clean("unsafe", &complaints);
    assert!(has_unsafe("let x = unsafe { 1 };"), "the check cannot fail");
}

#[test]
fn banned_words_are_absent() {
    let mut complaints = Vec::new();
    for (path, text) in rust_files() {
        for (number, line) in text.lines().enumerate() {
            for (word, instead) in BANNED {
                if line.contains(word) {
                    complaints.push(format!("{path}:{}: {word}: {instead}", number + 1));
                }
            }
            let literal = line.split("expect(\"").nth(1).and_then(|rest| rest.split('"').next());
            if literal.is_some_and(|text| text.contains('{')) {
                complaints.push(format!("{path}:{}: expect does not interpolate", number + 1));
            }
        }
    }
    assert_clean("banned words", &complaints);
}

/// Whether `path` is named by a `mod` in the file that should name it.
fn is_reachable(path: &str, tree: &BTreeMap<String, String>) -> bool {
    let Some((dir, file)) = path.rsplit_once('/') else { return true };
    let stem = file.trim_end_matches(".rs");
    let entry = matches!(stem, "lib" | "main" | "build");
    // Cargo finds these by itself.
    let target = dir.ends_with("/bin")
        // Its manifest names them, and `tools/fuzz` runs each.
        || dir == "tests/fuzz/fuzz_targets"
        || ["tests", "benches", "examples"]
            .iter()
            .any(|t| dir == *t || dir.ends_with(&format!("/{t}")));
    if entry || target {
        return true;
    }
    let (dir, stem) =
        if stem == "mod" { dir.rsplit_once('/').unwrap_or(("", dir)) } else { (dir, stem) };
    let mut parents = vec![format!("{dir}.rs")];
    for name in ["mod.rs", "lib.rs", "main.rs"] {
        parents.push(if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") });
    }
    // A module of a test or of a program in src/bin: any file beside it may name it.
    parents
        .extend(tree.keys().filter(|p| p.rsplit_once('/').is_some_and(|(d, _)| d == dir)).cloned());
    parents
        .iter()
        .filter_map(|p| tree.get(p))
        .any(|text| text.lines().map(str::trim).any(|line| line.ends_with(&format!("mod {stem};"))))
}

#[test]
fn no_file_is_dead() {
    let tree: BTreeMap<String, String> = rust_files().into_iter().collect();
    let complaints: Vec<_> = tree
        .keys()
        .filter(|path| !is_reachable(path, &tree))
        .map(|path| format!("{path} is named by no `mod`"))
        .collect();
    assert_clean("dead files", &complaints);
}

/// Paths in backquotes that look like files of this repository.
fn named_paths(text: &str) -> Vec<String> {
    let tops: Vec<String> = LAYERS
        .iter()
        .map(|(name, _)| format!("{name}/"))
        .chain(["src/", "tests/", "docs/", "benches/", "examples/"].map(str::to_owned))
        .collect();
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter(|span| tops.iter().any(|top| span.starts_with(top.as_str())))
        .filter(|span| !span.contains([' ', '*', '{', '<', '$', ':']))
        .map(str::to_owned)
        .collect()
}

#[test]
fn documents_name_what_exists() {
    let mut complaints = Vec::new();
    for path in files(&root(), &["md"]) {
        // Code blocks hold commands and trees, not references.
        let prose: String = read(&path).split("```").step_by(2).collect();
        for named in named_paths(&prose) {
            if !root().join(named.trim_end_matches('/')).exists() {
                complaints.push(format!("{} names `{named}`, which is not there", relative(&path)));
            }
        }
    }
    assert_clean("documents", &complaints);
}

#[test]
fn decisions_have_a_status_and_a_date() {
    let records: Vec<_> = files(&root().join("docs/adr"), &["md"]);
    assert!(!records.is_empty(), "docs/adr is empty");
    for path in records {
        let text = read(&path);
        for field in ["Status: ", "Date: "] {
            assert!(
                text.lines().any(|line| line.starts_with(field)),
                "{} has no line `{field}`",
                relative(&path)
            );
        }
    }
}
