//! Code in the languages of kernels that we have no part of our own in: what sets a variable, what
//! makes new random state, what comes last.
//!
//! Read by [`super::languages`], used by [`super::session`]. Pure. Leaves out what a language has no
//! way to say, like a variable in a shell whose name is not an identifier.

use std::collections::BTreeMap;

use serde_json::Value;

/// The code that fails with the reason why a cell could not be read.
type Reason = fn(&str) -> String;

/// How to say it in one language.
#[derive(Debug)]
pub struct Snippets {
    /// Sets a variable of the environment.
    set: fn(&str, &str) -> Option<String>,
    /// Removes it.
    unset: fn(&str) -> Option<String>,
    /// New random state, in a kernel that goes on in another sandbox.
    reseed: &'static str,
    /// Has the kernel publish `mica_flushed`, where output may come after it says that it is idle.
    pub flush: &'static str,
    /// For a kernel that does not say what it could not read: the text it has instead, and code
    /// that fails with the reason, and runs nothing of the cell.
    pub unread: Option<(&'static str, Reason)>,
    /// The end of what a kernel prints when its interpreter has ended and it has started another, with
    /// the environment that the kernel itself was started with.
    pub anew: Option<&'static str>,
}

/// What a kernel that has been saved in one sandbox and restored in another must change.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
pub struct Changes<'a> {
    pub set: BTreeMap<&'a str, &'a str>,
    pub unset: Vec<&'a str>,
    /// Every kernel restored from the same state would draw the same random numbers.
    pub reseed: bool,
}

impl<'a> Changes<'a> {
    /// None, where nothing changes. What stays the same is left alone: a cell may have changed it,
    /// and then it is the user's.
    pub fn between(
        held: &'a BTreeMap<String, String>,
        wanted: &'a BTreeMap<String, String>,
        reseed: bool,
    ) -> Option<Self> {
        if !reseed && held == wanted {
            return None;
        }
        let differs = |(name, value): &(&String, &String)| held.get(*name) != Some(*value);
        let pair = |(name, value): (&'a String, &'a String)| (name.as_str(), value.as_str());
        let gone = |name: &&String| !wanted.contains_key(*name);
        Some(Self {
            set: wanted.iter().filter(differs).map(pair).collect(),
            unset: held.keys().filter(gone).map(String::as_str).collect(),
            reseed,
        })
    }
}

impl Snippets {
    /// What comes before a cell: what has changed since the last one, and the call's variables.
    pub fn before(&self, changes: Option<&Changes<'_>>, call: &BTreeMap<String, String>) -> String {
        let mut lines = Vec::new();
        if let Some(changes) = changes {
            lines.extend(changes.unset.iter().filter_map(|name| (self.unset)(name)));
            lines.extend(changes.set.iter().filter_map(|(name, value)| (self.set)(name, value)));
            if changes.reseed && !self.reseed.is_empty() {
                lines.push(self.reseed.to_owned());
            }
        }
        lines.extend(call.iter().filter_map(|(name, value)| (self.set)(name, value)));
        lines.join("\n")
    }

    /// What comes after it: the call's variables as the sandbox has them, and the end.
    pub fn after(
        &self,
        call: &BTreeMap<String, String>,
        standing: &BTreeMap<String, String>,
    ) -> String {
        let back = |name: &String| match standing.get(name) {
            Some(value) => (self.set)(name, value),
            None => (self.unset)(name),
        };
        let mut lines: Vec<_> = call.keys().filter_map(back).collect();
        if !self.flush.is_empty() {
            lines.push(self.flush.to_owned());
        }
        lines.join("\n")
    }
}

/// The text as a string literal of JavaScript, which is one of JSON.
fn js(text: &str) -> String {
    Value::from(text).to_string()
}

/// The text between two of these quotes, on one line: control characters are octal escapes, which
/// all of these languages have. (A `\u` of Java's is read before its literals are.)
fn literal(text: &str, quote: char) -> String {
    let mut literal = String::from(quote);
    for c in text.chars() {
        if c == quote || c == '\\' {
            literal.extend(['\\', c]);
        } else if c.is_ascii_control() {
            literal.push_str(&format!("\\{:03o}", u32::from(c)));
        } else {
            literal.push(c);
        }
    }
    literal.push(quote);
    literal
}

fn quoted(text: &str) -> String {
    literal(text, '"')
}

/// Nothing in it is for the line editor that a shell in a terminal reads with.
fn bash(text: &str) -> String {
    format!("${}", literal(text, '\''))
}

fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Colours are decided on by now. `require` is what cells written for Node expect.
pub const DENO_BEGIN: &str = "Deno.env.delete('NO_COLOR'); Deno.env.delete('DENO_NO_UPDATE_CHECK');
globalThis.require = (await import('node:module')).createRequire(Deno.cwd() + '/');";

