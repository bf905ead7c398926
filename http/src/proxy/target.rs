//! Whom a request is for: this host's control plane, or a port of a sandbox.
//!
//! Called once for every request, before anything else looks at it. Refuses a request that names a
//! sandbox out of form, and one whose host is ambiguous.
//!
//! ```text
//!  Host: 49983-iabc….sandboxes.example   ─▶ port 49983 of iabc…   (first, whatever headers say)
//!  E2b-Sandbox-Id: iabc…                 ─▶ that port of iabc…
//!  E2b-Sandbox-Port: 49983
//!  anything else                         ─▶ the control plane
//! ```
//! A page that a sandbox serves has an origin of the first kind. It must not reach another sandbox
//! by adding headers, so the host name wins.

use hyper::header::HOST;
use hyper::{HeaderMap, Uri, Version};
use mica_units::{GuestPort, SandboxId};

use crate::error::ApiError;
use crate::ids;

const ID_HEADER: &str = "e2b-sandbox-id";
const PORT_HEADER: &str = "e2b-sandbox-port";

/// Whom a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// This host.
    ControlPlane,
    /// A port of a sandbox.
    Sandbox(SandboxId, GuestPort),
}

/// Finds out.
///
/// # Errors
/// 400 for what is out of form, 502 for an id that E2B would take but that is none of ours.
pub fn target(
    version: Version,
    uri: &Uri,
    headers: &HeaderMap,
    domain: Option<&str>,
) -> Result<Target, ApiError> {
    let host = host(version, uri, headers)?;
    if let Some((port, id)) = host.as_deref().and_then(|host| by_host(host, domain)) {
        return sandbox(id, port);
    }
    match (headers.get(ID_HEADER), headers.get(PORT_HEADER)) {
        (None, None) => Ok(Target::ControlPlane),
        (Some(id), Some(port)) => {
            sandbox(id.to_str().unwrap_or_default(), port.to_str().unwrap_or_default())
        }
        (None, Some(_)) => Err(missing("E2b-Sandbox-Id")),
        (Some(_), None) => Err(missing("E2b-Sandbox-Port")),
    }
}

fn missing(name: &str) -> ApiError {
    ApiError::bad_request(format!("missing header {name}: send both or neither"))
}

/// The host name the client meant, in lower case and without a port. A target in absolute form
/// overrides the header (RFC 9112, 3.2.2).
fn host(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let invalid = || ApiError::bad_request("Invalid host: send one Host header");
    let mut values = headers.get_all(HOST).iter();
    let header = values.next();
    if values.next().is_some() {
        return Err(invalid());
    }
    let text = match (uri.host(), header) {
        (Some(host), _) => host,
        (None, Some(value)) => value.to_str().map_err(|_| invalid())?,
        (None, None) if version == Version::HTTP_11 => return Err(invalid()),
        (None, None) => return Ok(None),
    };
    let name = match text.rsplit_once(':') {
        // A bracket after the colon belongs to an IPv6 address.
        Some((name, port)) if !port.ends_with(']') => name,
        _ => text,
    };
    Ok(Some(name.to_ascii_lowercase()))
}

/// Splits `{port}-{id}[-anything].{domain}`. `None` for any other host name.
fn by_host<'a>(host: &'a str, domain: Option<&str>) -> Option<(&'a str, &'a str)> {
    let (label, rest) = host.split_once('.')?;
    let (port, id) = label.split_once('-')?;
    let id = ids::without_client(id);
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let is_ours = match domain {
        Some(domain) => {
            let domain = domain.split_once(':').map_or(domain, |(name, _)| name);
            rest.eq_ignore_ascii_case(domain)
        }
        // Without a domain of our own, only an id in our own form tells a sandbox from a host that
        // happens to be called `1-web.example`.
        None => id.parse::<SandboxId>().is_ok(),
    };
    is_ours.then_some((port, id))
}

