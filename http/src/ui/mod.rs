//! The dashboard: a page, its style and its scripts, which are in this program.
//!
//! Called by [`crate::api`] before it looks for a route. The files need no key, for there is nothing of the host
//! in them; what they show they ask the API for, with the key that the user enters. Refuses every
//! path that is not in [`ASSETS`], and every method but GET and HEAD.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue,
    IF_NONE_MATCH, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Response, StatusCode};
use sha2::{Digest, Sha256};

use crate::body::Body;
use crate::error::ApiError;

/// Nothing from elsewhere, nothing inline, nothing that this page is put into.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Where the page is, so that the names in it are found beside it.
const ROOT: &str = "/ui/";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";
const JSON: &str = "application/json";

/// A file: its name below [`ROOT`], its type, its bytes.
struct Asset(&'static str, &'static str, &'static [u8]);

static ASSETS: &[Asset] = &[
    Asset("", HTML, include_bytes!("index.html")),
    Asset("style.css", CSS, include_bytes!("style.css")),
    Asset("icon.svg", SVG, include_bytes!("icon.svg")),
    Asset("app.js", JS, include_bytes!("app.js")),
    Asset("api.js", JS, include_bytes!("api.js")),
    Asset("dom.js", JS, include_bytes!("dom.js")),
    Asset("format.js", JS, include_bytes!("format.js")),
    Asset("exposition.js", JS, include_bytes!("exposition.js")),
    Asset("history.js", JS, include_bytes!("history.js")),
    Asset("charts.js", JS, include_bytes!("charts.js")),
    Asset("summary.js", JS, include_bytes!("summary.js")),
    Asset("hostmap.js", JS, include_bytes!("hostmap.js")),
    Asset("latency.js", JS, include_bytes!("latency.js")),
    Asset("table.js", JS, include_bytes!("table.js")),
    Asset("detail.js", JS, include_bytes!("detail.js")),
    Asset("dialogs.js", JS, include_bytes!("dialogs.js")),
];

/// The tags of [`ASSETS`], in their order: of what is in the file, so that a new daemon's files are fetched anew.
static TAGS: LazyLock<Vec<HeaderValue>> =
    LazyLock::new(|| ASSETS.iter().map(|Asset(.., bytes)| tag(bytes)).collect());

/// Half of a hash in quotes.
fn tag(bytes: &[u8]) -> HeaderValue {
    let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(&Sha256::digest(bytes)[..16]));
    // Letters, digits and quotes are a value; an empty one would only cost a transfer.
    HeaderValue::try_from(tag).unwrap_or(HeaderValue::from_static(""))
}

/// The answer, if the path is one of the dashboard's. `open`: whether this caller needs no key.
#[must_use]
pub fn answer(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    open: impl FnOnce() -> bool,
) -> Option<Result<Response<Body>, ApiError>> {
    let found = find(path)?;
    if method != Method::GET && method != Method::HEAD {
        return Some(Err(ApiError::method_not_allowed(method, "GET, HEAD, OPTIONS")));
    }
    Some(Ok(match found {
        Found::Elsewhere => elsewhere(),
        // So that the page need not try without a key, and fail.
        Found::Access => {
            let json = if open() { r#"{"key":false}"# } else { r#"{"key":true}"# };
            with_policy(JSON, Body::full(json))
        }
        Found::Asset(asset, tag) => file(asset, tag, headers),
    }))
}

enum Found {
    Elsewhere,
    Access,
    Asset(&'static Asset, &'static HeaderValue),
}

fn find(path: &str) -> Option<Found> {
    // Without the slash the page's names would be looked for beside it.
    if path == ROOT.trim_end_matches('/') {
        return Some(Found::Elsewhere);
    }
    let name = path.strip_prefix(ROOT)?;
    if name == "access.json" {
        return Some(Found::Access);
    }
    let (asset, tag) = ASSETS.iter().zip(TAGS.iter()).find(|(asset, _)| asset.0 == name)?;
    Some(Found::Asset(asset, tag))
}

/// Relative, so that it is right behind a proxy that adds a prefix, too.
fn elsewhere() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    response.headers_mut().insert(LOCATION, HeaderValue::from_static("ui/"));
    response
}

