//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! Called wherever a client names a user. Refuses NSS (a static binary has none) and files over
//! [`FILE_BYTES_MAX`].

use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Longest user or group file that is read.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Most supplementary groups that are kept: the kernel's own limit.
const GROUPS_MAX: usize = 65_536;

/// One line of `/etc/passwd`, with the groups of `/etc/group`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
    /// Login shell.
    pub shell: PathBuf,
}

/// Why a user cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not in `/etc/passwd`.
    #[error("invalid username: '{0}'")]
    Unknown(String),
    /// A file cannot be read.
    #[error("cannot read {path}; the template's root file system must have it")]
    Read {
        /// Which.
        path: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Finds a user by name.
///
/// # Errors
/// [`UserError`].
pub fn find(name: &str) -> Result<User, UserError> {
    let passwd = read("/etc/passwd")?;
    // Without a group file there are no supplementary groups, and that is no fault.
    let group = read("/etc/group").unwrap_or_default();
    parse_user(&passwd, &group, name).ok_or_else(|| UserError::Unknown(name.to_owned()))
}

/// The name of a user id, or the number itself where it has none.
#[must_use]
pub fn name_of_uid(uid: u32) -> String {
    let found = read("/etc/passwd").ok().and_then(|text| name_of(&text, uid));
    found.unwrap_or_else(|| uid.to_string())
}

/// The name of a group id, or the number itself where it has none.
#[must_use]
pub fn name_of_gid(gid: u32) -> String {
    let found = read("/etc/group").ok().and_then(|text| name_of(&text, gid));
    found.unwrap_or_else(|| gid.to_string())
}

fn read(path: &'static str) -> Result<String, UserError> {
    let fail = |source| UserError::Read { path, source };
    let file = std::fs::File::open(Path::new(path)).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(fail)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Both files keep the name first and the id third.
fn name_of(text: &str, id: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

fn parse_user(passwd: &str, group: &str, name: &str) -> Option<User> {
    let mut user = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name && !name.is_empty();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = PathBuf::from(fields.nth(1)?);
        let shell = PathBuf::from(fields.next()?);
        found.then(|| User { name: name.to_owned(), uid, gid, groups: Vec::new(), home, shell })
    })?;
    let member_of = |line: &str| {
        let mut fields = line.split(':');
        let gid = fields.nth(2)?.parse().ok()?;
        fields.next()?.split(',').any(|member| member.trim() == name).then_some(gid)
    };
    user.groups = group.lines().filter_map(member_of).take(GROUPS_MAX).collect();
    if !user.groups.contains(&user.gid) {
        user.groups.push(user.gid);
    }
    Some(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
                          # a comment\n\
                          broken:x:no:1:::\n\
                          user:x:1000:1001:,,,:/home/user:/bin/bash\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:root,user\nuser:x:1001:\ndocker:x:99:users\n";

    #[test]
    fn a_user_comes_with_its_groups() {
        let user = parse_user(PASSWD, GROUP, "user").unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1001));
        assert_eq!(user.groups, vec![27, 1001]);
        assert_eq!(user.home, PathBuf::from("/home/user"));
        assert_eq!(user.shell, PathBuf::from("/bin/bash"));
    }

    #[test]
    fn other_names_are_not_found() {
        for name in ["", "broken", "use", "user:x", "# a comment"] {
            assert_eq!(parse_user(PASSWD, GROUP, name), None, "{name}");
        }
        assert_eq!(
            find("no-such-user").unwrap_err().to_string(),
            "invalid username: 'no-such-user'"
        );
    }

    #[test]
    fn ids_have_names() {
        assert_eq!(name_of(PASSWD, 1000).as_deref(), Some("user"));
        assert_eq!(name_of(GROUP, 27).as_deref(), Some("sudo"));
        assert_eq!(name_of(GROUP, 28), None);
        assert_eq!(name_of_uid(0), "root");
        assert_eq!(name_of_uid(4_000_000_001), "4000000001");
    }
}
