//! Shapes and texts of the picture.
//!
//! Called by `svg`. Refuses text that is not escaped, by taking all of it as plain text.

/// A rectangle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rect {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

/// Where and how a text stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'c> {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) size: u32,
    pub(super) bold: bool,
    pub(super) centred: bool,
    /// Whether it ends at x.
    pub(super) from_right: bool,
    pub(super) class: &'c str,
}

impl Text<'_> {
    /// Plain, beginning at `x`, standing on `y`.
    pub(super) fn at(x: u32, y: u32) -> Self {
        Self { x, y, size: 12, bold: false, centred: false, from_right: false, class: "ink" }
    }
}

/// Colours: the ink and its background differ enough for weak eyes (WCAG AA), and roles differ in
/// lightness as well.
const STYLE: &str = "\
.page{fill:#ffffff}.panel{fill:#f8fafc;stroke:#cbd5e1}.group{fill:#ffffff;stroke:#e2e8f0}
.core{stroke:#94a3b8;fill:none}
.shard{fill:#1d4ed8}.shared{fill:#6d28d9}.blocking{fill:#bfdbfe}.vcpus{fill:#d1fae5}
.reserved{fill:#64748b}.free{fill:#ffffff}
.chip{stroke:#cbd5e1;fill:#ffffff}.nvme{fill:#fef3c7;stroke:#fcd34d}.nic{fill:#fae8ff;stroke:#f0abfc}
.split{stroke:#94a3b8;stroke-dasharray:2 2}
text{fill:#0f172a}.dim{fill:#475569}
.on.shard,.on.shared,.on.reserved{fill:#ffffff}.on.blocking{fill:#1e3a8a}.on.vcpus{fill:#065f46}
.on.free{fill:#64748b}";

/// A picture that grows.
#[derive(Debug)]
pub(super) struct Canvas {
    shapes: String,
}

impl Canvas {
    pub(super) fn new() -> Self {
        Self { shapes: String::new() }
    }

    /// The file, on a white page of this size.
    pub(super) fn finish(self, width: u32, height: u32) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" \
             font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\">\n\
             <style>\n{STYLE}\n</style>\n\
             <rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n{}</svg>\n",
            self.shapes
        )
    }

    pub(super) fn rect(&mut self, at: Rect, radius: u32, class: &str, hint: Option<&str>) {
        let Rect { x, y, width, height } = at;
        let hint = hint.map_or(String::new(), |hint| format!("<title>{}</title>", escape(hint)));
        self.shapes += &format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" \
             rx=\"{radius}\">{hint}</rect>\n"
        );
    }

    /// A part of a core: round where the core ends, with a line where the next part begins.
    pub(super) fn thread(&mut self, at: Rect, first: bool, last: bool, class: &str, hint: &str) {
        let Rect { x, y, width, height } = at;
        let (left, right) = (if first { 5 } else { 0 }, if last { 5 } else { 0 });
        let corner = |radius: u32, dx: i32, dy: i32| {
            let (dx, dy) = (dx * radius.cast_signed(), dy * radius.cast_signed());
            format!("a{radius} {radius} 0 0 1 {dx} {dy}")
        };
        let (across, down) = (width - left - right, height.cast_signed());
        let path = format!(
            "M{} {y}h{across}{}v{}{}h-{across}{}v-{}{}z",
            x + left,
            corner(right, 1, 1),
            down - 2 * right.cast_signed(),
            corner(right, -1, 1),
            corner(left, -1, -1),
            down - 2 * left.cast_signed(),
            corner(left, 1, -1),
        );
        let hint = escape(hint);
        self.shapes +=
            &format!("<path class=\"{class}\" d=\"{path}\"><title>{hint}</title></path>\n");
        if !first {
            let end = y + height;
            self.shapes +=
                &format!("<line class=\"split\" x1=\"{x}\" y1=\"{y}\" x2=\"{x}\" y2=\"{end}\"/>\n");
        }
    }

    pub(super) fn text(&mut self, how: Text<'_>, text: &str) {
        let Text { x, y, size, bold, centred, from_right, class } = how;
        let weight = if bold { " font-weight=\"600\"" } else { "" };
        let anchor = match (centred, from_right) {
            (true, _) => " text-anchor=\"middle\"",
            (false, true) => " text-anchor=\"end\"",
            (false, false) => "",
        };
        let text = escape(text);
        self.shapes += &format!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" font-size=\"{size}\"{weight}{anchor}>{text}\
             </text>\n"
        );
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_stays_text() {
        let mut canvas = Canvas::new();
        canvas.text(Text::at(1, 2), "</text><script>alert(\"&\")</script>");
        let drawn = canvas.finish(10, 10);
        assert!(!drawn.contains("<script>"), "{drawn}");
        assert!(drawn.contains("&lt;script&gt;alert(&quot;&amp;&quot;)"), "{drawn}");
    }
}