fn sandbox(id: &str, port: &str) -> Result<Target, ApiError> {
    let id = ids::without_client(id);
    if !ids::is_e2b_id(id) {
        return Err(ApiError::invalid_sandbox_id());
    }
    let port = port
        .parse()
        .map_err(|problem| ApiError::bad_request(format!("Invalid sandbox port: {problem}")))?;
    match id.parse() {
        Ok(id) => Ok(Target::Sandbox(id, port)),
        Err(_) => Err(ApiError::sandbox_not_found(&id.chars().take(64).collect::<String>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::{HeaderName, HeaderValue};

    const ID: &str = "i0123456789abcdefghij";

    fn find(
        uri: &str,
        headers: &[(&'static str, &str)],
        domain: Option<&str>,
    ) -> Result<Target, u16> {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect();
        target(Version::HTTP_11, &uri.parse().unwrap(), &headers, domain)
            .map_err(|error| error.status().as_u16())
    }

    fn envd() -> Result<Target, u16> {
        Ok(Target::Sandbox(ID.parse().unwrap(), GuestPort::ENVD))
    }

    #[test]
    fn by_headers() {
        for host in ["localhost:3000", "127.0.0.1:3000", "[::1]:3000", "sandbox.x.dev", "box:1"] {
            let headers = [("host", host), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49983")];
            assert_eq!(find("/x", &headers, None), envd(), "{host}");
            assert_eq!(find("/x", &headers[..1], None), Ok(Target::ControlPlane), "{host}");
            assert_eq!(find("/x", &headers[..2], None), Err(400), "the port is missing");
        }
        let ask = |id: &str, port: &str| {
            let headers =
                [("host", "localhost"), ("e2b-sandbox-id", id), ("e2b-sandbox-port", port)];
            find("/", &headers, None)
        };
        assert_eq!(ask(&format!("{ID}-6532622b"), "49983"), envd(), "old clients add theirs");
        assert_eq!(ask("unknown", "49983"), Err(502));
        assert_eq!(ask("../etc", "49983"), Err(400));
        assert_eq!(ask("", "49983"), Err(400));
        for port in ["0", "65536", "http", "", "-1"] {
            assert_eq!(ask(ID, port), Err(400), "{port}");
        }
    }

    #[test]
    fn by_host_name() {
        let ask = |host: &str, domain| find("/", &[("host", host)], domain);
        assert_eq!(ask(&format!("49983-{ID}.any.dev:8080"), None), envd());
        assert_eq!(ask(&format!("49983-{ID}-client.any.dev"), None), envd());
        assert_eq!(ask(&format!("49983-{}.any.dev", ID.to_uppercase()), None), envd());
        assert_eq!(ask("1-web.example", None), Ok(Target::ControlPlane));
        assert_eq!(ask("1-web.example", Some("example")), Err(502));
        assert_eq!(ask(&format!("0-{ID}.any.dev"), None), Err(400));
        assert_eq!(ask(&format!("49983-{ID}.x.dev"), Some("x.dev:8443")), envd());
        let elsewhere = ask(&format!("49983-{ID}.y.dev"), Some("x.dev"));
        assert_eq!(elsewhere, Ok(Target::ControlPlane));
        assert_eq!(ask("api.x.dev", Some("x.dev")), Ok(Target::ControlPlane));
    }

    #[test]
    fn the_host_name_wins_over_headers() {
        let host = format!("49983-{ID}.any.dev");
        let headers = [
            ("host", host.as_str()),
            ("e2b-sandbox-id", "izzzzzzzzzzzzzzzzzzzz"),
            ("e2b-sandbox-port", "80"),
        ];
        assert_eq!(find("/", &headers, None), envd());
        let absolute = format!("http://49983-{ID}.any.dev/path");
        assert_eq!(find(&absolute, &[("host", "localhost")], None), envd());
    }

    #[test]
    fn one_host_and_no_more() {
        assert_eq!(find("/", &[], None), Err(400));
        assert_eq!(find("/", &[("host", "a"), ("host", "b")], None), Err(400));
        let old = target(Version::HTTP_10, &"/".parse().unwrap(), &HeaderMap::new(), None);
        assert_eq!(old, Ok(Target::ControlPlane));
    }
}
