//! What a client says about a file besides its content: extended attributes below `user.e2b.`.
//!
//! Called by [`super::entry`] to show them and by [`super::upload`] to set them, on a thread of
//! `identity`. Refuses keys and values that are not printable ASCII, and more of them than a file
//! system keeps beside a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use http::HeaderMap;
use rustix::fs::{
    XattrFlags, flistxattr, fremovexattr, fsetxattr, lgetxattr, llistxattr, llistxattr_query,
};
use rustix::io::Errno;

/// Keys and values.
pub type Metadata = BTreeMap<String, String>;

/// Where they are among a file's attributes.
const PREFIX: &str = "user.e2b.";

/// In front of a key in a request.
const HEADER_PREFIX: &str = "x-metadata-";

/// Longest key: the kernel's limit of a name, without the prefix.
const KEY_BYTES_MAX: usize = 255 - PREFIX.len();

/// Most of it all on one file, prefixes counted: what a small file system keeps of attributes.
const TOTAL_BYTES_MAX: usize = 4096;

/// Longest list of attribute names: the kernel's own limit.
const NAMES_BYTES_MAX: usize = 64 * 1024;

/// Why a request's metadata cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    #[error("X-Metadata-{0}: a key is 1 to {KEY_BYTES_MAX} bytes of printable ASCII")]
    Key(String),
    #[error("X-Metadata-{0}: the value is not printable ASCII")]
    Value(String),
    #[error("the metadata of a file is over {TOTAL_BYTES_MAX} bytes; send less")]
    TooMuch,
}

/// Reads the `X-Metadata-*` headers; of one that comes twice the first counts.
pub fn from_headers(headers: &HeaderMap) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::new();
    let mut total = 0_usize;
    for name in headers.keys() {
        // Header names are in lower case here.
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else { continue };
        let printable = |bytes: &[u8]| bytes.iter().all(|byte| matches!(byte, b' '..=b'~'));
        if key.is_empty() || key.len() > KEY_BYTES_MAX || !printable(key.as_bytes()) {
            return Err(MetadataError::Key(key.to_owned()));
        }
        let value = headers.get(name).map_or(&b""[..], http::HeaderValue::as_bytes);
        let text = std::str::from_utf8(value).ok().filter(|text| printable(text.as_bytes()));
        let text = text.ok_or_else(|| MetadataError::Value(key.to_owned()))?;
        total += PREFIX.len() + key.len() + text.len();
        if total > TOTAL_BYTES_MAX {
            return Err(MetadataError::TooMuch);
        }
        metadata.insert(key.to_owned(), text.to_owned());
    }
    Ok(metadata)
}

/// What a file has; nothing where it cannot be read or the file system keeps none. Links are not
/// followed. What others have put there beyond our own limit is left out.
pub fn read(path: &Path) -> Metadata {
    let mut metadata = Metadata::new();
    // Most files have no attributes at all, and that is learnt without a buffer.
    if !matches!(llistxattr_query(path), Ok(1..)) {
        return metadata;
    }
    let mut names = vec![0; NAMES_BYTES_MAX];
    let Ok(length) = llistxattr(path, &mut names[..]) else { return metadata };
    let mut left = TOTAL_BYTES_MAX;
    for (name, key) in ours(names.get(..length).unwrap_or(&[])) {
        let mut value = vec![0; TOTAL_BYTES_MAX];
        let Ok(length) = lgetxattr(path, name, &mut value[..]) else { continue };
        let value = String::from_utf8_lossy(value.get(..length).unwrap_or(&[]));
        match left.checked_sub(name.len() + value.len()) {
            Some(rest) => left = rest,
            None => continue,
        }
        metadata.insert(key.to_owned(), value.into_owned());
    }
    metadata
}

/// Makes `metadata` all that the file has.
///
/// # Errors
/// The kernel's; a file system without attributes is an error only when there is something to keep.
pub fn replace(file: &File, metadata: &Metadata) -> rustix::io::Result<()> {
    let mut names = vec![0; NAMES_BYTES_MAX];
    let length = match flistxattr(file, &mut names[..]) {
        Err(Errno::OPNOTSUPP) if metadata.is_empty() => return Ok(()),
        other => other?,
    };
    for (name, key) in ours(names.get(..length).unwrap_or(&[])) {
        if !metadata.contains_key(key) {
            fremovexattr(file, name)?;
        }
    }
    for (key, value) in metadata {
        fsetxattr(file, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

/// The attributes of a list that are metadata, by their full names and by their keys.
fn ours(names: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    names.split(|byte| *byte == 0).filter_map(|name| {
        let name = std::str::from_utf8(name).ok()?;
        Some((name, name.strip_prefix(PREFIX).filter(|key| !key.is_empty())?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(&str, &[u8])]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            let name: HeaderName = name.parse().unwrap();
            map.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        map
    }

    #[test]
    fn headers_become_keys_in_lower_case() {
        let map = headers(&[
            ("X-Metadata-Author", b"me"),
            ("x-metadata-author", b"second"),
            ("X-Metadata-Empty", b""),
            ("X-Other", b"no"),
        ]);
        let wanted = [("author", "me"), ("empty", "")];
        let wanted = wanted.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(from_headers(&map), Ok(Metadata::from(wanted)));
    }

    #[test]
    fn what_a_file_cannot_keep_is_refused() {
        let long = "x-metadata-".to_owned() + &"k".repeat(KEY_BYTES_MAX + 1);
        let most = "x-metadata-".to_owned() + &"k".repeat(KEY_BYTES_MAX);
        assert!(from_headers(&headers(&[(&most, b"v")])).is_ok());
        let large = vec![b'v'; TOTAL_BYTES_MAX];
        let key = |key: &str| MetadataError::Key(key.to_owned());
        for (map, wanted) in [
            (headers(&[("x-metadata-", b"v")]), key("")),
            (headers(&[(&long, b"v")]), key(&"k".repeat(KEY_BYTES_MAX + 1))),
            (headers(&[("x-metadata-a", "é".as_bytes())]), MetadataError::Value("a".to_owned())),
            (headers(&[("x-metadata-a", b"a\tb")]), MetadataError::Value("a".to_owned())),
            (headers(&[("x-metadata-a", &large)]), MetadataError::TooMuch),
        ] {
            assert_eq!(from_headers(&map), Err(wanted));
        }
    }

    #[test]
    fn metadata_is_replaced_as_a_whole_and_other_attributes_stay() {
        let path = std::env::temp_dir().join(format!("mica-metadata-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let of = |pairs: &[(&str, &str)]| {
            Metadata::from_iter(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
        };
        if replace(&file, &of(&[("a", "1"), ("b", "2")])) == Err(Errno::OPNOTSUPP) {
            eprintln!("skipped: the temporary directory keeps no attributes");
            return;
        }
        fsetxattr(&file, "user.other", b"x", XattrFlags::empty()).unwrap();
        assert_eq!(read(&path), of(&[("a", "1"), ("b", "2")]));
        replace(&file, &of(&[("b", "3")])).unwrap();
        assert_eq!(read(&path), of(&[("b", "3")]));
        replace(&file, &Metadata::new()).unwrap();
        assert_eq!(read(&path), Metadata::new());
        let mut value = [0; 8];
        assert_eq!(lgetxattr(&path, "user.other", &mut value[..]), Ok(1));
        std::fs::remove_file(path).unwrap();
    }
}
