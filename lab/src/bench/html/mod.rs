//! A page for people: plots and every row, in one file without scripts.
//!
//! Called by `mica bench … --html` and `mica bench report`. Reads reports, so that it shows what programs read too.
//! Refuses to load anything: colours, plots and text are in the file.

pub mod chart;
pub mod page;
mod plots;
pub mod scale;

/// Text that stands in HTML and in its attributes.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for one in text.chars() {
        match one {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Not allowed in XML, and nothing to see.
            one if one.is_control() && one != '\n' && one != '\t' => out.push('\u{fffd}'),
            one => out.push(one),
        }
    }
    out
}
