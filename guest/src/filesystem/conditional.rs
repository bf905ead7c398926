//! The conditions under which a client wants a file: `If-Match` and its kin.
//!
//! Called by [`super::download`]. Pure. Ignores dates that are not in HTTP's form, as HTTP asks.

use http::{HeaderMap, header};

use super::time::from_http_date;

/// The conditional headers of one request, and its range.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    if_match: Option<String>,
    if_none_match: Option<String>,
    if_modified_since: Option<String>,
    if_unmodified_since: Option<String>,
    if_range: Option<String>,
    range: Option<String>,
}

/// What a file is told apart by.
#[derive(Clone, Copy, Debug)]
pub struct Validators<'a> {
    /// With its quotes.
    pub etag: &'a str,
    /// Seconds since the Unix epoch.
    pub modified: u64,
}

/// What to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// The file, or this range of it.
    Send(Option<&'a str>),
    /// The client has it: 304.
    NotModified,
    /// It is not the file that the client means: 412.
    Failed,
}

impl Conditions {
    /// Those of a request.
    pub fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name)?.to_str().ok().map(str::to_owned);
        Self {
            if_match: text(header::IF_MATCH),
            if_none_match: text(header::IF_NONE_MATCH),
            if_modified_since: text(header::IF_MODIFIED_SINCE),
            if_unmodified_since: text(header::IF_UNMODIFIED_SINCE),
            if_range: text(header::IF_RANGE),
            range: text(header::RANGE),
        }
    }

    /// Whether there are any; what they are about is the file as it is on disk, not compressed.
    pub fn any(&self) -> bool {
        let all = [
            &self.if_match,
            &self.if_none_match,
            &self.if_modified_since,
            &self.if_unmodified_since,
            &self.if_range,
            &self.range,
        ];
        all.iter().any(|header| header.is_some())
    }

    /// Checks them in the order of RFC 9110.
    pub fn check(&self, file: Validators<'_>) -> Verdict<'_> {
        let date = |header: &Option<String>| header.as_deref().and_then(from_http_date);
        if let Some(tags) = &self.if_match {
            if !lists(tags, file.etag, false) {
                return Verdict::Failed;
            }
        } else if date(&self.if_unmodified_since).is_some_and(|since| file.modified > since) {
            return Verdict::Failed;
        }
        if let Some(tags) = &self.if_none_match {
            if lists(tags, file.etag, true) {
                return Verdict::NotModified;
            }
        } else if date(&self.if_modified_since).is_some_and(|since| file.modified <= since) {
            return Verdict::NotModified;
        }
        let is_same = self.if_range.as_deref().is_none_or(|tag| {
            tag.trim() == file.etag || from_http_date(tag).is_some_and(|at| at == file.modified)
        });
        Verdict::Send(self.range.as_deref().filter(|_| is_same))
    }
}

/// Whether a list of tags has this one; `*` has every one. Ours hold no comma.
fn lists(tags: &str, wanted: &str, is_weak: bool) -> bool {
    tags.split(',').map(str::trim).any(|tag| {
        let tag = if is_weak { tag.strip_prefix("W/").unwrap_or(tag) } else { tag };
        tag == "*" || tag == wanted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "Sun, 06 Nov 1994 08:49:36 GMT";
    const NOW: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const FILE: Validators<'static> = Validators { etag: "\"1-a\"", modified: 784_111_777 };

    fn conditions(pairs: &[(&'static str, &str)]) -> Conditions {
        let pair = |(name, value): &(&'static str, &str)| {
            (header::HeaderName::from_static(name), value.parse().unwrap())
        };
        Conditions::of(&pairs.iter().map(pair).collect())
    }

    #[test]
    fn each_condition_has_its_answer() {
        let range = "bytes=0-1";
        for (given, wanted) in [
            (&[][..], Verdict::Send(None)),
            (&[("range", range)], Verdict::Send(Some(range))),
            (&[("if-none-match", "\"1-a\"")], Verdict::NotModified),
            (&[("if-none-match", "\"x\", W/\"1-a\"")], Verdict::NotModified),
            (&[("if-none-match", "*")], Verdict::NotModified),
            (&[("if-none-match", "\"x\"")], Verdict::Send(None)),
            (&[("if-none-match", "\"x\""), ("if-modified-since", NOW)], Verdict::Send(None)),
            (&[("if-modified-since", NOW)], Verdict::NotModified),
            (&[("if-modified-since", OLD)], Verdict::Send(None)),
            (&[("if-modified-since", "yesterday")], Verdict::Send(None)),
            (&[("if-match", "\"x\"")], Verdict::Failed),
            (&[("if-match", "W/\"1-a\"")], Verdict::Failed),
            (&[("if-match", "*")], Verdict::Send(None)),
            (&[("if-match", "\"1-a\""), ("if-unmodified-since", OLD)], Verdict::Send(None)),
            (&[("if-unmodified-since", OLD)], Verdict::Failed),
            (&[("if-unmodified-since", NOW)], Verdict::Send(None)),
            (&[("if-range", "\"1-a\""), ("range", range)], Verdict::Send(Some(range))),
            (&[("if-range", NOW), ("range", range)], Verdict::Send(Some(range))),
            (&[("if-range", OLD), ("range", range)], Verdict::Send(None)),
            (&[("if-range", "\"x\""), ("range", range)], Verdict::Send(None)),
        ] {
            let conditions = conditions(given);
            assert_eq!(conditions.any(), !given.is_empty());
            assert_eq!(conditions.check(FILE), wanted, "{given:?}");
        }
    }
}
