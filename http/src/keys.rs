//! The API keys that open the control plane.
//!
//! Called by `src/`, which reads the key file, and by the API for every request but
//! `GET /health`. Refuses a key that is not in the form SDKs check, and never prints one.

use std::fmt;
use std::hint::black_box;
use std::str::FromStr;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;

/// What every key starts with: some SDK versions check it on the client side.
const PREFIX: &str = "e2b_";
const HEX_DIGITS: usize = 40;
const KEY_BYTES: usize = PREFIX.len() + HEX_DIGITS;

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

    /// The key as text: to be written to the key file and nowhere else.
    #[must_use]
    pub fn reveal(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// Compares in a time that depends on the length alone, which is no secret.
    fn matches(&self, offered: &[u8]) -> bool {
        let differing = self.0.iter().zip(offered).fold(0, |acc, (a, b)| black_box(acc | (a ^ b)));
        offered.len() == KEY_BYTES && differing == 0
    }
}

fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

impl FromStr for ApiKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let digits = text.strip_prefix(PREFIX).ok_or(KeyError)?;
        let in_form = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !in_form {
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

/// Every key that is accepted.
#[derive(Clone, Debug, Default)]
pub struct KeyRing(Vec<ApiKey>);

impl KeyRing {
    /// A ring of these keys. An empty ring accepts nobody.
    #[must_use]
    pub fn new(keys: Vec<ApiKey>) -> Self {
        Self(keys)
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request carries one of the keys, as `X-API-Key` or as a bearer token.
    #[must_use]
    pub fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(offered) = offered(headers) else { return false };
        // Every key is compared, so that the time does not tell which one was close.
        self.0.iter().fold(false, |admitted, key| admitted | key.matches(offered))
    }
}

fn offered(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn ring() -> KeyRing {
        KeyRing::new(vec![ApiKey::from_random([1; 20]), ApiKey::from_random([0xab; 20])])
    }

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            hyper::header::HeaderName::from_static(name),
            HeaderValue::from_str(value).unwrap(),
        )])
    }

    #[test]
    fn keys_are_in_the_form_sdks_check() {
        let key = ApiKey::from_random([0xab; 20]);
        assert_eq!(key.reveal(), format!("e2b_{}", "ab".repeat(20)));
        assert_eq!(key.reveal().parse(), Ok(key.clone()));
        assert!(!format!("{key:?}").contains("abab"), "a key must not be printed");
        for bad in ["", "e2b_", &"ab".repeat(20), &format!("e2b_{}", "AB".repeat(20))] {
            assert_eq!(bad.parse::<ApiKey>(), Err(KeyError), "{bad:?}");
        }
    }

    #[test]
    fn both_headers_admit_and_nothing_else_does() {
        let good = format!("e2b_{}", "ab".repeat(20));
        assert!(ring().admits(&with("x-api-key", &good)));
        assert!(ring().admits(&with("authorization", &format!("Bearer {good}"))));
        assert!(ring().admits(&with("authorization", &format!("bearer {good}"))));
        for bad in ["", "e2b_", &good[..43], &format!("{good}0"), &good.replace('b', "c")] {
            assert!(!ring().admits(&with("x-api-key", bad)), "{bad:?}");
        }
        assert!(!ring().admits(&with("authorization", &format!("Basic {good}"))));
        assert!(!ring().admits(&with("authorization", "Bear\u{e9}")));
        assert!(!ring().admits(&HeaderMap::new()));
        assert!(!KeyRing::default().admits(&with("x-api-key", "")));
    }
}
