//! The API keys that open the control plane, whose they are, and what they may do.
//!
//! Called by `src/`, which reads them from files and publishes them anew when those change, and by the
//! API for every request but `GET /health`. Refuses a key that is not in the form SDKs check, and never
//! prints one.
//!
//! What is known of a key is its SHA-256. That is enough, where a password would need a slow and salted
//! hash: a key is 160 bits of the kernel's random source, so nobody finds it by trying, and no two are
//! the same. It also is what makes the look-up safe: a table of hashes tells by its time at most
//! something about the hash of what was offered, and nobody can choose that hash to come close to one
//! in the table.

use std::collections::HashMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST, ORIGIN};
use mica_shards::{Account, Accounts};
use mica_units::TenantId;
use sha2::{Digest, Sha256};

/// What every key starts with: some SDK versions check it on the client side.
const PREFIX: &str = "e2b_";
const HEX_DIGITS: usize = 40;
const KEY_BYTES: usize = PREFIX.len() + HEX_DIGITS;
const HASH_BYTES: usize = 32;

/// How much of a key's hash names it: 48 bits.
const ID_BYTES: usize = 6;

/// Text that is not a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an API key is `e2b_` followed by 40 lower-case hex digits")]
pub struct KeyError;

/// One API key.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey([u8; KEY_BYTES]);

impl ApiKey {
    /// Makes a key from 20 bytes that must come from the kernel's random source.
    #[must_use]
    pub fn from_random(random: [u8; HEX_DIGITS / 2]) -> Self {
        let mut key = [0; KEY_BYTES];
        key[..PREFIX.len()].copy_from_slice(PREFIX.as_bytes());
        for (pair, byte) in key[PREFIX.len()..].chunks_exact_mut(2).zip(random) {
            pair[0] = hex_digit(byte >> 4);
            pair[1] = hex_digit(byte & 0xf);
        }
        Self(key)
    }

    /// The key as text: to be shown to who made it, once, or to be written to a key file.
    #[must_use]
    pub fn reveal(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// What may be kept of it.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash(Sha256::digest(self.0).into())
    }
}

fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl FromStr for ApiKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let digits = text.strip_prefix(PREFIX).ok_or(KeyError)?;
        if !is_hex(digits) {
            return Err(KeyError);
        }
        text.as_bytes().try_into().map(Self).map_err(|_| KeyError)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(e2b_…)")
    }
}

/// The SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; HASH_BYTES]);

impl KeyHash {
    /// What people and records call the key: the start of its hash.
    #[must_use]
    pub fn id(&self) -> String {
        self.to_string()[..2 * ID_BYTES].to_owned()
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({})", self.id())
    }
}

impl FromStr for KeyHash {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        if text.len() != 2 * HASH_BYTES || !is_hex(text) {
            return Err(KeyError);
        }
        let mut hash = [0; HASH_BYTES];
        for (byte, at) in hash.iter_mut().zip((0..text.len()).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| KeyError)?;
        }
        Ok(Self(hash))
    }
}

/// How much a key may do. Absent: as much as the host can.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KeyLimits {
    /// Sandboxes at one time, running and paused, those being made included.
    pub sandboxes_max: Option<u32>,
    /// Sandboxes made in a second; a positive number.
    pub creates_per_second: Option<f64>,
}

/// What a key gives.
#[derive(Clone, Debug)]
pub struct KeyGrant {
    /// Whose sandboxes it opens.
    pub tenant: TenantId,
    /// How much of them.
    pub limits: KeyLimits,
    /// Where its sandboxes are counted.
    pub account: Arc<Account>,
}

/// Whoever sent a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Whose sandboxes it may see.
    pub tenant: TenantId,
    /// What its key gives. None without a key, where that is allowed.
    pub grant: Option<Arc<KeyGrant>>,
}

/// Every key that is accepted, as all shards see it. Clones show the same keys, also later ones.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    grants: Arc<ArcSwap<HashMap<KeyHash, Arc<KeyGrant>>>>,
    open: bool,
}

impl Keys {
    /// No key yet. `open`: requests without one are the default tenant's.
    #[must_use]
    pub fn new(open: bool) -> Self {
        Self { open, ..Self::default() }
    }

