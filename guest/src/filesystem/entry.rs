//! One file, directory or link as clients see it.
//!
//! Called by [`super::operations`] on a thread of `identity`. Refuses nothing: a link that leads
//! nowhere has no type, and an id without a name is shown as its number.

use std::collections::HashMap;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use prost::{Enumeration, Message};
use serde::Serialize;

use super::metadata::{self, Metadata};
use super::path;
use super::time::Timestamp;
use crate::connect::json::{Named, Names as EnumNames, int64};
use crate::users;

/// What an entry is; the names are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum FileType {
    Unspecified = 0,
    File = 1,
    Directory = 2,
}

impl Named for FileType {
    const NAMES: &'static [(Self, &'static str)] = &[
        (Self::Unspecified, "FILE_TYPE_UNSPECIFIED"),
        (Self::File, "FILE_TYPE_FILE"),
        (Self::Directory, "FILE_TYPE_DIRECTORY"),
    ];
}

/// The message `filesystem.EntryInfo`. The oldest client knows the first three fields and fails on
/// more, so the others are left out of JSON when they are empty.
#[derive(Clone, PartialEq, Message, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EntryInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(enumeration = "FileType", tag = "2")]
    #[serde(rename = "type", with = "EnumNames::<FileType>")]
    pub file_type: i32,
    #[prost(string, tag = "3")]
    pub path: String,
    #[prost(int64, tag = "4")]
    #[serde(with = "int64", skip_serializing_if = "is_default")]
    pub size: i64,
    #[prost(uint32, tag = "5")]
    #[serde(skip_serializing_if = "is_default")]
    pub mode: u32,
    #[prost(string, tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    pub permissions: String,
    #[prost(string, tag = "7")]
    #[serde(skip_serializing_if = "is_default")]
    pub owner: String,
    #[prost(string, tag = "8")]
    #[serde(skip_serializing_if = "is_default")]
    pub group: String,
    #[prost(message, optional, tag = "9")]
    #[serde(skip_serializing_if = "is_default")]
    pub modified_time: Option<Timestamp>,
    #[prost(string, optional, tag = "10")]
    #[serde(skip_serializing_if = "is_default")]
    pub symlink_target: Option<String>,
    #[prost(btree_map = "string, string", tag = "11")]
    #[serde(skip_serializing_if = "is_default")]
    pub metadata: Metadata,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Names of ids, looked up once each: a listing shows few owners and many files.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    fn user(&mut self, uid: u32) -> String {
        self.users.entry(uid).or_insert_with(|| users::name_of_uid(uid)).clone()
    }

    fn group(&mut self, gid: u32) -> String {
        self.groups.entry(gid).or_insert_with(|| users::name_of_gid(gid)).clone()
    }
}

impl EntryInfo {
    /// Looks at `at` and shows it as `shown`, which differs when a listing went through a link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(at: &Path, shown: &Path, names: &mut Names) -> std::io::Result<Self> {
        let metadata = std::fs::symlink_metadata(at)?;
        let (file_type, mode, symlink_target) = if metadata.is_symlink() {
            let target = std::fs::canonicalize(at);
            // A link that leads nowhere is shown as its own target, which E2B does too.
            let shown_target = target.as_deref().unwrap_or(shown).display().to_string();
            match std::fs::metadata(at) {
                Ok(target) => (kind(&target), target.mode() & 0o777, Some(shown_target)),
                Err(_) => (FileType::Unspecified, 0, Some(shown_target)),
            }
        } else {
            (kind(&metadata), metadata.mode() & 0o777, None)
        };
        let nanos = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
        Ok(Self {
            name: path::name(shown),
            file_type: file_type.into(),
            path: shown.display().to_string(),
            size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
            mode,
            permissions: permissions(&metadata),
            owner: names.user(metadata.uid()),
            group: names.group(metadata.gid()),
            modified_time: Some(Timestamp { seconds: metadata.mtime(), nanos }),
            symlink_target,
            metadata: metadata::read(at),
        })
    }

    /// Without what the oldest client does not know.
    #[must_use]
    pub fn for_client(self, is_legacy: bool) -> Self {
        if !is_legacy {
            return self;
        }
        let Self { name, file_type, path, .. } = self;
        Self { name, file_type, path, ..Self::default() }
    }
}

fn kind(metadata: &std::fs::Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::Directory
    } else if metadata.is_file() {
        FileType::File
    } else {
        FileType::Unspecified
    }
}

/// The mode in letters, as Go's `FileMode.String` has it, because that is what clients get from
/// E2B: the special bits come in front, not in place of an `x`.
fn permissions(metadata: &std::fs::Metadata) -> String {
    let file_type = metadata.file_type();
    let mode = metadata.mode();
    let mut text = String::new();
    for (holds, letters) in [
        (file_type.is_dir(), "d"),
        (file_type.is_symlink(), "L"),
        (file_type.is_block_device() || file_type.is_char_device(), "D"),
        (file_type.is_fifo(), "p"),
        (file_type.is_socket(), "S"),
        (mode & 0o4000 != 0, "u"),
        (mode & 0o2000 != 0, "g"),
        (file_type.is_char_device(), "c"),
        (mode & 0o1000 != 0, "t"),
    ] {
        if holds {
            text.push_str(letters);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << bit) == 0 { '-' } else { letter });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn look(path: &Path) -> EntryInfo {
        EntryInfo::look(path, path, &mut Names::default()).unwrap()
    }

    #[test]
    fn entries_have_the_protocols_form() {
        let base = std::env::temp_dir().join(format!("mica-entry-{}", std::process::id()));
        std::fs::create_dir_all(&base).unwrap();
        let file = base.join("f");
        std::fs::write(&file, "abc").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let json = serde_json::to_value(look(&file)).unwrap();
        assert_eq!(json["name"], "f");
        assert_eq!(json["type"], "FILE_TYPE_FILE");
        assert_eq!(json["size"], "3");
        assert_eq!(json["mode"], 0o640);
        assert_eq!(json["permissions"], "-rw-r-----");
        assert!(json["modifiedTime"].as_str().unwrap().ends_with('Z'));
        assert!(json.get("symlinkTarget").is_none());
        let legacy = serde_json::to_value(look(&file).for_client(true)).unwrap();
        assert_eq!(legacy.as_object().unwrap().len(), 3);
        // The path is field 3, the time field 9.
        let binary = look(&file).encode_to_vec();
        let again = EntryInfo::decode(&binary[..]).unwrap();
        assert_eq!(again, look(&file));
        assert_eq!(again.modified_time.unwrap().seconds, file.metadata().unwrap().mtime());
        assert_eq!(&binary[..5], b"\x0a\x01f\x10\x01");

        let link = base.join("l");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let seen = look(&link);
        assert_eq!(seen.file_type(), FileType::File);
        assert_eq!(seen.mode, 0o640, "the target's");
        assert!(seen.permissions.starts_with("Lrwx"), "the link's own");
        assert_eq!(seen.symlink_target, Some(file.display().to_string()));

        let dangling = base.join("d");
        std::os::unix::fs::symlink("/no/such/place", &dangling).unwrap();
        assert_eq!(look(&dangling).file_type(), FileType::Unspecified);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn special_files_have_letters() {
        let of = |path: &str| look(Path::new(path)).permissions;
        assert_eq!(of("/tmp"), "dtrwxrwxrwx");
        assert_eq!(of("/dev/null"), "Dcrw-rw-rw-");
        assert_eq!(look(Path::new("/dev/null")).file_type(), FileType::Unspecified);
    }
}
