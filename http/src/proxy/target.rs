//! Whom a request is for: this host's control plane, or a port of a sandbox.
//!
//! Called once for every request, before anything else looks at it. Refuses a request that names a
//! sandbox out of form, and one whose host is ambiguous.
//!
//! ```text
//!  Host: 49983-iabc….sandboxes.example   ─▶ port 49983 of iabc…   (first, whatever else is said)
//!  GET /sandbox/iabc…/8000/a?b           ─▶ port 8000 of iabc…, which is asked for /a?b
//!  E2b-Sandbox-Id: iabc…                 ─▶ that port of iabc…, under a host name that is ours
//!  E2b-Sandbox-Port: 49983
//!  GET /files?…&signature=v1_…           ─▶ the sandbox whose token signed it
//!  X-Access-Token: …, for the agent      ─▶ the sandbox whose token it is
//!  anything else                         ─▶ the control plane
//! ```
//! A page that a sandbox serves has an origin of the first kind. It must not reach another sandbox
//! by adding headers or a path, so the host name wins. What is answered to the other kinds has the
//! origin of the control plane, see [`super::origin`].

use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::header::HOST;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Uri, Version};
use mica_units::{GuestPort, SandboxId};

use crate::error::ApiError;
use crate::ids;
use crate::proxy::{signature, token};

const ID_HEADER: &str = "e2b-sandbox-id";
const PORT_HEADER: &str = "e2b-sandbox-port";

const ENVD_PORT: &str = "49983";

/// Paths of the third kind begin so.
const PATH_PREFIX: &str = "/sandbox/";

/// Whom a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This host.
    ControlPlane,
    /// A port of a sandbox, under a host name that is the sandbox's own.
    Sandbox(SandboxId, GuestPort),
    /// The same, under a name of this host.
    Shared(SandboxId, GuestPort),
    /// The same, and the server there is to see this path instead of the one that was asked for.
    Path(SandboxId, GuestPort, PathAndQuery),
    /// A file of the sandbox whose token made the signature.
    SignedFile,
    /// The agent of the sandbox whose token the client shows.
    TokenHolder,
}

/// Finds out.
///
/// # Errors
/// 400 for what is out of form, 502 for an id that E2B would take but that is none of ours.
pub fn target(
    version: Version,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    domain: Option<&str>,
) -> Result<Target, ApiError> {
    let host = host(version, uri, headers)?;
    if let Some((port, id)) = host.as_deref().and_then(|host| by_host(host, domain)) {
        let (id, port) = sandbox(id, port)?;
        return Ok(Target::Sandbox(id, port));
    }
    if let Some((id, port, rest)) = by_path(uri) {
        let (id, port) = sandbox(id, port)?;
        return Ok(Target::Path(id, port, rest));
    }
    match (headers.get(ID_HEADER), headers.get(PORT_HEADER)) {
        (None, None) if signature::is_signed_file(method, uri) => Ok(Target::SignedFile),
        (None, None) if token::is_shown(uri.path(), headers) => Ok(Target::TokenHolder),
        (None, None) => Ok(Target::ControlPlane),
        // Some clients send their headers for the agent with what they ask of the host, too. The agent
        // has no such path.
        (Some(_), Some(port)) if port == ENVD_PORT && is_about_sandboxes(uri.path()) => {
            Ok(Target::ControlPlane)
        }
        (Some(id), Some(port)) => {
            if host.is_some_and(|host| !may_name_by_headers(&host, domain)) {
                return Err(ApiError::foreign_host());
            }
            let (id, port) =
                sandbox(id.to_str().unwrap_or_default(), port.to_str().unwrap_or_default())?;
            Ok(Target::Shared(id, port))
        }
        (None, Some(_)) => Err(missing("E2b-Sandbox-Id")),
        (Some(_), None) => Err(missing("E2b-Sandbox-Port")),
    }
}

/// Whether a path is one of the control plane's about a sandbox.
fn is_about_sandboxes(path: &str) -> bool {
    let plain = path.strip_prefix("/v2").unwrap_or(path);
    plain.starts_with("/sandboxes/")
}