    /// From now on exactly these keys are accepted, on every shard. Accounts that are in `accounts` are
    /// kept, and new ones are put there; one without a key or a sandbox goes. Called by one thread.
    pub fn publish(
        &self,
        keys: impl IntoIterator<Item = (KeyHash, TenantId, KeyLimits)>,
        accounts: &mut Accounts,
    ) {
        let mut grants = HashMap::new();
        for (hash, tenant, limits) in keys {
            let id = hash.id();
            let account = accounts.entry(id).or_insert_with_key(|id| Account::new(id));
            let account = Arc::clone(account);
            grants.insert(hash, Arc::new(KeyGrant { tenant, limits, account }));
        }
        let known: std::collections::HashSet<String> = grants.keys().map(KeyHash::id).collect();
        accounts.retain(|id, account| known.contains(id) || account.live() > 0);
        self.grants.store(Arc::new(grants));
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.grants.load().len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Who sends a request with these headers, if it may.
    #[must_use]
    pub fn admit(&self, headers: &HeaderMap) -> Option<Caller> {
        let grant = offered(headers).and_then(|key| self.find(key));
        match grant {
            Some(grant) => Some(Caller { tenant: grant.tenant.clone(), grant: Some(grant) }),
            None if self.open && !is_foreign_page(headers) && !has_foreign_host(headers) => {
                Some(Caller { tenant: TenantId::default(), grant: None })
            }
            None => None,
        }
    }

    fn find(&self, offered: &[u8]) -> Option<Arc<KeyGrant>> {
        // The length is no secret, and a long header is not worth hashing.
        if offered.len() != KEY_BYTES {
            return None;
        }
        let hash = KeyHash(Sha256::digest(offered).into());
        self.grants.load().get(&hash).cloned()
    }
}

/// Whether a page that is not this machine's own sends the request: an open host is open to its machine,
/// not to every page that somebody there looks at.
fn is_foreign_page(headers: &HeaderMap) -> bool {
    headers.get_all(ORIGIN).iter().any(|origin| {
        let host =
            origin.to_str().ok().and_then(|text| text.split_once("://")).map(|(_, host)| host);
        let name = host.map(|host| match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        });
        !matches!(name, Some("localhost" | "127.0.0.1" | "[::1]"))
    })
}

/// Whether the request was sent to a name that is not this machine's own: a page whose name a stranger's
/// DNS turns into this machine's address sends its requests here as if they were to itself.
fn has_foreign_host(headers: &HeaderMap) -> bool {
    headers.get_all(HOST).iter().any(|host| {
        let name = host.to_str().ok().map(|host| match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        });
        let is_own = |name: &str| {
            name.parse::<Ipv4Addr>().is_ok()
                || name.starts_with('[')
                // `localhost`, and the names that a local network gives its machines.
                || !name.contains('.')
                || name.ends_with(".localhost")
        };
        !name.is_some_and(is_own)
    })
}

