//! A frame of `mica top`, as lines.
//!
//! Called by [`super`]. Pure: the same screen gives the same lines. Refuses more lines than it is told to make.

use std::time::{Duration, SystemTime};

use mica_http::parse_rfc3339;
use mica_wire::api::{SandboxState, SandboxSummary, ShardSummary};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget};

use super::model::{Look, OperationRow, Screen, SortBy};
use super::numbers::{bytes, clock, lasted, percent, took};

/// Columns of a shard: its words, its bar, and a gap.
const SHARD_COLUMNS: usize = 60;
const BAR_COLUMNS: usize = 10;

/// The most lines of one frame of text.
const PLAIN_LINES_MAX: usize = 2000;

/// Lines that are left to the sandboxes whatever else there is: a head and some of them.
const SANDBOX_LINES_MIN: usize = 6;

const DIM: Style = Style::new().fg(Color::DarkGray);
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);
const BAD: Style = Style::new().fg(Color::Red);

/// The frame as text of so many columns, with that many sandboxes at most.
pub fn plain(screen: &Screen, columns: u16, sandboxes_max: usize) -> String {
    let columns = columns.clamp(40, 500);
    let found = screen.look.as_ref().map_or(0, |look| look.sandboxes.len()).min(sandboxes_max);
    let mut all = host_lines(screen, columns.into());
    all.extend(sandbox_lines(screen, found));
    all.truncate(PLAIN_LINES_MAX);
    let area = Rect::new(0, 0, columns, u16::try_from(all.len()).unwrap_or(u16::MAX));
    let mut buffer = Buffer::empty(area);
    Paragraph::new(all).render(area, &mut buffer);
    let mut text = String::new();
    for row in area.rows() {
        let line: String = row.columns().map(|cell| buffer[(cell.x, cell.y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The frame for a terminal of that size; keys are named in the last line.
pub fn lines(screen: &Screen, columns: u16, rows: usize) -> Vec<Line<'static>> {
    let mut all = host_lines(screen, columns.into());
    // On a small terminal the sandboxes win over the last shards and operations.
    all.truncate(rows.saturating_sub(SANDBOX_LINES_MIN + 1));
    let left = rows.saturating_sub(all.len() + 3);
    all.extend(sandbox_lines(screen, left));
    while all.len() + 1 < rows {
        all.push(Line::default());
    }
    all.truncate(rows.saturating_sub(1));
    all.push(keys(screen));
    all
}

fn keys(screen: &Screen) -> Line<'static> {
    let mut spans = vec![Span::styled(" sort: ", DIM)];
    for (by, key, name) in [
        (SortBy::Memory, "m", "emory "),
        (SortBy::Cpu, "c", "pu "),
        (SortBy::WrongNode, "w", "rong node "),
        (SortBy::Age, "a", "ge "),
    ] {
        let style = if screen.sort == by { STRONG } else { DIM };
        spans.push(Span::styled(key, style.add_modifier(Modifier::UNDERLINED)));
        spans.push(Span::styled(name, style));
    }
    spans.push(Span::styled("  q", DIM.add_modifier(Modifier::UNDERLINED)));
    spans.push(Span::styled("uit", DIM));
    Line::from(spans)
}

fn host_lines(screen: &Screen, columns: usize) -> Vec<Line<'static>> {
    let Some(look) = &screen.look else {
        return vec![Line::from(format!("Mica at {}", screen.url))];
    };
    let mut all = vec![title(screen, look)];
    if let Some(failure) = &screen.failure {
        let text = format!("not connected, this is of {}: {failure}", clock(look.at));
        all.push(Line::styled(text, BAD));
    }
    all.push(totals(screen, look));
    let each_row = (columns / SHARD_COLUMNS).max(1);
    for node in &look.host.nodes {
        all.push(Line::default());
        let memory = match (node.memory_bytes, node.free_bytes) {
            (Some(whole), Some(free)) => {
                format!("{} of {} used", bytes(whole.saturating_sub(free)), bytes(whole))
            }
            _ => "memory not known".to_owned(),
        };
        let rest = format!("  {memory}, {} threads for vCPUs", node.vcpus);
        all.push(Line::from(vec![
            Span::styled(format!("Node {}", node.node), STRONG),
            Span::raw(rest),
        ]));
        let here: Vec<&ShardSummary> =
            look.host.shards.iter().filter(|shard| shard.node == node.node).collect();
        let row = |row: &[&ShardSummary]| Line::from_iter(row.iter().flat_map(|one| shard(one)));
        all.extend(here.chunks(each_row).map(row));
    }
    all.push(Line::default());
    match look.operation_rows() {
        Some(rows) => all.extend(operations(&rows)),
        None => all.push(Line::styled("operations are not counted: --metrics off", DIM)),
    }
    all.push(Line::default());
    all
}

fn title(screen: &Screen, look: &Look) -> Line<'static> {
    let host = &look.host;
    let up = lasted(Duration::try_from_secs_f64(host.uptime_s).unwrap_or_default());
    let rest = format!(
        " {} at {}, Linux {}, up {up}, {} UTC",
        cut(&host.version, 24),
        screen.url,
        cut(&host.kernel, 48),
        clock(look.at)
    );
    Line::from(vec![Span::styled("Mica", STRONG.fg(Color::Cyan)), Span::raw(rest)])
}

fn totals(screen: &Screen, look: &Look) -> Line<'static> {
    let (running, paused) = look.states();
    let shards = &look.host.shards;
    let sum = |of: fn(&ShardSummary) -> u64| shards.iter().map(of).sum::<u64>();
    let (hits, misses) = (sum(|shard| shard.pool.hits), sum(|shard| shard.pool.misses));
    let found = match hits + misses {
        0 => "none asked for".to_owned(),
        asked => format!("{} of starts found one", percent(hits as f64 / asked as f64)),
    };
    let creates = screen.creates_per_s.map_or_else(|| "–".to_owned(), |rate| format!("{rate:.1}"));
    Line::from(format!(
        "{} sandboxes: {running} running, {paused} paused; {creates} creates/s; {} VMs ready, {found}",
        running + paused,
        sum(|shard| shard.pool.depth)
    ))
}

