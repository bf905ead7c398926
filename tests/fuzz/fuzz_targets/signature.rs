//! Signed file URLs: what was signed is let in, and nothing else is.
//!
//! Run by libFuzzer. The signature is made here a second time, from its definition: `v1_` and the
//! unpadded base64 of the SHA-256 of `path:action:username:token[:expiration]`.

#![no_main]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use mica_guest::http::Query;
use mica_guest::http::access::{Access, FileAction};
use sha2::{Digest as _, Sha256};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// All of the query but its signature, as it is written in the URL.
    query: &'a str,
    signature: Signature<'a>,
    header: Option<&'a [u8]>,
    token: &'a str,
    writes: bool,
    now_unix_seconds: u64,
}

#[derive(Arbitrary, Debug)]
enum Signature<'a> {
    /// Made with the token.
    Honest,
    /// Made with the token, for the other action.
    ForTheOther,
    Forged(&'a str),
}

fuzz_target!(|input: Input<'_>| {
    let action = if input.writes { FileAction::Write } else { FileAction::Read };
    let honest = signed(&Query::parse(input.query), input.writes, input.token);
    let given = match input.signature {
        Signature::Honest => honest.clone(),
        Signature::ForTheOther => signed(&Query::parse(input.query), !input.writes, input.token),
        Signature::Forged(text) => text.to_owned(),
    };
    // Before the rest, so that it is the one that counts.
    let query = Query::parse(&format!("signature={}&{}", percent(&given), input.query));
    let mut headers = HeaderMap::new();
    if let Some(Ok(value)) = input.header.map(HeaderValue::from_bytes) {
        headers.insert("x-access-token", value);
    }
    let shown = headers.get("x-access-token").map(HeaderValue::as_bytes);
    let by_token = shown == Some(input.token.as_bytes());
    // A number of seconds, read as one: `007` is signed as `7`.
    let in_time = query.get("signature_expiration").is_none_or(|at| {
        let at = at.parse::<i64>().ok().and_then(|at| u64::try_from(at).ok());
        at.is_some_and(|at| at >= input.now_unix_seconds)
    });
    // An empty header is as good as none.
    let by_signature = shown.is_none_or(<[u8]>::is_empty) && given == honest && in_time;

    let check = |access: Access| {
        access.check(Some(input.token), &headers, &query, input.now_unix_seconds).is_ok()
    };
    assert_eq!(check(Access::TokenOrSignature(action)), by_token || by_signature);
    assert_eq!(check(Access::Token), by_token, "a signature opens files and nothing else");
});

fn signed(query: &Query, writes: bool, token: &str) -> String {
    let action = if writes { "write" } else { "read" };
    let path = query.get("path").unwrap_or_default();
    let username = query.get("username").unwrap_or_default();
    let mut text = format!("{path}:{action}:{username}:{token}");
    if let Some(expiration) = query.get("signature_expiration").and_then(|at| at.parse::<i64>().ok()) {
        text += &format!(":{expiration}");
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

/// Every byte encoded: whatever it is, it comes out as it was.
fn percent(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