/// The key of a request: a bearer token wins over `X-API-Key`.
fn offered(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
    });
    bearer.or_else(|| headers.get("x-api-key").map(|key| key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::{HeaderName, HeaderValue};

    fn key(byte: u8) -> ApiKey {
        ApiKey::from_random([byte; 20])
    }

    fn grant(byte: u8, tenant: &str) -> (KeyHash, TenantId, KeyLimits) {
        (key(byte).hash(), tenant.parse().unwrap(), KeyLimits::default())
    }

    fn keys(open: bool) -> Keys {
        let keys = Keys::new(open);
        keys.publish([grant(1, "one"), grant(0xab, "two")], &mut Accounts::new());
        keys
    }

    fn with(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    fn tenant(keys: &Keys, pairs: &[(&'static str, &str)]) -> Option<String> {
        keys.admit(&with(pairs)).map(|caller| caller.tenant.to_string())
    }

    #[test]
    fn keys_are_in_the_form_sdks_check() {
        let key = key(0xab);
        assert_eq!(key.reveal(), format!("e2b_{}", "ab".repeat(20)));
        assert_eq!(key.reveal().parse(), Ok(key.clone()));
        assert!(!format!("{key:?} {:?}", key.hash()).contains("abab"), "a key must not be printed");
        for bad in ["", "e2b_", &"ab".repeat(20), &format!("e2b_{}", "AB".repeat(20))] {
            assert_eq!(bad.parse::<ApiKey>(), Err(KeyError), "{bad:?}");
        }
    }

    #[test]
    fn hashes_are_sha_256_and_round_trip() {
        let hash = ApiKey::from_random([0; 20]).hash();
        // printf 'e2b_%040d' 0 | sha256sum
        let expected = "6aa1fc737ae695d4574acd499f9ec1cc63a1d245f89b676451e5db329ce22c0c";
        assert_eq!(hash.to_string(), expected);
        assert_eq!(hash.id(), &expected[..12]);
        assert_eq!(expected.parse(), Ok(hash));
        for bad in ["", &expected[1..], &expected.to_uppercase(), &format!("{expected}0")] {
            assert_eq!(bad.parse::<KeyHash>(), Err(KeyError), "{bad:?}");
        }
    }

    #[test]
    fn both_headers_admit_the_bearer_wins_and_nothing_else_does() {
        let (one, two) = (key(1), key(0xab));
        let (one, two) = (one.reveal(), two.reveal());
        let keys = keys(false);
        let bearer = |key: &str| format!("Bearer {key}");
        assert_eq!(tenant(&keys, &[("x-api-key", two)]).as_deref(), Some("two"));
        assert_eq!(tenant(&keys, &[("authorization", &bearer(one))]).as_deref(), Some("one"));
        let lower = format!("bearer {one}");
        assert_eq!(tenant(&keys, &[("authorization", &lower)]).as_deref(), Some("one"));
        let both = [("x-api-key", two), ("authorization", &bearer(one))];
        assert_eq!(tenant(&keys, &both).as_deref(), Some("one"));
        let wrong = [("x-api-key", two), ("authorization", "Bearer e2b_0")];
        assert_eq!(tenant(&keys, &wrong), None, "a bearer token wins also when it is wrong");
        let basic = [("x-api-key", two), ("authorization", "Basic x")];
        assert_eq!(tenant(&keys, &basic).as_deref(), Some("two"));
        for bad in ["", "e2b_", &two[..43], &format!("{two}0"), &two.replace('b', "c")] {
            assert_eq!(tenant(&keys, &[("x-api-key", bad)]), None, "{bad:?}");
        }
        assert_eq!(tenant(&keys, &[("authorization", &format!("Basic {one}"))]), None);
        assert_eq!(tenant(&keys, &[("authorization", "Bear\u{e9}")]), None);
        assert_eq!(tenant(&keys, &[]), None);
        assert_eq!(tenant(&Keys::default(), &[("x-api-key", "")]), None);
    }

    #[test]
    fn an_open_host_takes_anybody_and_still_knows_its_keys() {
        let keys = keys(true);
        assert_eq!(tenant(&keys, &[]).as_deref(), Some("default"));
        assert_eq!(tenant(&keys, &[("x-api-key", "anything")]).as_deref(), Some("default"));
        assert_eq!(tenant(&keys, &[("x-api-key", key(1).reveal())]).as_deref(), Some("one"));
        for own in ["http://localhost", "http://127.0.0.1:5173", "http://[::1]:80", "https://[::1]"]
        {
            assert!(tenant(&keys, &[("origin", own)]).is_some(), "{own}");
        }
        for foreign in ["null", "", "https://x.example", "http://localhost.x.example:80"] {
            assert!(tenant(&keys, &[("origin", foreign)]).is_none(), "{foreign}");
            let one = key(1);
            let with_key = [("origin", foreign), ("x-api-key", one.reveal())];
            assert!(tenant(&keys, &with_key).is_some(), "{foreign}");
        }
    }

    #[test]
    fn what_is_published_holds_at_once_and_accounts_stay_while_they_count() {
        let (keys, mut accounts) = (Keys::new(false), Accounts::new());
        let shard = keys.clone();
        keys.publish([grant(1, "one"), grant(2, "two")], &mut accounts);
        let caller = shard.admit(&with(&[("x-api-key", key(1).reveal())])).unwrap();
        let seats = caller.grant.unwrap().account.reserve(1, None).unwrap();
        keys.publish([], &mut accounts);
        assert!(shard.is_empty());
        assert_eq!(accounts.len(), 1, "the other has neither a key nor a sandbox");
        keys.publish([grant(1, "one")], &mut accounts);
        let caller = shard.admit(&with(&[("x-api-key", key(1).reveal())])).unwrap();
        assert_eq!(caller.grant.unwrap().account.live(), 1);
        drop(seats);
    }
}
