//! Who may call a route: the access token, or a signature over one file path.
//!
//! Called by the router before a handler runs. Refuses a request that carries neither, in the
//! words that SDKs and their tests compare.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use http::HeaderMap;
use sha2::{Digest, Sha256};

use super::{HttpError, Query};

const TOKEN_HEADER: &str = "x-access-token";
const UNAUTHORIZED: &str = "unauthorized access, please provide a valid access token or method \
                            signing if supported";

const OTHER_TOKEN: &str = "access token present in header but does not match";

/// What a route asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Open,
    /// The access token, where the sandbox has one.
    Token,
    /// The access token, or a signature made with it over the query's path.
    TokenOrSignature(FileAction),
}

/// What a signed file URL allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileAction {
    /// Download.
    Read,
    /// Upload.
    Write,
}

impl Access {
    /// Checks one request against the sandbox's `token`; without a token all may come.
    ///
    /// # Errors
    /// 401 with the reason.
    pub fn check(
        self,
        token: Option<&str>,
        headers: &HeaderMap,
        query: &Query,
        now_unix_seconds: u64,
    ) -> Result<(), HttpError> {
        let Some(token) = token else { return Ok(()) };
        if self == Self::Open {
            return Ok(());
        }
        let given = headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes);
        match (self, given) {
            (_, Some(given)) if same(given, token.as_bytes()) => Ok(()),
            (Self::TokenOrSignature(action), None | Some(b"")) => {
                check_signature(action, token, query, now_unix_seconds)
            }
            (Self::TokenOrSignature(_), Some(_)) => Err(HttpError::unauthorized(OTHER_TOKEN)),
            _ => Err(HttpError::unauthorized(UNAUTHORIZED)),
        }
    }
}

/// Checks the signature of a file's URL against the sandbox's token.
///
/// # Errors
/// 401 with the reason; 400 for an expiration that is no number.
pub fn check_signature(
    action: FileAction,
    token: &str,
    query: &Query,
    now_unix_seconds: u64,
) -> Result<(), HttpError> {
    let refuse = |why: &str| Err(HttpError::unauthorized(why));
    let expiration = match query.get("signature_expiration").map(str::parse::<i64>) {
        None => None,
        Some(Ok(at)) => Some(at),
        Some(Err(_)) => {
            return Err(HttpError::bad_request(
                "Invalid format for parameter signature_expiration: it is not a number of seconds",
            ));
        }
    };
    let Some(given) = query.get("signature") else {
        return refuse("missing signature query parameter");
    };
    let wanted = signature(
        query.get("path").unwrap_or(""),
        action,
        query.get("username").unwrap_or(""),
        token,
        expiration,
    );
    if !same(given.as_bytes(), wanted.as_bytes()) {
        return refuse("invalid signature");
    }
    // One before 1970 is over as well.
    match expiration.map(u64::try_from) {
        None => Ok(()),
        Some(Ok(at)) if at >= now_unix_seconds => Ok(()),
        Some(_) => refuse("signature is already expired"),
    }
}