/// One shard, in [`SHARD_COLUMNS`].
fn shard(one: &ShardSummary) -> Vec<Span<'static>> {
    let busy = one.busy_fraction.clamp(0.0, 1.0);
    let colour = match busy {
        busy if busy >= 0.8 => Color::Red,
        busy if busy >= 0.5 => Color::Yellow,
        _ => Color::Green,
    };
    let (full, empty) = bar(busy);
    let (number, core) = (one.shard, one.core);
    let words = format!(
        " {:>5} {:>5} sbx  pool {:<3} mail {:<4}",
        percent(busy),
        one.sandboxes,
        one.pool.depth,
        one.mailbox_depth
    );
    vec![
        Span::raw(format!("{number:>4}")),
        Span::styled(format!(" core {core:<4}"), DIM),
        Span::styled(full, Style::new().fg(colour)),
        Span::styled(empty, DIM),
        Span::raw(words),
    ]
}

/// What is full of a bar, and what is empty.
fn bar(share: f64) -> (String, String) {
    let is_full = |column: &usize| (*column as f64 + 0.5) / BAR_COLUMNS as f64 <= share;
    let full = (0..BAR_COLUMNS).filter(is_full).count();
    ("█".repeat(full), "░".repeat(BAR_COLUMNS - full))
}

fn operations(rows: &[OperationRow]) -> Vec<Line<'static>> {
    let head = format!("{:<10}{:>9}{:>9}{:>11}{:>11}", "operation", "done", "failed", "p50", "p95");
    let mut all = vec![Line::styled(head, DIM)];
    for row in rows {
        let failed = if row.errors > 0 { BAD } else { Style::new() };
        let took = |time: Option<f64>| time.map_or_else(|| "–".to_owned(), took);
        all.push(Line::from(vec![
            Span::raw(format!("{:<10}{:>9}", row.name, row.count)),
            Span::styled(format!("{:>9}", row.errors), failed),
            Span::raw(format!("{:>11}{:>11}", took(row.p50_s), took(row.p95_s))),
        ]));
    }
    all
}

fn sandbox_lines(screen: &Screen, most: usize) -> Vec<Line<'static>> {
    let Some(look) = &screen.look else { return Vec::new() };
    if look.sandboxes.is_empty() {
        return vec![Line::styled("no sandboxes", DIM)];
    }
    let head = format!(
        "{:<22}{:<9}{:<20}{:>8}{:>11}{:>7}{:>11}{:>10}{:>12}  tenant",
        "sandbox",
        "state",
        "template",
        "node/shd",
        "memory",
        "cpu",
        "wrong node",
        "cpu there",
        "age"
    );
    let mut all = vec![Line::styled(head, DIM)];
    all.extend(look.sandboxes.iter().take(most).map(|one| sandbox(one, look.at)));
    if look.sandboxes.len() > most {
        let more = format!("and {} more", look.sandboxes.len() - most);
        all.push(Line::styled(more, DIM));
    }
    all
}

