//! A chart of lines, and one of stacked bars, as SVG that needs nothing else.
//!
//! Called by [`super::plots`]. Colours are variables of the page's style, so that it is right on light and on dark. Refuses
//! to draw what is no number.

use std::fmt::Write as _;

use super::escape;
use super::scale::{Scale, label};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 18.0;
const BOTTOM: f64 = 46.0;
/// Height of a line of the legend.
const LEGEND: f64 = 20.0;
/// Width of a character of the legend, about.
const CHARACTER: f64 = 6.3;
/// Room between two marks of an axis, at least.
const MARK_ROOM: f64 = 34.0;
/// Height of a stacked bar, and from one to the next.
const BAR: f64 = 22.0;
const BAR_STEP: f64 = 34.0;
/// Colours that the page has.
pub const COLOURS: usize = 8;

/// What an axis says.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Its name, with its unit.
    pub label: &'static str,
    /// Whether every factor has the same room.
    pub log: bool,
}

/// A line of points.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Its points, by x.
    pub points: Vec<(f64, f64)>,
    /// Whether it is somebody else's: grey and dashed.
    pub is_other: bool,
}

/// A chart of lines.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it is for those who cannot see it.
    pub title: String,
    /// Across.
    pub x: Axis,
    /// Up.
    pub y: Axis,
    /// What is drawn.
    pub lines: Vec<Line>,
}

impl Chart {
    /// Draws it.
    #[must_use]
    pub fn svg(&self) -> String {
        let names: Vec<_> =
            self.lines.iter().map(|line| (line.name.as_str(), line.is_other)).collect();
        let (legend, top) = legend(&names);
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let x = Scale::of(points().map(|p| p.0), self.x.log, LEFT, WIDTH - RIGHT);
        let y = Scale::of(points().map(|p| p.1), self.y.log, HEIGHT - BOTTOM, top);
        let mut svg = open(&self.title, HEIGHT);
        svg += &legend;
        svg += &self.grid(x, y, top);
        for (index, line) in self.lines.iter().enumerate() {
            svg += &self.line(line, index, x, y);
        }
        svg + "</svg>\n"
    }

    fn grid(&self, x: Scale, y: Scale, top: f64) -> String {
        let mut svg = String::new();
        let bottom = HEIGHT - BOTTOM;
        for mark in y.marks() {
            let (at, text) = (y.at(mark), label(mark));
            add(
                &mut svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"mark\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>\n",
                    WIDTH - RIGHT,
                    LEFT - 8.0,
                    at + 4.0
                ),
            );
        }
        let values: Vec<f64> =
            self.lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect();
        for mark in x.marks_at(&values, MARK_ROOM) {
            let (at, text) = (x.at(mark), label(mark));
            add(
                &mut svg,
                format_args!(
                    "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
                 <text class=\"mark\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>\n",
                    bottom + 5.0,
                    bottom + 19.0
                ),
            );
        }
        let (middle, height) = (f64::midpoint(LEFT, WIDTH - RIGHT), f64::midpoint(top, bottom));
        add(
            &mut svg,
            format_args!(
                "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text class=\"name\" x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"name\" transform=\"translate(13 {height}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
                WIDTH - RIGHT,
                HEIGHT - 8.0,
                escape(self.x.label),
                escape(self.y.label)
            ),
        );
        svg
    }

    fn line(&self, line: &Line, index: usize, x: Scale, y: Scale) -> String {
        let drawn = |point: &&(f64, f64)| {
            let good = |value: f64, log: bool| value.is_finite() && (!log || value > 0.0);
            good(point.0, self.x.log) && good(point.1, self.y.log)
        };
        let class = class_in(index, self.lines.iter().map(|line| line.is_other));
        let mut path = String::new();
        let mut dots = String::new();
        for (px, py) in line.points.iter().filter(drawn) {
            let (at_x, at_y) = (x.at(*px), y.at(*py));
            let command = if path.is_empty() { 'M' } else { 'L' };
            add(&mut path, format_args!("{command}{at_x:.1} {at_y:.1}"));
            add(
                &mut dots,
                format_args!(
                    "<circle class=\"{class}\" cx=\"{at_x:.1}\" cy=\"{at_y:.1}\" r=\"3.5\"><title>{}: {} at {}</title></circle>",
                    escape(&line.name),
                    label(*py),
                    label(*px)
                ),
            );
        }
        format!("<path class=\"line {class}\" d=\"{path}\"/>{dots}\n")
    }
}

/// A bar of several parts.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it stands for.
    pub name: String,
    /// Each part's name and length.
    pub parts: Vec<(String, f64)>,
}

