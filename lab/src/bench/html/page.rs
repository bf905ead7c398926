//! The page: what was measured and where, the plots, and every row.
//!
//! Called by `mica bench`. Takes one report or several, whose rows stand in one table. Refuses to hide what failed.

use serde_json::Value;

use super::super::super::engine::machine;
use super::super::document::Document;
use super::super::phases::FAMILY;
use super::super::seeds::whose;
use super::super::table::NONE_PUBLISHED;
use super::{escape, plots, scale};

/// The look of it. Colours are variables: one set for light, one for dark.
const STYLE: &str = include_str!("style.css");

/// The columns of the table: a name, a field, and what the field is divided by.
const COLUMNS: [(&str, &str, f64); 11] = [
    ("avg", "avg_us", 1e3),
    ("min", "min_us", 1e3),
    ("p50", "p50_us", 1e3),
    ("p90", "p90_us", 1e3),
    ("p95", "p95_us", 1e3),
    ("p99", "p99_us", 1e3),
    ("max", "max_us", 1e3),
    ("stddev", "stddev_us", 1e3),
    ("floor p50", "floor_p50_us", 1e3),
    ("wall", "wall_us", 1e3),
    ("per s", "throughput_per_s", 1.0),
];

/// Fields that are not shown as something that only one operation has.
const KNOWN: [&str; 25] = [
    "op",
    "figure",
    "stddev_us",
    "case",
    "concurrency",
    "clients",
    "n",
    "success",
    "failed",
    "errors",
    "floor_p50_us",
    "wall_us",
    "per_op_us",
    "throughput_per_s",
    "per_s",
    "seed",
    "p50_us",
    "p90_us",
    "p95_us",
    "p99_us",
    "max_us",
    "avg_us",
    "min_us",
    "rounds",
    "phases",
];

/// The page of these reports.
#[must_use]
pub fn page(documents: &[Document]) -> String {
    let rows: Vec<&Value> = documents.iter().flat_map(Document::rows).collect();
    let mut body = String::new();
    for document in documents {
        body += &facts(&document.0);
    }
    let figures = plots::all(&rows);
    if !figures.is_empty() {
        body += "<section class=\"plots\">\n";
        for figure in figures {
            let caption = escape(&figure.caption);
            body +=
                &format!("<figure><figcaption>{caption}</figcaption>\n{}</figure>\n", figure.svg);
        }
        body += "</section>\n";
    }
    if rows.iter().all(|row| row["phases"].is_null()) {
        body += &format!(
            "<p class=\"note\">The host counts no phases of operations (<code>{FAMILY}</code> in its \
             <code>/metrics</code>), so that there is no plot of them.</p>\n"
        );
    }
    body += &table(&rows);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>mica bench</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>mica bench</h1>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// What was run, where, and what is to be known of it.
fn facts(document: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => escape(text),
        other => escape(&other.to_string()),
    };
    let mut rows = String::new();
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            rows += &format!("<tr><th>{name}</th><td>{value}</td></tr>\n");
        }
    };
    row("run", format!("{} {}", text(&document["command"]), text(&document["made_at"])));
    let target = &document["target"];
    let host = format!("{} {}", text(&target["url"]), text(&target["template"]));
    row("host", host.trim().to_owned());
    if target["is_local"] == true {
        row("where it runs", "on the machine of the clients".to_owned());
    } else if target["is_local"] == false {
        row("where it runs", "on another machine than the clients".to_owned());
    }
    for (name, line) in machine::lines(&document["host"]) {
        let name = if name == "machine" { "machine of the clients" } else { name };
        row(name, escape(&line));
    }
    row("options", text(&document["options"]));
    let mut out = format!("<table class=\"facts\">\n{rows}</table>\n");
    if document["complete"] == false {
        out += "<p class=\"bad\">The run did not come to its end.</p>\n";
    }
    for note in document["notes"].as_array().into_iter().flatten() {
        out += &format!("<p class=\"note\">{}</p>\n", text(note));
    }
    out
}

fn table(rows: &[&Value]) -> String {
    let names: String = COLUMNS.iter().map(|(name, ..)| format!("<th>{name}</th>")).collect();
    let mut out = format!(
        "<h2>Rows</h2>\n<p class=\"note\">Times in ms. Figures of other hardware are there to look at, not to \
         compare.</p>\n<div class=\"wide\"><table class=\"rows\">\n<thead><tr><th>operation</th>\
         <th>case</th><th>n</th><th>failed</th>{names}<th>other hardware</th><th>and</th></tr></thead>\n\
         <tbody>\n"
    );
    for row in rows {
        let word = |field: &str| escape(row[field].as_str().unwrap_or_default());
        let failed = row["failed"].as_u64().unwrap_or(0);
        let mark = if failed > 0 { " class=\"bad\"" } else { "" };
        out += &format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td{mark}>{failed}</td>",
            word("op"),
            word("case"),
            row["n"]
        );
        for (_, field, unit) in COLUMNS {
            let value = row[field]
                .as_f64()
                .or_else(|| row[field.trim_start_matches("throughput_")].as_f64())
                .or_else(|| Some(row[in_ns(field)].as_f64()? / 1e3));
            let shown = value.map(|value| scale::label(value / unit)).unwrap_or_default();
            out += &format!("<td>{shown}</td>");
        }
        out += &format!("<td>{}</td><td>{}</td></tr>\n", seed(&row["seed"]), more(row));
        for error in row["errors"].as_array().into_iter().flatten() {
            let said = escape(error["error"].as_str().unwrap_or_default());
            let count = &error["count"];
            out += &format!(
                "<tr><td></td><td class=\"bad\" colspan=\"16\">{count} times: {said}</td></tr>\n"
            );
        }
    }
    out + "</tbody>\n</table></div>\n"
}

