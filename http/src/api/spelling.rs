//! In whose spelling a request is written: what E2B's clients and CubeSandbox's mean by the same `timeout`.
//!
//! Called by [`super`] for every request, and by [`super::create`], whose bodies say more. Refuses to guess:
//! CubeSandbox's clients send no header of their own, and what any program may have sent is neither's.

use hyper::HeaderMap;
use hyper::header::HeaderName;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What every SDK of E2B's says about itself, in every version and language.
const PUBLISHER: HeaderName = HeaderName::from_static("publisher");
const E2B: &str = "e2b";

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// E2B's: there are no lives without an end, and less than none is none.
    E2b,
    /// CubeSandbox's: -1 is without an end, and other numbers count from the last request.
    Cube,
    /// It may be either's: -1 is CubeSandbox's, which is an error in E2B's, and other numbers are E2B's.
    Either,
}

/// The fields of a create that CubeSandbox's clients alone send.
#[derive(Debug, Default, Deserialize)]
pub struct CubeFields {
    lifecycle: Option<IgnoredAny>,
    #[serde(rename = "distributionScope")]
    distribution_scope: Option<IgnoredAny>,
    #[serde(rename = "distribution_scope")]
    distribution_scope_older: Option<IgnoredAny>,
    auto_pause: Option<IgnoredAny>,
    auto_resume: Option<IgnoredAny>,
}

impl Spelling {
    /// Of a request, as far as its head says.
    pub fn of(headers: &HeaderMap) -> Self {
        let is_e2b = headers.get(PUBLISHER).is_some_and(|publisher| publisher == E2B);
        if is_e2b { Self::E2b } else { Self::Either }
    }

    /// Of a create with these fields.
    pub fn with(self, fields: &CubeFields) -> Self {
        if fields.is_any() { Self::Cube } else { self }
    }
}

impl CubeFields {
    fn is_any(&self) -> bool {
        self.lifecycle.is_some()
            || self.distribution_scope.is_some()
            || self.distribution_scope_older.is_some()
            || self.auto_pause.is_some()
            || self.auto_resume.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn e2bs_sdks_say_who_they_are_and_cubesandboxs_bodies_do() {
        let of = |publisher: &'static str| {
            Spelling::of(&HeaderMap::from_iter([(PUBLISHER, HeaderValue::from_static(publisher))]))
        };
        assert_eq!(of("e2b"), Spelling::E2b);
        assert_eq!(
            (of("x"), Spelling::of(&HeaderMap::new())),
            (Spelling::Either, Spelling::Either)
        );
        for (body, expected) in [
            (r#"{"lifecycle":{}}"#, Spelling::Cube),
            (r#"{"distributionScope":["n1"]}"#, Spelling::Cube),
            (r#"{"distribution_scope":[]}"#, Spelling::Cube),
            (r#"{"auto_pause":false}"#, Spelling::Cube),
            (r#"{"auto_resume":{"enabled":true}}"#, Spelling::Cube),
            // What E2B's clients send as well, and what says nothing.
            (r#"{"autoPause":true,"autoResume":{"enabled":true}}"#, Spelling::E2b),
            (r#"{"lifecycle":null,"auto_pause":null,"timeout":-1}"#, Spelling::E2b),
        ] {
            let fields = serde_json::from_str(body).unwrap();
            assert_eq!(Spelling::E2b.with(&fields), expected, "{body}");
        }
    }
}