/// Stacked bars, one below the other.
#[must_use]
pub fn stacks(title: &str, unit: &'static str, bars: &[Bar]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in bars.iter().flat_map(|bar| &bar.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let (legend, top) = legend(&names.iter().map(|name| (*name, false)).collect::<Vec<_>>());
    let total = |bar: &Bar| bar.parts.iter().map(|part| part.1.max(0.0)).sum::<f64>();
    let longest = bars.iter().map(|bar| bar.name.chars().count()).max().unwrap_or(0);
    let left = f64::from(u32::try_from(longest.min(40)).unwrap_or(40)) * CHARACTER + 16.0;
    let x = Scale::of(bars.iter().map(total), false, left, WIDTH - RIGHT - 40.0);
    let count = f64::from(u32::try_from(bars.len()).unwrap_or(0));
    let bottom = top + count * BAR_STEP + 4.0;
    let mut svg = open(title, bottom + BOTTOM) + &legend;
    for mark in x.marks() {
        let (at, text) = (x.at(mark), label(mark));
        add(
            &mut svg,
            format_args!(
                "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"mark\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>\n",
                bottom + 16.0
            ),
        );
    }
    let mut row = top + 6.0;
    for bar in bars {
        svg += &stack(bar, &names, x, row, left);
        row += BAR_STEP;
    }
    add(
        &mut svg,
        format_args!(
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>\n",
            f64::midpoint(left, WIDTH - RIGHT),
            bottom + 36.0,
            escape(unit)
        ),
    );
    svg
}

fn stack(bar: &Bar, names: &[&str], x: Scale, row: f64, left: f64) -> String {
    let mut svg = String::new();
    let middle = row + BAR / 2.0 + 4.0;
    add(
        &mut svg,
        format_args!(
            "<text class=\"name\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            escape(&bar.name)
        ),
    );
    let mut end = 0.0;
    for (name, length) in bar.parts.iter().filter(|part| part.1 > 0.0) {
        let index = names.iter().position(|known| known == name).unwrap_or(0);
        let (from, to) = (x.at(end), x.at(end + length));
        end += length;
        // A pixel of ground between two parts.
        let width = (to - from - 1.0).max(0.5);
        add(
            &mut svg,
            format_args!(
                "<rect class=\"{}\" x=\"{from:.1}\" y=\"{row:.1}\" width=\"{width:.1}\" height=\"{BAR}\">\
             <title>{}: {}</title></rect>",
                class(index, false),
                escape(name),
                label(*length)
            ),
        );
    }
    add(
        &mut svg,
        format_args!(
            "<text class=\"mark\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>\n",
            x.at(end) + 6.0,
            label(end)
        ),
    );
    svg
}

/// The class of the line at `index`: of somebody else's, by how many of those were before.
fn class_in(index: usize, others: impl Iterator<Item = bool>) -> String {
    let flags: Vec<bool> = others.collect();
    let is_other = flags.get(index).copied().unwrap_or(false);
    let before = flags.iter().take(index).filter(|flag| **flag).count();
    class(if is_other { before } else { index }, is_other)
}

fn class(index: usize, is_other: bool) -> String {
    match (is_other, index) {
        (false, _) => format!("c{}", index % COLOURS),
        (true, 0) => "other".to_owned(),
        (true, _) => "other dotted".to_owned(),
    }
}

/// The legend, and where what is below it begins.
fn legend(names: &[(&str, bool)]) -> (String, f64) {
    let mut svg = String::new();
    let (mut x, mut y) = (LEFT, 14.0);
    for (index, (name, _)) in names.iter().enumerate() {
        let width = f64::from(u32::try_from(name.chars().count()).unwrap_or(0)) * CHARACTER + 44.0;
        if x > LEFT && x + width > WIDTH - RIGHT {
            (x, y) = (LEFT, y + LEGEND);
        }
        add(
            &mut svg,
            format_args!(
                "<path class=\"line {}\" d=\"M{x:.1} {y:.1}h20\"/>\
             <text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
                class_in(index, names.iter().map(|name| name.1)),
                x + 26.0,
                y + 4.0,
                escape(name)
            ),
        );
        x += width;
    }
    (svg, y + LEGEND)
}

fn open(title: &str, height: f64) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    )
}

/// A string takes what is written to it.
fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    if text.write_fmt(what).is_err() {
        unreachable!("a string takes what is written to it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let axis = |label| Axis { label, log: true };
        Chart {
            title: "a <chart>".to_owned(),
            x: axis("clients"),
            y: axis("ms"),
            lines: vec![Line { name: "p50 & more".to_owned(), points, is_other: false }],
        }
    }

    #[test]
    fn a_line_goes_through_its_points_and_leaves_out_what_is_none() {
        let svg = chart(vec![(1.0, 2.0), (10.0, f64::NAN), (50.0, 0.0), (20.0, 8.0)]).svg();
        assert_eq!(svg.matches("<circle").count(), 2, "{svg}");
        assert!(svg.contains("p50 &amp; more: 8 at 20"), "{svg}");
        assert!(svg.contains("a &lt;chart&gt;") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_chart_of_nothing_is_a_chart() {
        let svg = chart(Vec::new()).svg();
        assert!(!svg.contains("NaN") && svg.matches("<circle").count() == 0, "{svg}");
    }

    #[test]
    fn parts_of_bars_have_the_same_colour_in_each() {
        let part = |name: &str, length| (name.to_owned(), length);
        let bars = [
            Bar {
                name: "create c=1".to_owned(),
                parts: vec![part("disk", 1.0), part("restore", 3.0)],
            },
            Bar {
                name: "create c=10".to_owned(),
                parts: vec![part("restore", 5.0), part("none", 0.0)],
            },
        ];
        let svg = stacks("phases", "ms", &bars);
        assert_eq!(svg.matches("<rect").count(), 3, "{svg}");
        assert_eq!(svg.matches("<rect class=\"c1\"").count(), 2, "{svg}");
    }
}
