//! The head of a request, as hyper hands it on: whom it is for, and what is asked for.
//!
//! Run by libFuzzer. Bytes are parsed with `httparse`, as hyper does, and become the same parts of a
//! request. Holds that a request of a sandbox's own origin never reaches another sandbox.

#![no_main]

use http::header::{HOST, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Uri, Version};
use libfuzzer_sys::fuzz_target;
use mica_http::fuzzing;

const HEADERS_MAX: usize = 64;
const DOMAIN: &str = "sandboxes.example";

fuzz_target!(|bytes: &[u8]| {
    let Some((method, uri, headers)) = parse(bytes) else { return };
    for domain in [None, Some(DOMAIN)] {
        for version in [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2] {
            check(version, &method, &uri, &headers, domain);
        }
    }
});

fn check(version: Version, method: &Method, uri: &Uri, headers: &HeaderMap, domain: Option<&str>) {
    let Ok(target) = fuzzing::target(version, method, uri, headers, domain) else { return };
    let Some((id, port)) = target else {
        // The control plane: any answer but a panic, and no route for what does not decode.
        fuzzing::route(method, uri.path());
        return;
    };
    // A page that a sandbox serves has an origin of that sandbox: whatever headers and paths its script
    // adds, a host name that names a sandbox decides.
    let host = uri.host().map(str::to_owned).or_else(|| {
        headers.get(HOST).and_then(|host| host.to_str().ok()).map(str::to_owned)
    });
    let label = host.as_deref().and_then(|host| host.split_once('.')).map(|(label, rest)| {
        (label.to_ascii_lowercase(), rest.split(':').next().unwrap_or_default().to_ascii_lowercase())
    });
    if let Some((label, rest)) = label
        && rest == DOMAIN
        && domain.is_some()
        && let Some((named_port, named)) = label.split_once('-')
        && !named_port.is_empty()
        && named_port.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(named) = named.split('-').next().unwrap_or_default().parse::<mica_units::SandboxId>()
    {
        assert_eq!(id, named, "the host names one sandbox, and the request goes to another");
        assert_eq!(named_port.parse().ok(), Some(port));
    }
}

fn parse(bytes: &[u8]) -> Option<(Method, Uri, HeaderMap)> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    request.parse(bytes).ok()?.is_complete().then_some(())?;
    let method = Method::from_bytes(request.method?.as_bytes()).ok()?;
    let uri: Uri = request.path?.parse().ok()?;
    let mut headers = HeaderMap::new();
    for field in request.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        headers.append(name, HeaderValue::from_bytes(field.value).ok()?);
    }
    Some((method, uri, headers))
}