/// Whether headers count under this host name: one that no page of a stranger has, unlike a name that
/// the stranger's own DNS turns into this host's address.
fn may_name_by_headers(host: &str, domain: Option<&str>) -> bool {
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if inner.parse::<Ipv4Addr>().is_ok() || inner.parse::<Ipv6Addr>().is_ok() {
        return true;
    }
    // `localhost`, and the names that a local network gives its machines.
    if !host.contains('.') {
        return true;
    }
    let below = host.strip_prefix("sandbox.");
    match domain {
        Some(domain) => {
            let domain = without_port(domain);
            host.eq_ignore_ascii_case(domain)
                || below.is_some_and(|rest| rest.eq_ignore_ascii_case(domain))
        }
        None => below.is_some(),
    }
}

/// Splits `/sandbox/{id}/{port}[/rest][?query]`.
fn by_path(uri: &Uri) -> Option<(&str, &str, PathAndQuery)> {
    let (id, after) = uri.path().strip_prefix(PATH_PREFIX)?.split_once('/')?;
    let (port, rest) = after.split_once('/').unwrap_or((after, ""));
    let rest = match uri.query() {
        Some(query) => format!("/{rest}?{query}"),
        None => format!("/{rest}"),
    };
    Some((id, port, rest.parse().ok()?))
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
        (None, None) if version > Version::HTTP_10 => return Err(invalid()),
        (None, None) => return Ok(None),
    };
    Ok(Some(without_port(text).to_ascii_lowercase()))
}

/// A host without the port that may follow it.
fn without_port(text: &str) -> &str {
    match text.rsplit_once(':') {
        // A bracket after the colon belongs to an IPv6 address.
        Some((name, port)) if !port.ends_with(']') => name,
        _ => text,
    }
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
        Some(domain) => rest.eq_ignore_ascii_case(without_port(domain)),
        // Without a domain of our own, only an id in our own form tells a sandbox from a host that
        // happens to be called `1-web.example`.
        None => id.parse::<SandboxId>().is_ok(),
    };
    is_ours.then_some((port, id))
}

