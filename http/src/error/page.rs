//! What a browser shows where a sandbox gave no answer.
//!
//! Called by [`crate::serve`] with what its proxy has to say. Refuses to show a page to programs: they get the
//! JSON that SDKs match, also where they would take anything.

use hyper::header::{ACCEPT, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, VARY};
use hyper::{HeaderMap, Response, StatusCode};
use mica_units::GuestPort;

use super::ApiError;
use crate::body::Body;

impl ApiError {
    /// The response of the proxy: a page where the client rather reads one, and the sandbox is what is missing.
    #[must_use]
    pub fn into_proxy_response(self, prefers_page: bool) -> Response<Body> {
        if !prefers_page || self.status != StatusCode::BAD_GATEWAY {
            return self.into_response();
        }
        let page = self.page();
        let mut response = self.into_response();
        *response.body_mut() = Body::full(page);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(VARY, HeaderValue::from_static("accept"));
        // It may stand under the host's own name.
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'"));
        response
    }

    fn page(&self) -> String {
        let message = escaped(&self.message);
        let about = self.about.as_ref().map_or_else(String::new, |about| {
            let port = about.port.map(GuestPort::get);
            let port = port.map_or_else(String::new, |port| format!(", port {port}"));
            format!("<p>Sandbox <code>{}</code>{port}\n", escaped(&about.sandbox_id))
        });
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n\
             <title>{message}</title>\n<h1>{message}</h1>\n{about}"
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Whether a client names HTML, and likes nothing that it names as JSON as much. Browsers do when somebody
/// goes to an address; scripts in their pages, and programs, say that they take anything.
#[must_use]
pub fn prefers_page(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(ACCEPT).into_iter().filter_map(|accept| accept.to_str().ok());
    let (mut html, mut json) = (0.0_f32, 0.0_f32);
    for range in ranges.flat_map(|accept| accept.split(',')) {
        let (kind, rest) = range.split_once(';').unwrap_or((range, ""));
        let weight = || quality(rest);
        match kind.trim() {
            kind if kind.eq_ignore_ascii_case("text/html") => html = html.max(weight()),
            kind if kind.eq_ignore_ascii_case("application/json") => json = json.max(weight()),
            _ => {}
        }
    }
    html > json
}

/// How much a media range is liked: all, unless it says.
fn quality(parameters: &str) -> f32 {
    let q = parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("q").then_some(value.trim())
    });
    q.map_or(1.0, |q| q.parse().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_prefers_a_page() {
        let prefers = |accept: &'static str| {
            let accept = HeaderValue::from_static(accept);
            prefers_page(&HeaderMap::from_iter([(ACCEPT, accept)]))
        };
        assert!(!prefers_page(&HeaderMap::new()));
        for browser in [
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "TEXT/HTML",
            "application/json;q=0.5, text/html; q=0.9",
        ] {
            assert!(prefers(browser), "{browser}");
        }
        for program in [
            "",
            "*/*",
            "text/*",
            "application/json",
            "application/json, text/html",
            "text/html;q=0.5, application/json",
            "text/html;q=0",
            "text/html;q=much",
        ] {
            assert!(!prefers(program), "{program}");
        }
    }

    #[test]
    fn pages_are_for_what_is_missing_alone_and_quote_what_they_show() {
        let gone = || ApiError::sandbox_not_found("<i>&");
        let page = gone().into_proxy_response(true);
        assert_eq!(page.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
        assert_eq!(
            (page.status().as_u16(), &page.headers()["should-retry"]),
            (502, &"false".parse().unwrap())
        );
        let text = gone().page();
        assert!(text.contains("<h1>The sandbox was not found</h1>"), "{text}");
        assert!(text.contains("<code>&lt;i&gt;&amp;</code>"), "{text}");
        for (error, prefers) in [(gone(), false), (ApiError::invalid_sandbox_id(), true)] {
            let answer = error.into_proxy_response(prefers);
            assert_eq!(answer.headers()[CONTENT_TYPE], "application/json; charset=utf-8");
            assert!(!answer.headers().contains_key(VARY));
        }
    }
}
