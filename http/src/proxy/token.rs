//! Requests for a sandbox's agent that say whose it is by its access token alone.
//!
//! Called by [`super::target`] to see one, and by [`crate::serve`] to find whose it is: some SDKs that
//! were given one address for all sandboxes send no id once they have connected to one again, only the
//! token that they were told. It is drawn at random for one sandbox, so it names that sandbox; the agent
//! checks it again. Refuses to look more than a few times at once, and remembers what it found.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::hint::black_box;

use hyper::HeaderMap;
use mica_shards::Host;
use mica_units::SandboxId;
use sha2::{Digest, Sha256};

use super::signature::Searches;
use crate::error::ApiError;

const HEADER: &str = "x-access-token";

/// Hexadecimal digits of a token, as a shard draws it.
const TOKEN_CHARS: usize = 64;

/// Tokens that one shard remembers.
const KNOWN_MAX: usize = 1024;

/// Whether this is asked of an agent, and with a token. The control plane has `/health` alone of these
/// paths, and takes no such header.
#[must_use]
pub fn is_shown(path: &str, headers: &HeaderMap) -> bool {
    let of_agent = matches!(path, "/files" | "/files/compose" | "/health")
        || path.starts_with("/filesystem.Filesystem/")
        || path.starts_with("/process.Process/");
    of_agent && headers.contains_key(HEADER)
}

/// Whose tokens one shard has looked up. A sandbox keeps its token for life, and no id comes twice, so
/// what was found once stays true; only that the sandbox is still there is for the proxy to see.
#[derive(Debug, Default)]
pub struct Holders(RefCell<Known>);

#[derive(Debug, Default)]
struct Known {
    by_hash: HashMap<[u8; 32], SandboxId>,
    /// The oldest first.
    order: VecDeque<[u8; 32]>,
}

impl Known {
    fn remember(&mut self, hash: [u8; 32], id: SandboxId) {
        if self.by_hash.insert(hash, id).is_none() {
            self.order.push_back(hash);
        }
        if self.order.len() > KNOWN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_hash.remove(&oldest);
        }
    }
}

impl Holders {
    /// The sandbox whose token the client shows.
    ///
    /// # Errors
    /// 502 when there is none, 503 when too many are looked for already.
    pub async fn find(
        &self,
        host: &Host,
        searches: &Searches,
        headers: &HeaderMap,
    ) -> Result<SandboxId, ApiError> {
        let shown = headers.get(HEADER).and_then(|value| value.to_str().ok());
        let Some(shown) = shown.filter(|text| text.len() == TOKEN_CHARS) else {
            return Err(ApiError::unknown_token());
        };
        let hash: [u8; 32] = Sha256::digest(shown).into();
        let known = self.0.borrow().by_hash.get(&hash).copied();
        if let Some(id) = known {
            return Ok(id);
        }
        let _search = searches.begin()?;
        let sandboxes = host.list().await?;
        let holds = |token: &Option<String>| token.as_deref().is_some_and(|t| same(t, shown));
        let holder = sandboxes.iter().find(|info| holds(&info.access_token));
        let id = holder.map(|info| info.id).ok_or_else(ApiError::unknown_token)?;
        self.0.borrow_mut().remember(hash, id);
        Ok(id)
    }
}

/// Compares in a time that does not tell how much is right.
fn same(a: &str, b: &str) -> bool {
    let pairs = a.bytes().zip(b.bytes());
    a.len() == b.len() && pairs.fold(0, |all, (a, b)| black_box(all | (a ^ b))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_goes() {
        let id: SandboxId = "i0123456789abcdefghij".parse().unwrap();
        let mut known = Known::default();
        let hash = |n: usize| Sha256::digest(n.to_string()).into();
        for n in 0..KNOWN_MAX {
            known.remember(hash(n), id);
            known.remember(hash(n), id);
        }
        assert_eq!((known.by_hash.len(), known.order.len()), (KNOWN_MAX, KNOWN_MAX));
        known.remember(hash(KNOWN_MAX), id);
        assert_eq!((known.by_hash.len(), known.order.len()), (KNOWN_MAX, KNOWN_MAX));
        assert!(!known.by_hash.contains_key(&hash(0)) && known.by_hash.contains_key(&hash(1)));
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same("abc", "abc"));
        assert!(!same("abc", "abd") && !same("abc", "ab") && !same("", "a"));
    }
}