fn sandbox(id: &str, port: &str) -> Result<(SandboxId, GuestPort), ApiError> {
    let id = ids::without_client(id);
    if !ids::is_e2b_id(id) {
        return Err(ApiError::invalid_sandbox_id());
    }
    let port = port
        .parse()
        .map_err(|problem| ApiError::bad_request(format!("Invalid sandbox port: {problem}")))?;
    match id.parse() {
        Ok(id) => Ok((id, port)),
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
        let method = Method::GET;
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect();
        target(Version::HTTP_11, &method, &uri.parse().unwrap(), &headers, domain)
            .map_err(|error| error.status().as_u16())
    }

    fn envd() -> Result<Target, u16> {
        Ok(Target::Sandbox(ID.parse().unwrap(), GuestPort::ENVD))
    }

    fn shared() -> Result<Target, u16> {
        Ok(Target::Shared(ID.parse().unwrap(), GuestPort::ENVD))
    }

    #[test]
    fn headers_for_the_agent_do_not_turn_away_what_is_asked_of_the_host() {
        let headers =
            [("host", "localhost"), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49983")];
        for path in [format!("/sandboxes/{ID}/connect"), format!("/v2/sandboxes/{ID}/connect")] {
            assert_eq!(find(&path, &headers, None), Ok(Target::ControlPlane), "{path}");
        }
        let port = [headers[0], headers[1], ("e2b-sandbox-port", "8000")];
        let user = Target::Shared(ID.parse().unwrap(), GuestPort::new(8000).unwrap());
        assert_eq!(find("/sandboxes/x", &port, None), Ok(user), "a server in it may have any path");
    }

    #[test]
    fn by_headers() {
        for host in ["localhost:3000", "127.0.0.1:3000", "[::1]:3000", "sandbox.x.dev", "box:1"] {
            let headers = [("host", host), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49983")];
            assert_eq!(find("/x", &headers, None), shared(), "{host}");
            assert_eq!(find("/x", &headers[..1], None), Ok(Target::ControlPlane), "{host}");
            assert_eq!(find("/x", &headers[..2], None), Err(400), "the port is missing");
        }
        let ask = |id: &str, port: &str| {
            let headers =
                [("host", "localhost"), ("e2b-sandbox-id", id), ("e2b-sandbox-port", port)];
            find("/", &headers, None)
        };
        assert_eq!(ask(&format!("{ID}-6532622b"), "49983"), shared(), "old clients add theirs");
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
        let bare = |version| {
            target(version, &Method::GET, &"/".parse().unwrap(), &HeaderMap::new(), None).ok()
        };
        assert_eq!(bare(Version::HTTP_10), Some(Target::ControlPlane));
        assert_eq!((bare(Version::HTTP_11), bare(Version::HTTP_2)), (None, None));
    }

    #[test]
    fn headers_count_only_under_names_that_are_ours() {
        let ask = |host: &str, domain| {
            let headers = [("host", host), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49983")];
            find("/", &headers, domain)
        };
        for host in ["sandbox.x.dev", "x.dev:443", "SANDBOX.X.DEV:8443", "10.0.0.1", "[fe80::1]"] {
            assert_eq!(ask(host, Some("x.dev:8443")), shared(), "{host}");
        }
        for host in ["evil.example", "sandbox.evil.example", "api.x.dev", "127.0.0.1.evil.example"]
        {
            assert_eq!(ask(host, Some("x.dev")), Err(400), "{host}");
        }
        assert_eq!(ask("evil.example", None), Err(400));
        assert_eq!(ask("sandbox.evil.example", None), shared(), "no domain was said to be ours");
    }

    #[test]
    fn by_path() {
        let ask = |uri: &str| find(uri, &[("host", "any.example")], None);
        let to = |rest: &str| {
            let (id, port) = (ID.parse().unwrap(), GuestPort::new(8000).unwrap());
            Ok(Target::Path(id, port, rest.parse().unwrap()))
        };
        for (rest, seen) in [
            ("", "/"),
            ("/", "/"),
            ("?a=/b", "/?a=/b"),
            ("/a%2Fb/../c?d=e", "/a%2Fb/../c?d=e"),
            ("//evil.example/", "//evil.example/"),
            ("/sandbox/x/1/", "/sandbox/x/1/"),
        ] {
            assert_eq!(ask(&format!("/sandbox/{ID}/8000{rest}")), to(seen), "{rest}");
        }
        assert_eq!(ask(&format!("/sandbox/{ID}-client/8000/")), to("/"));
        assert_eq!(ask("/sandbox/unknown/8000/"), Err(502));
        assert_eq!(ask("/sandbox/../8000/"), Err(400));
        assert_eq!(ask(&format!("/sandbox/{ID}/0/")), Err(400));
        assert_eq!(ask(&format!("/sandbox/{ID}/http/")), Err(400));
        for other in [format!("/sandbox/{ID}"), "/sandbox/".to_owned(), "/sandboxes/a/b".to_owned()]
        {
            assert_eq!(ask(&other), Ok(Target::ControlPlane), "{other}");
        }
        // Under the name of a sandbox the path is that sandbox's own.
        let host = format!("49983-{ID}.any.dev");
        let other = "/sandbox/izzzzzzzzzzzzzzzzzzzz/80/";
        assert_eq!(find(other, &[("host", &host)], None), envd());
    }

    #[test]
    fn by_signature() {
        let file = "/files?path=/a&signature=v1_x";
        assert_eq!(find(file, &[("host", "localhost")], None), Ok(Target::SignedFile));
        let host = format!("49983-{ID}.any.dev");
        assert_eq!(find(file, &[("host", &host)], None), envd());
        let headers = [("host", "box"), ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "49983")];
        assert_eq!(find(file, &headers, None), shared());
        let unsigned = find("/files?path=/a", &[("host", "localhost")], None);
        assert_eq!(unsigned, Ok(Target::ControlPlane));
    }
    #[test]
    fn by_token() {
        let stat = "/filesystem.Filesystem/Stat";
        let headers = [("host", "any.example"), ("x-access-token", "t")];
        for path in [stat, "/files", "/files?path=/a", "/process.Process/List", "/health"] {
            assert_eq!(find(path, &headers, None), Ok(Target::TokenHolder), "{path}");
            assert_eq!(find(path, &headers[..1], None), Ok(Target::ControlPlane), "{path}");
        }
        for path in ["/sandboxes", "/metrics", "/filesystem.Filesystem", "/init"] {
            assert_eq!(find(path, &headers, None), Ok(Target::ControlPlane), "{path}");
        }
        let host = format!("49983-{ID}.any.dev");
        assert_eq!(find(stat, &[("host", &host), headers[1]], None), envd());
        let named =
            [("host", "box"), headers[1], ("e2b-sandbox-id", ID), ("e2b-sandbox-port", "1")];
        let port = Target::Shared(ID.parse().unwrap(), GuestPort::new(1).unwrap());
        assert_eq!(find(stat, &named, None), Ok(port));
    }
}