pub static DENO: Snippets = Snippets {
    set: |name, value| Some(format!("Deno.env.set({}, {});", js(name), js(value))),
    unset: |name| Some(format!("Deno.env.delete({});", js(name))),
    // The generator behind `crypto` takes new state from the system after each 64 KiB. The one
    // behind `Math.random` cannot be told to: another (sfc32) takes its place.
    reseed: "{ const drawn = new Uint8Array(65536);
for (let i = 0; i < 3; i++) crypto.getRandomValues(drawn);
let [a, b, c, d] = crypto.getRandomValues(new Int32Array(4));
const next = () => { const t = ((a + b) | 0) + d | 0; d = d + 1 | 0; a = b ^ b >>> 9;
b = c + (c << 3) | 0; c = c << 21 | c >>> 11; c = c + t | 0; return t >>> 0; };
Math.random = function random() {
return ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992; }; }",
    flush: "await Deno.jupyter.broadcast('mica_flushed', {});",
    unread: Some(("Execution failed", deno_reason)),
    anew: None,
};

/// A module whose first line throws is read as a whole, and nothing else of it is run.
fn deno_reason(code: &str) -> String {
    let address = "data:application/typescript;charset=utf-8,";
    format!(
        "try {{ await import({} + encodeURIComponent('throw null;\\n' + {})); }} catch (error) {{
const text = String(error?.message ?? ''), end = text.indexOf('\\n    at data:');
if (text.startsWith('SyntaxError: ') && end > 0) {{
const reason = new SyntaxError(text.slice(13, end)
.replace(/^(\\s*)(\\d+) \\|/gm, (_, space, line) => `${{space}}${{line - 1}} |`));
reason.stack = `SyntaxError: ${{reason.message}}`; throw reason; }} }}",
        js(address),
        js(code)
    )
}

pub static BASH: Snippets = Snippets {
    set: |name, value| is_identifier(name).then(|| format!("export {name}={}", bash(value))),
    unset: |name| is_identifier(name).then(|| format!("unset {name}")),
    reseed: "RANDOM=$(od -An -N2 -tu2 /dev/urandom)",
    flush: "",
    unread: None,
    anew: Some("Restarting Bash"),
};

pub static R: Snippets = Snippets {
    set: |name, value| {
        is_identifier(name).then(|| format!("Sys.setenv({name} = {})", quoted(value)))
    },
    unset: |name| Some(format!("Sys.unsetenv({})", quoted(name))),
    reseed: "set.seed(NULL)",
    flush: "",
    unread: None,
    anew: None,
};

/// As E2B has it: a call's variables are system properties, because a Java process cannot change
/// its environment.
pub static JAVA: Snippets = Snippets {
    set: |name, value| Some(format!("System.setProperty({}, {});", quoted(name), quoted(value))),
    unset: |name| Some(format!("System.clearProperty({});", quoted(name))),
    reseed: "",
    flush: "",
    unread: None,
    anew: None,
};

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn only_what_differs_is_changed() {
        let held = map(&[("GONE", "1"), ("SAME", "1"), ("OTHER", "1")]);
        let wanted = map(&[("SAME", "1"), ("OTHER", "2"), ("NEW", "1")]);
        let changes = Changes::between(&held, &wanted, true).unwrap();
        assert_eq!(changes.set, BTreeMap::from([("NEW", "1"), ("OTHER", "2")]));
        assert_eq!((changes.unset, changes.reseed), (vec!["GONE"], true));
        assert_eq!(Changes::between(&held, &held, false), None);
        assert!(Changes::between(&held, &held, true).unwrap().set.is_empty());
    }

    #[test]
    fn values_cannot_leave_their_quotes() {
        let hostile = "a'b\"c\\d\n$(x)\t";
        let line = |snippets: &Snippets| (snippets.set)("A", hostile).unwrap();
        assert_eq!(line(&BASH), "export A=$'a\\'b\"c\\\\d\\012$(x)\\011'");
        assert_eq!(line(&DENO), "Deno.env.set(\"A\", \"a'b\\\"c\\\\d\\n$(x)\\t\");");
        assert_eq!(line(&R), "Sys.setenv(A = \"a'b\\\"c\\\\d\\012$(x)\\011\")");
        assert_eq!((BASH.set)("A;reboot", "1"), None);
        assert_eq!((R.set)("A=1, B", "1"), None);
    }

    #[test]
    fn a_call_is_put_back_to_what_the_sandbox_has() {
        let (call, standing) = (map(&[("A", "1"), ("B", "2")]), map(&[("B", "9")]));
        assert_eq!(BASH.before(None, &call), "export A=$'1'\nexport B=$'2'");
        assert_eq!(BASH.after(&call, &standing), "unset A\nexport B=$'9'");
        assert_eq!(BASH.after(&map(&[]), &standing), "");
        assert!(DENO.after(&map(&[]), &standing).contains("mica_flushed"));
    }
}