/// The same field of rows that are in nanoseconds.
fn in_ns(field: &str) -> String {
    field.strip_suffix("_us").map_or_else(|| field.to_owned(), |name| format!("{name}_ns"))
}

/// The published figures, each with its name.
fn seed(seed: &Value) -> String {
    let Some(fields) = seed.as_object() else { return NONE_PUBLISHED.to_owned() };
    let figures = fields.iter().filter_map(|(name, value)| {
        Some(format!("{} {}", scale::label(value.as_f64()?), escape(&name.replace('_', " "))))
    });
    let whose = escape(&whose(seed["of"].as_str().unwrap_or_default()));
    format!("{whose}: {}", figures.collect::<Vec<_>>().join(", "))
}

/// What only this operation has.
fn more(row: &Value) -> String {
    let Some(fields) = row.as_object() else { return String::new() };
    let own = fields.iter().filter(|(name, value)| {
        let in_us = name.strip_suffix("_ns").map(|name| format!("{name}_us"));
        let is_known = |name: &str| KNOWN.contains(&name);
        let shown = is_known(name) || in_us.is_some_and(|name| is_known(&name));
        !shown && !value.is_null() && !value.is_array()
    });
    let shown = own.map(|(name, value)| {
        let value = value.as_f64().map_or_else(
            || value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            scale::label,
        );
        format!("{}: {}", escape(&name.replace('_', " ")), escape(&value))
    });
    shown.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Elements that are opened are closed, in order.
    fn is_well_formed(page: &str) -> Result<(), String> {
        let mut open: Vec<String> = Vec::new();
        let body = page.strip_prefix("<!doctype html>").ok_or("no doctype")?;
        for piece in body.split('<').skip(1) {
            let (tag, _) = piece.split_once('>').ok_or_else(|| format!("no end: {piece}"))?;
            let name: String =
                tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap().to_owned();
            if tag.starts_with('/') {
                let last = open.pop();
                if last.as_deref() != Some(name.as_str()) {
                    return Err(format!("</{name}> closes {last:?}"));
                }
            } else if !tag.ends_with('/') {
                if tag.matches('"').count() % 2 != 0 {
                    return Err(format!("a quote in <{tag}>"));
                }
                open.push(name);
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("{open:?} stay open")) }
    }

    #[test]
    fn a_page_is_well_formed_and_shows_every_row_and_failure() {
        let document = Document::of(json!({
            "command": "create", "notes": ["a <note>"], "complete": false,
            "host": { "filesystem": "xfs on /dev/a", "assertions": true, "cpu": "A & B", "cores": 2, "memory_bytes": 8_589_934_592u64, "kernel": "6.1", "kvm": "vmx" },
            "target": { "url": "http://a:1", "template": "\"><script>", "is_local": true },
            "results": [
                { "op": "create", "case": "c=1", "concurrency": 1, "n": 2, "failed": 1, "p50_us": 1500.0,
                  "p95_us": 1.0, "seed": { "of": "CubeSandbox", "avg_ms": 47.8 }, "dirty_note": "<i>",
                  "errors": [{ "error": "<b> 503", "count": 1 }] },
                { "op": "create", "case": "c=10", "concurrency": 10, "n": 2, "p50_us": 2500.0,
                  "p95_us": 9.0, "throughput_per_s": 12.5 },
                { "op": "command_1", "n": 3, "per_s": 77.0 },
                { "op": "cold_hello_python", "n": 3, "stddev_us": 4200.0, "seed": { "of": "SoulBox", "p95_ms": 120.0, "stddev_ms": 25.0 } },
                { "op": "Allocate", "n": 3, "p50_ns": 54.0, "stddev_ns": 3.0, "batch": 2000 },
            ],
        }))
        .unwrap();
        let page = page(&[document]);
        is_well_formed(&page).unwrap();
        for part in [
            "c=10",
            "A &amp; B",
            "8.0 GiB",
            "a &lt;note&gt;",
            "&lt;b&gt; 503",
            "47.8 avg ms",
            "12.5",
            "<td>77</td>",
            "<td>0.000054</td>",
            "<th>stddev</th>",
            "<td>4.2</td>",
            "SoulBox (stated target, not measured; other hardware): 120 p95 ms, 25 stddev ms",
            "<td>none published</td><td>batch: 2,000</td>",
            "xfs on /dev/a",
            "6.1, KVM: vmx",
            "with assertions",
            "did not come to its end",
            "counts no phases",
            "<svg",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!page.contains("<script") && !page.contains("<i>"), "{page}");
        assert!(!page.contains("http-equiv") && !page.contains("src="), "{page}");
    }

    #[test]
    fn the_check_of_the_form_can_fail() {
        assert!(is_well_formed("<!doctype html><a><b></a></b>").is_err());
        assert!(is_well_formed("<!doctype html><a>").is_err());
        assert!(is_well_formed("<!doctype html><a b=\"c\"><d/></a>").is_ok());
    }
}
