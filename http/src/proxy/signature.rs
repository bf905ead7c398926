//! Signed file URLs that name no sandbox.
//!
//! Called by [`super::target`] to see one, and by [`crate::serve`] to find whose it is: SDKs that were
//! given one address for all sandboxes make URLs without an id, and the signature tells which token,
//! and so which sandbox, made it. The agent of that sandbox checks it again. Refuses to look more than
//! a few times at once.

use std::cell::Cell;
use std::hint::black_box;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use hyper::{Method, Uri};
use mica_shards::{Host, Lifecycle};
use mica_units::SandboxId;
use sha2::{Digest, Sha256};

use crate::error::ApiError;
use crate::percent;

/// The only route of envd that takes signatures.
const FILES: &str = "/files";

/// Searches of one shard at a time. Each asks all shards, and hashes once for every sandbox.
const SEARCHES_MAX: u32 = 4;

/// `v1_` and the unpadded base64 of 32 bytes.
const SIGNATURE_CHARS: usize = 3 + 43;

/// A colon and the longest number of seconds.
const EXPIRATION_CHARS_MAX: usize = 1 + 20;

/// Whether the request is for a file and carries a signature.
#[must_use]
pub fn is_signed_file(method: &Method, uri: &Uri) -> bool {
    let signed = |query: &str| query.split('&').any(|part| part.starts_with("signature="));
    action(method).is_some() && uri.path() == FILES && uri.query().is_some_and(signed)
}

fn action(method: &Method) -> Option<&'static str> {
    match *method {
        Method::GET | Method::HEAD => Some("read"),
        Method::POST => Some("write"),
        _ => None,
    }
}

/// What was signed, but for the token.
#[derive(Debug, PartialEq, Eq)]
struct Signed {
    before_token: String,
    after_token: String,
    signature: String,
}

impl Signed {
    fn read(method: &Method, uri: &Uri) -> Option<Self> {
        let pairs = percent::query_pairs(uri.query()?).ok()?;
        // Of several the agent takes the first.
        let get =
            |wanted: &str| pairs.iter().find_map(|(k, v)| (k == wanted).then_some(v.as_str()));
        let (path, user) = (get("path").unwrap_or(""), get("username").unwrap_or(""));
        let expiration = get("signature_expiration");
        Some(Self {
            before_token: format!("{path}:{}:{user}:", action(method)?),
            after_token: expiration.map(|at| format!(":{at}")).unwrap_or_default(),
            signature: get("signature")?.to_owned(),
        })
    }

    /// Whether it could be a signature at all: hashing costs more than looking.
    fn is_in_form(&self) -> bool {
        self.signature.len() == SIGNATURE_CHARS && self.after_token.len() <= EXPIRATION_CHARS_MAX
    }

    /// What comes before the token, hashed once for all tokens.
    fn begun(&self) -> Sha256 {
        Sha256::new_with_prefix(&self.before_token)
    }

    fn is_made_with(&self, token: &str, begun: &Sha256) -> bool {
        let mut hash = begun.clone();
        hash.update(token);
        hash.update(&self.after_token);
        let wanted = format!("v1_{}", STANDARD_NO_PAD.encode(hash.finalize()));
        let pairs = wanted.bytes().zip(self.signature.bytes());
        let differing = pairs.fold(0, |all, (a, b)| black_box(all | (a ^ b)));
        wanted.len() == self.signature.len() && differing == 0
    }
}

/// The searches of one shard.
#[derive(Debug, Default)]
pub struct Searches(Cell<u32>);

impl Searches {
    /// Room for one search.
    ///
    /// # Errors
    /// 503 when as many are made as may be.
    pub fn begin(&self) -> Result<Search<'_>, ApiError> {
        Search::begin(&self.0).ok_or_else(ApiError::busy)
    }

    /// The sandbox whose token signed this request: one that runs, or that a request may wake.
    ///
    /// # Errors
    /// 400 when there is none, 503 when too many are looked for already.
    pub async fn find(
        &self,
        host: &Host,
        method: &Method,
        uri: &Uri,
    ) -> Result<SandboxId, ApiError> {
        let Some(signed) = Signed::read(method, uri).filter(Signed::is_in_form) else {
            return Err(ApiError::unknown_signature());
        };
        let _search = self.begin()?;
        let sandboxes = host.list().await?;
        let begun = signed.begun();
        let made_it = sandboxes.iter().find(|info| {
            let token = info.access_token.as_deref();
            let wakes = info.auto_resume && !info.disk_alone;
            (info.state == Lifecycle::Running || wakes)
                && token.is_some_and(|token| signed.is_made_with(token, &begun))
        });
        made_it.map(|info| info.id).ok_or_else(ApiError::unknown_signature)
    }
}

/// One search. Dropping it makes room for another.
#[derive(Debug)]
pub struct Search<'c>(&'c Cell<u32>);

impl<'c> Search<'c> {
    fn begin(count: &'c Cell<u32>) -> Option<Self> {
        if count.get() >= SEARCHES_MAX {
            return None;
        }
        count.set(count.get() + 1);
        Some(Self(count))
    }
}

impl Drop for Search<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(method: &Method, uri: &str) -> Option<Signed> {
        Signed::read(method, &uri.parse().unwrap())
    }

    fn is_made(signed: &Signed, token: &str) -> bool {
        signed.is_in_form() && signed.is_made_with(token, &signed.begun())
    }

    #[test]
    fn only_requests_for_files_with_a_signature_count() {
        let is = |method, uri: &str| is_signed_file(&method, &uri.parse().unwrap());
        assert!(is(Method::GET, "/files?path=/a&signature=v1_x"));
        assert!(is(Method::POST, "/files?signature="));
        assert!(!is(Method::DELETE, "/files?signature=v1_x"));
        assert!(!is(Method::GET, "/files?path=/a&signature_expiration=1"));
        assert!(!is(Method::GET, "/files/x?signature=v1_x"));
        assert!(!is(Method::GET, "/files"));
    }

    #[test]
    fn a_signature_is_over_path_action_user_token_and_end() {
        // printf '%s' '/a b:read:user:t0ken:17' | sha256sum, in base64 without padding.
        let made = "v1_eqrXcrJwiPx5GeYaC55LpFL6/07lbaK3tOwHf8HjmmY";
        let query = "path=%2Fa+b&username=user&signature_expiration=17";
        let uri = format!("/files?{query}&signature={}", made.replace('+', "%2B"));
        let with_end = signed(&Method::GET, &uri).unwrap();
        assert!(is_made(&with_end, "t0ken"));
        assert!(!is_made(&with_end, "t0kem") && !is_made(&with_end, ""));
        assert!(!is_made(&signed(&Method::POST, &uri).unwrap(), "t0ken"), "another action");
        let later = uri.replace("=17", "=18");
        assert!(!is_made(&signed(&Method::GET, &later).unwrap(), "t0ken"), "another end");
        assert!(signed(&Method::GET, "/files?signature=%zz").is_none());
    }

    #[test]
    fn few_searches_run_at_once() {
        let count = Cell::new(0);
        let held: Vec<_> = (0..SEARCHES_MAX).map(|_| Search::begin(&count)).collect();
        assert!(held.iter().all(Option::is_some) && Search::begin(&count).is_none());
        drop(held);
        assert!(Search::begin(&count).is_some());
    }
}
