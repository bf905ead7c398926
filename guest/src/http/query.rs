//! Query strings and percent-encoding.
//!
//! Called by the router's handlers and by the signature check. Refuses text that is not UTF-8
//! after decoding, by leaving that parameter out.

/// The decoded parameters of a query string, in order; a name may come more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Reads `a=b&c=d`. The length of a request head bounds it.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let pair = |part: &str| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            Some((decode(name, true)?, decode(value, true)?))
        };
        Self(text.split('&').filter(|part| !part.is_empty()).filter_map(pair).collect())
    }

    /// The first value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Undoes percent-encoding, and `+` for a space where `plus_is_space`. `None` when the result is
/// not UTF-8. A `%` without two hexadecimal digits stands for itself.
#[must_use]
pub fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let pair = bytes.get(at + 1..at + 3).and_then(hex_pair);
        match (byte, pair) {
            (b'%', Some(decoded)) => {
                out.push(decoded);
                at += 2;
            }
            (b'+', _) if plus_is_space => out.push(b' '),
            (other, _) => out.push(*other),
        }
        at += 1;
    }
    String::from_utf8(out).ok()
}

fn hex_pair(pair: &[u8]) -> Option<u8> {
    // `from_str_radix` alone would also take a sign.
    if !pair.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded() {
        let query = Query::parse("path=%2Fhome%2Fa+b&username=user&path=2&flag");
        assert_eq!(query.get("path"), Some("/home/a b"));
        assert_eq!(query.get("username"), Some("user"));
        assert_eq!(query.get("flag"), Some(""));
        assert_eq!(query.get("nothing"), None);
    }

    #[test]
    fn broken_encoding_is_kept_or_left_out() {
        assert_eq!(decode("100%", true).as_deref(), Some("100%"));
        assert_eq!(decode("%+1", false).as_deref(), Some("%+1"));
        assert_eq!(decode("%zz%41", true).as_deref(), Some("%zzA"));
        assert_eq!(decode("%ff", true), None);
        assert_eq!(Query::parse("a=%ff&b=1").get("a"), None);
    }
}