/// `v1_` and the unpadded base64 of the SHA-256 over the parts.
fn signature(
    path: &str,
    action: FileAction,
    username: &str,
    token: &str,
    expiration: Option<i64>,
) -> String {
    let action = match action {
        FileAction::Read => "read",
        FileAction::Write => "write",
    };
    let mut hash = Sha256::new();
    hash.update(format!("{path}:{action}:{username}:{token}"));
    if let Some(expiration) = expiration {
        hash.update(format!(":{expiration}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(hash.finalize()))
}

/// Compares without telling by its time where the two differ. The length is no secret.
#[must_use]
fn same(given: &[u8], wanted: &[u8]) -> bool {
    let differs = given.iter().zip(wanted).fold(0u8, |all, (a, b)| all | (a ^ b));
    given.len() == wanted.len() && std::hint::black_box(differs) == 0
}

/// The user named by `Authorization: Basic`, whose password is not looked at: the token is what
/// lets a client in, the user is whom it wants to be.
#[must_use]
pub fn basic_user(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let encoded = value.strip_prefix("Basic ").or_else(|| value.strip_prefix("basic "))?;
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let name = decoded.split_once(':').map_or(decoded.as_str(), |(name, _)| name);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(token: &str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(TOKEN_HEADER, token.parse().unwrap());
        map
    }

    #[test]
    fn a_token_opens_and_another_does_not() {
        let none = Query::default();
        let check = |headers: &HeaderMap| Access::Token.check(Some("secret"), headers, &none, 0);
        assert_eq!(check(&headers("secret")), Ok(()));
        for bad in [headers("secreT"), headers("secret1"), headers(""), HeaderMap::new()] {
            assert_eq!(check(&bad), Err(HttpError::unauthorized(UNAUTHORIZED)), "{bad:?}");
        }
        assert_eq!(Access::Token.check(None, &HeaderMap::new(), &none, 0), Ok(()));
        assert_eq!(Access::Open.check(Some("secret"), &HeaderMap::new(), &none, 0), Ok(()));
    }

    #[test]
    fn a_signature_opens_its_own_path_only() {
        let good = signature("/a", FileAction::Read, "", "secret", Some(100));
        let query = |path: &str, at: &str, signature: &str| {
            let signature = signature.replace('+', "%2B");
            Query::parse(&format!("path={path}&signature={signature}&signature_expiration={at}"))
        };
        let check = |action, query: &Query, now| {
            Access::TokenOrSignature(action)
                .check(Some("secret"), &HeaderMap::new(), query, now)
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(FileAction::Read, &query("/a", "100", &good), 100), Ok(()));
        for (action, query, now, why) in [
            (FileAction::Read, query("/b", "100", &good), 0, "invalid signature"),
            (FileAction::Write, query("/a", "100", &good), 0, "invalid signature"),
            (FileAction::Read, query("/a", "200", &good), 0, "invalid signature"),
            (FileAction::Read, query("/a", "100", &good), 101, "signature is already expired"),
            (FileAction::Read, Query::default(), 0, "missing signature query parameter"),
        ] {
            assert_eq!(check(action, &query, now), Err(why.to_owned()));
        }
        let error = check(FileAction::Read, &query("/a", "soon", &good), 0).unwrap_err();
        assert!(error.starts_with("Invalid format for parameter signature_expiration"), "{error}");
        let past = signature("/a", FileAction::Read, "", "secret", Some(-1));
        let error = check(FileAction::Read, &query("/a", "-1", &past), 0).unwrap_err();
        assert_eq!(error, "signature is already expired");
    }

    #[test]
    fn a_wrong_token_is_told_apart_where_a_signature_would_do() {
        let check = |headers: &HeaderMap| {
            Access::TokenOrSignature(FileAction::Read)
                .check(Some("secret"), headers, &Query::default(), 0)
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(&headers("secret")), Ok(()));
        assert_eq!(check(&headers("wrong")), Err(OTHER_TOKEN.to_owned()));
        assert_eq!(check(&headers("")), Err("missing signature query parameter".to_owned()));
    }

    #[test]
    fn a_signature_is_what_clients_compute() {
        // printf '/a:read::secret' | openssl dgst -sha256 -binary | base64 | tr -d =
        assert_eq!(
            signature("/a", FileAction::Read, "", "secret", None),
            "v1_bNssEQcbuFJJw2F7K9OxiSepIOzBtQw23DPP43+Yhzs"
        );
    }

    #[test]
    fn the_user_is_before_the_colon() {
        let mut map = HeaderMap::new();
        assert_eq!(basic_user(&map), None);
        map.insert(http::header::AUTHORIZATION, "Basic cm9vdDo=".parse().unwrap());
        assert_eq!(basic_user(&map).as_deref(), Some("root"));
        map.insert(http::header::AUTHORIZATION, "Basic Og==".parse().unwrap());
        assert_eq!(basic_user(&map), None);
        map.insert(http::header::AUTHORIZATION, "Basic !".parse().unwrap());
        assert_eq!(basic_user(&map), None);
    }
}
