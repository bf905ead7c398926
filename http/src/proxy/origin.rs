//! Answers of sandboxes under a name of this host, whose origin is then the control plane's.
//!
//! Called by [`crate::serve`] for every such answer; under a name of its own a sandbox has an origin of its
//! own, and may say what it likes. Refuses whatever would outlive the page or reach past it: scripts of the
//! guest run in an origin that is nobody's, fields about the whole origin are taken out, cookies stay below
//! the path they came from, and no service worker is installed.

use hyper::HeaderMap;
use hyper::header::{
    ALT_SVC, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, SET_COOKIE,
    STRICT_TRANSPORT_SECURITY,
};
use mica_units::{GuestPort, SandboxId};

/// Everything that a page commonly needs, but for `allow-same-origin`: with it, its scripts could read what
/// the control plane's pages keep. And but for navigating the window that framed it. A browser enforces the
/// policies of all fields together, so the guest's own cannot take this one back.
const POLICY: HeaderValue = HeaderValue::from_static(
    "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts",
);

/// Fields that a browser takes to be about all of an origin, or all of a host.
const ORIGIN_WIDE: [HeaderName; 14] = [
    ALT_SVC,
    STRICT_TRANSPORT_SECURITY,
    HeaderName::from_static("accept-ch"),
    HeaderName::from_static("clear-site-data"),
    HeaderName::from_static("critical-ch"),
    HeaderName::from_static("nel"),
    HeaderName::from_static("origin-agent-cluster"),
    HeaderName::from_static("public-key-pins"),
    HeaderName::from_static("report-to"),
    HeaderName::from_static("reporting-endpoints"),
    HeaderName::from_static("service-worker-allowed"),
    HeaderName::from_static("set-login"),
    HeaderName::from_static("secure-session-registration"),
    HeaderName::from_static("use-as-dictionary"),
];

/// What becomes of the cookies of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cookies {
    /// They stay with this host's name. Only programs ask so: a browser cannot add headers to a page it
    /// opens.
    OfThisHost,
    /// They stay below this path.
    Below(String),
    /// They are dropped.
    None,
}

impl Cookies {
    /// Those of a request that named a sandbox by headers, a signature or a token.
    #[must_use]
    pub fn by_header(port: GuestPort) -> Self {
        // The agent sets none, and a signed URL of it is a link that anybody may be led to.
        if port == GuestPort::ENVD { Self::None } else { Self::OfThisHost }
    }

    /// Those of a request that named it by path.
    #[must_use]
    pub fn by_path(id: SandboxId, port: GuestPort) -> Self {
        Self::Below(format!("/sandbox/{id}/{port}/"))
    }
}

/// Whether a browser fetches the script of a service worker.
#[must_use]
pub fn is_service_worker(headers: &HeaderMap) -> bool {
    headers.contains_key("service-worker")
}

/// Takes from an answer what it may not say under a name of this host.
pub fn confine(headers: &mut HeaderMap, cookies: &Cookies) {
    for name in ORIGIN_WIDE {
        headers.remove(name);
    }
    headers.append(CONTENT_SECURITY_POLICY, POLICY);
    let set: Vec<HeaderValue> = headers.get_all(SET_COOKIE).iter().cloned().collect();
    headers.remove(SET_COOKIE);
    for value in set.iter().filter_map(|value| narrowed(value, cookies)) {
        headers.append(SET_COOKIE, value);
    }
}

/// The cookie with the scope that it may have. `None` for one that is to be dropped.
fn narrowed(cookie: &HeaderValue, cookies: &Cookies) -> Option<HeaderValue> {
    let path = match cookies {
        Cookies::None => return None,
        Cookies::OfThisHost => None,
        Cookies::Below(path) => Some(path),
    };
    let is_scope = |attribute: &[u8]| {
        let name = attribute.split(|b| *b == b'=').next().unwrap_or_default().trim_ascii();
        name.eq_ignore_ascii_case(b"domain") || path.is_some() && name.eq_ignore_ascii_case(b"path")
    };
    let mut parts = cookie.as_bytes().split(|b| *b == b';');
    let mut kept = parts.next().unwrap_or_default().to_vec();
    for attribute in parts.filter(|attribute| !is_scope(attribute)) {
        kept.push(b';');
        kept.extend_from_slice(attribute);
    }
    if let Some(path) = path {
        kept.extend_from_slice(b"; Path=");
        kept.extend_from_slice(path.as_bytes());
    }
    HeaderValue::from_bytes(&kept).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below() -> Cookies {
        Cookies::by_path("i0123456789abcdefghij".parse().unwrap(), GuestPort::new(8000).unwrap())
    }

    fn cookie(text: &'static str, cookies: &Cookies) -> Option<String> {
        let value = narrowed(&HeaderValue::from_static(text), cookies)?;
        Some(value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_cookie_stays_below_its_path() {
        let path = "Path=/sandbox/i0123456789abcdefghij/8000/";
        for (given, kept) in [
            ("a=b", "a=b"),
            ("a=b; Path=/; HttpOnly", "a=b; HttpOnly"),
            ("a=b;path = /x;DOMAIN=example.com; Secure", "a=b; Secure"),
            ("path=/; Path=/ui; path=/", "path=/"),
            ("a=b; Domain; Max-Age=1", "a=b; Max-Age=1"),
        ] {
            assert_eq!(cookie(given, &below()), Some(format!("{kept}; {path}")), "{given}");
        }
    }

    #[test]
    fn cookies_of_programs_stay_with_the_host_and_the_agent_sets_none() {
        let user = Cookies::by_header(GuestPort::new(8000).unwrap());
        assert_eq!(cookie("a=b; Path=/x; Domain=x.dev", &user).unwrap(), "a=b; Path=/x");
        assert_eq!(cookie("a=b", &Cookies::by_header(GuestPort::ENVD)), None);
    }

    #[test]
    fn the_guest_cannot_lift_the_policy_and_nothing_is_said_about_the_origin() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("content-security-policy", "sandbox allow-same-origin allow-scripts"),
            ("content-type", "text/html"),
            ("clear-site-data", "\"*\""),
            ("service-worker-allowed", "/"),
            ("strict-transport-security", "max-age=9"),
            ("set-cookie", "a=1; Path=/"),
            ("set-cookie", "b=2"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        confine(&mut headers, &below());
        let policies: Vec<_> = headers.get_all(CONTENT_SECURITY_POLICY).iter().collect();
        assert_eq!(policies.len(), 2);
        let ours = policies[1].to_str().unwrap();
        assert!(ours.starts_with("sandbox ") && !ours.contains("same-origin"), "{ours}");
        assert_eq!(headers.get_all(SET_COOKIE).iter().count(), 2);
        headers.remove(CONTENT_SECURITY_POLICY);
        headers.remove(SET_COOKIE);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["content-type"]);
    }
}