fn sandbox(one: &SandboxSummary, now: SystemTime) -> Line<'static> {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
    let (state, style) = match one.state {
        SandboxState::Running => ("running", Style::new()),
        SandboxState::Paused => ("paused", DIM),
    };
    let age = parse_rfc3339(&one.started_at).and_then(|at| now.duration_since(at).ok());
    let place = format!("{}/{}", one.node, one.shard);
    let text = format!(
        "{:<22}{state:<9}{:<20}{place:>8}{:>11}{:>7}{:>11}{:>10}{:>12}  {}",
        cut(&one.id, 21),
        cut(&one.template, 19),
        or_none(one.memory_bytes.map(bytes)),
        or_none(one.cpu.map(|cpu| format!("{cpu:.2}"))),
        or_none(one.wrong_node_pages.map(|pages| pages.to_string())),
        or_none(one.wrong_node_cpu_s.map(took)),
        or_none(age.map(lasted)),
        cut(&one.tenant, 24),
    );
    Line::styled(text, style)
}

/// As many characters as fit, without those that would control a terminal.
fn cut(text: &str, most: usize) -> String {
    let mut shown = text.chars().map(|one| if one.is_control() { '·' } else { one });
    let fits: String = shown.by_ref().take(most).collect();
    if shown.next().is_none() {
        return fits;
    }
    fits.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::model::tests::look;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen() -> Screen {
        let mut screen = Screen::new("http://10.0.0.7:3000".to_owned(), SortBy::Memory);
        screen.take(look(0, 10));
        screen.take(look(4, 20));
        screen
    }

    /// What a terminal of that size shows.
    fn shown(screen: &Screen, columns: u16, rows: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
        terminal.draw(|frame| crate::top::draw(frame, screen)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..rows).map(line).collect()
    }

    #[test]
    fn a_frame_has_nodes_shards_operations_and_sandboxes_by_memory() {
        let frame = shown(&screen(), 120, 40);
        let at = |what: &str| {
            frame
                .iter()
                .position(|line| line.contains(what))
                .unwrap_or_else(|| panic!("no {what}: {frame:#?}"))
        };
        assert!(
            frame[0].starts_with("Mica 0.1.0 at http://10.0.0.7:3000, Linux 6.12.0, up 1 h 0 min"),
            "{}",
            frame[0]
        );
        assert!(
            frame[1]
                .contains("3 sandboxes: 2 running, 1 paused; 10.0 creates/s; 16 VMs ready, 90 %"),
            "{}",
            frame[1]
        );
        assert!(frame[at("Node 1")].contains("48.0 GiB of 64.0 GiB used, 12 threads for vCPUs"));
        let shards = &frame[at("Node 1") + 1];
        assert!(
            shards.contains("core 4") && shards.contains("core 5"),
            "two beside one another: {shards}"
        );
        assert!(shards.contains("████████░░") && shards.contains("75 %"), "{shards}");
        let create = &frame[at("create  ")];
        let words: Vec<&str> = create.split_whitespace().collect();
        assert_eq!(words, ["create", "80", "6", "3.00", "ms", "9.00", "ms"]);
        assert!(at("ilarge1") < at("ismall") && at("ismall") < at("ipaused22"));
        assert!(
            frame[at("ilarge1")].contains("1.95 GiB   0.10          7    1.00 s"),
            "{}",
            frame[at("ilarge1")]
        );
        assert!(frame[39].starts_with(" sort: memory cpu"), "{}", frame[39]);
    }

    #[test]
    fn a_small_terminal_still_shows_sandboxes_and_keys() {
        let frame = shown(&screen(), 60, 14);
        assert!(frame.iter().any(|line| line.contains("ilarge1")), "{frame:#?}");
        assert!(frame[13].contains("quit"));
        for (columns, rows) in [(1, 1), (5, 2), (40, 3)] {
            shown(&screen(), columns, rows);
        }
    }

    #[test]
    fn a_failure_is_told_beside_what_was_seen_last() {
        let mut screen = screen();
        screen.failed("it is gone".to_owned());
        let frame = shown(&screen, 120, 40);
        assert!(
            frame[1].starts_with("not connected, this is of 22:13:24: it is gone"),
            "{}",
            frame[1]
        );
        assert!(frame.iter().any(|line| line.contains("ilarge1")));
    }

    #[test]
    fn text_of_others_controls_no_terminal() {
        let mut screen = screen();
        if let Some(look) = &mut screen.look {
            look.sandboxes[0].template = "a\u{1b}[2Jb\nc".to_owned();
            look.operations = None;
        }
        let text = plain(&screen, 120, 2);
        assert!(!text.contains('\u{1b}') && text.contains("ilarge1"), "{text}");
        assert!(text.contains("a·[2Jb·c"), "{text}");
        assert!(text.contains("and 1 more") && text.contains("--metrics off"), "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()));
    }
}