fn file(asset: &'static Asset, tag: &HeaderValue, headers: &HeaderMap) -> Response<Body> {
    let Asset(_, kind, bytes) = asset;
    let known = headers.get_all(IF_NONE_MATCH).iter().any(|value| matches(value, tag));
    let mut response = if known {
        let mut response = with_policy(kind, Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        with_policy(kind, Body::full(*bytes))
    };
    response.headers_mut().insert(ETAG, tag.clone());
    response
}

/// Whether a list of tags has this one; a proxy may have made it a weak one.
fn matches(value: &HeaderValue, tag: &HeaderValue) -> bool {
    let Ok(value) = value.to_str() else { return false };
    value.split(',').map(str::trim).any(|one| one == "*" || one.trim_start_matches("W/") == tag)
}

fn with_policy(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str, headers: &HeaderMap) -> Response<Body> {
        answer(&Method::GET, path, headers, || false).unwrap().unwrap()
    }

    #[test]
    fn every_file_is_there_with_its_policy_and_is_sent_once() {
        for Asset(name, kind, _) in ASSETS {
            let path = format!("{ROOT}{name}");
            let first = get(&path, &HeaderMap::new());
            assert_eq!(
                (first.status(), &first.headers()[CONTENT_TYPE]),
                (StatusCode::OK, &HeaderValue::from_static(kind))
            );
            assert_eq!(first.headers()[CONTENT_SECURITY_POLICY], POLICY, "{name}");
            assert_eq!(first.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
            let tag = first.headers()[ETAG].to_str().unwrap();
            for (known, status) in [
                (tag.to_owned(), StatusCode::NOT_MODIFIED),
                (format!("\"x\", W/{tag}"), StatusCode::NOT_MODIFIED),
                ("\"x\"".to_owned(), StatusCode::OK),
            ] {
                let mut headers = HeaderMap::new();
                headers.insert(IF_NONE_MATCH, known.parse().unwrap());
                assert_eq!(get(&path, &headers).status(), status, "{name}: {known}");
            }
        }
    }

    #[test]
    fn nothing_is_inline_and_every_name_in_a_file_is_one_of_them() {
        let names: Vec<&str> = ASSETS.iter().map(|asset| asset.0).collect();
        for Asset(name, kind, bytes) in ASSETS {
            let text = std::str::from_utf8(bytes).unwrap();
            for bad in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!text.contains(bad), "{name} has {bad}: text goes in with textContent");
            }
            let quoted = |before: &str| -> Vec<String> {
                let ends = text.split(before).skip(1).filter_map(|rest| rest.split('"').next());
                ends.map(str::to_owned).collect()
            };
            let mut named = quoted("from \"./");
            if *kind == HTML {
                assert!(!text.contains(" style=") && !text.contains("<style"), "{name}");
                named = [quoted("src=\""), quoted("href=\"")].concat();
                assert!(named.len() >= 3, "{named:?}");
            }
            for found in named {
                assert!(names.contains(&found.as_str()), "{name} names {found}");
            }
        }
    }

    #[test]
    fn the_slash_is_added_and_what_is_not_there_is_left_to_the_router() {
        let none = HeaderMap::new();
        let moved = get("/ui", &none);
        assert_eq!(
            (moved.status(), &moved.headers()[LOCATION]),
            (StatusCode::PERMANENT_REDIRECT, &HeaderValue::from_static("ui/"))
        );
        for path in ["/", "/ui/state", "/ui/x.js", "/ui//", "/uix", "/ui/../keys"] {
            assert!(answer(&Method::GET, path, &none, || false).is_none(), "{path}");
        }
        let refused = answer(&Method::POST, "/ui/app.js", &none, || false).unwrap().unwrap_err();
        assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
