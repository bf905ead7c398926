//! `docs/metrics.md` has a table of every family of numbers, made of the one in the code.
//!
//! Run by `cargo test`. With `MICA_BLESS=1` it writes the table anew; without, it refuses a page that says
//! something else.

use std::fmt::Write;
use std::path::PathBuf;

use mica_http::families;

const BEGIN: &str =
    "<!-- The table is made by `MICA_BLESS=1 cargo test --test metrics_page`. -->\n";
const END: &str = "<!-- End of the table. -->\n";

fn table() -> String {
    let mut table =
        String::from("| name | kind | unit | labels | what it is |\n|---|---|---|---|---|\n");
    for family in families() {
        let own = family.labels.iter().copied();
        let shared = if family.per_shard { vec!["shard", "node"] } else { Vec::new() };
        let labels: Vec<String> =
            shared.into_iter().chain(own).map(|label| format!("`{label}`")).collect();
        let unit = if family.unit.is_empty() { "–" } else { family.unit };
        writeln!(
            table,
            "| `{}` | {} | {unit} | {} | {} |",
            family.name,
            family.kind,
            labels.join(", "),
            family.help
        )
        .expect("a string takes all");
    }
    table
}

#[test]
fn the_page_has_every_family_as_the_code_has_it() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let page = std::fs::read_to_string(&path).expect("the page");
    let (before, rest) = page.split_once(BEGIN).expect("where the table begins");
    let (shown, after) = rest.split_once(END).expect("where it ends");
    let table = table();
    if std::env::var_os("MICA_BLESS").is_some_and(|bless| bless == "1") {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).expect("written");
        return;
    }
    assert_eq!(
        shown, table,
        "docs/metrics.md is stale: MICA_BLESS=1 cargo test --test metrics_page"
    );
}

#[test]
fn names_are_there_once_and_labels_are_names() {
    let families = families();
    assert!(families.len() > 30, "{}", families.len());
    assert!(families.windows(2).all(|pair| pair[0].name < pair[1].name), "sorted, and each once");
    for family in families {
        let in_form = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        assert!(in_form(family.name) && family.labels.iter().all(|label| in_form(label)));
        assert!(!family.help.contains('|'), "{}: it would end a cell", family.name);
    }
}
