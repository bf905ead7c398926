//! Headers that end at this hop.
//!
//! Called for every proxied request and response. Refuses to pass on what describes one connection
//! and not the message (RFC 9110, 7.6.1): framing is made anew on each side, which is also what
//! makes request smuggling by two disagreeing lengths impossible.

use hyper::HeaderMap;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What opens the ports of a sandbox that are not public, in the words of E2B and of CubeSandbox.
const TRAFFIC_TOKENS: [HeaderName; 2] = [
    HeaderName::from_static("e2b-traffic-access-token"),
    HeaderName::from_static("cube-traffic-access-token"),
];

/// Takes the traffic token out of a request: it is for this host, and no server in a sandbox may learn
/// it. One that is empty is none.
pub fn take_traffic_token(headers: &mut HeaderMap) -> Option<String> {
    let [first, second] = TRAFFIC_TOKENS.map(|name| headers.remove(name));
    let shown = first.or(second)?;
    // What is not text is no token of ours, and still more than none.
    let text = String::from_utf8_lossy(shown.as_bytes()).into_owned();
    (!text.is_empty()).then_some(text)
}

/// Leaves the headers of a request that are the sandbox's business.
pub fn clean_request(headers: &mut HeaderMap) {
    // Whoever wants trailers has to say so on every hop.
    let trailers = headers.get_all(TE).iter().any(has_trailers);
    remove_hop_by_hop(headers);
    // The client gets its `100 Continue` from us, when the sandbox has taken the connection.
    headers.remove(EXPECT);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Leaves the headers of a response that are the client's business.
pub fn clean_response(headers: &mut HeaderMap) {
    remove_hop_by_hop(headers);
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    // Of two lengths the chunks are the true one (RFC 9112, 6.3), and the other must not go on.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    // `Trailer` stays: it names fields of the message's end, and hyper writes only those it names.
    for name in [
        CONNECTION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        headers.remove(name);
    }
}

fn has_trailers(value: &HeaderValue) -> bool {
    value
        .to_str()
        .is_ok_and(|value| value.split(',').any(|t| t.trim().eq_ignore_ascii_case("trailers")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(n, v): &(&'static str, &'static str)| {
            (HeaderName::from_static(n), HeaderValue::from_static(v))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn what_belongs_to_the_connection_goes() {
        let mut headers = map(&[
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("proxy-authorization", "x"),
            ("expect", "100-continue"),
            ("trailer", "x-sum"),
            ("authorization", "Basic dXNlcjo="),
            ("x-access-token", "t"),
        ]);
        clean_request(&mut headers);
        let expected = map(&[
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("authorization", "Basic dXNlcjo="),
            ("x-access-token", "t"),
        ]);
        assert_eq!(headers, expected);
    }

    #[test]
    fn a_traffic_token_is_taken_out_in_either_spelling() {
        let (e2b, cube) = ("e2b-traffic-access-token", "cube-traffic-access-token");
        for (given, token) in [
            (map(&[(e2b, "a"), (cube, "b"), ("x", "y")]), Some("a")),
            (map(&[(cube, "b"), ("x", "y")]), Some("b")),
            (map(&[(e2b, ""), ("x", "y")]), None),
            (map(&[("x", "y")]), None),
        ] {
            let mut headers = given;
            assert_eq!(take_traffic_token(&mut headers).as_deref(), token);
            assert_eq!(headers, map(&[("x", "y")]));
        }
    }
}
