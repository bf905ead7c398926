//! Other programs, and the kernel's list of mounts.
//!
//! Called by `pool`. Refuses a program that is not there by naming the package that has it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::PoolError;
use crate::error::{Result, StorageError};

/// Runs a program; gives the first line of what it says.
pub(super) fn run<'a>(
    program: &'static str,
    package: &'static str,
    options: impl IntoIterator<Item = &'a str>,
    operands: impl IntoIterator<Item = &'a OsStr>,
) -> std::result::Result<String, PoolError> {
    let mut command = Command::new(program);
    command.args(options).args(operands).stdin(Stdio::null());
    let output = command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => PoolError::Missing { program, package },
        _ => StorageError::io("start", Path::new(program), error).into(),
    })?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        return Err(PoolError::Failed { command: format!("{command:?}"), message });
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// One line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    pub(super) mount: PathBuf,
    pub(super) kind: String,
    pub(super) source: String,
    /// The file behind it, where it is on a loop device.
    pub(super) backing: Option<PathBuf>,
}

pub(super) fn mounts() -> Result<Vec<Mounted>> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(|e| StorageError::io("read", path, e))?;
    text.lines()
        .filter_map(parse)
        .map(|(mut mounted, device)| {
            mounted.backing = backing_of(&device)?;
            Ok(mounted)
        })
        .collect()
}

/// A line, as proc_pid_mountinfo(5) says, and the numbers of its device.
fn parse(line: &str) -> Option<(Mounted, String)> {
    let (fixed, rest) = line.split_once(" - ")?;
    let mut fixed = fixed.split(' ');
    let device = fixed.nth(2)?.to_owned();
    let mount = unescape(fixed.nth(1)?);
    let mut rest = rest.split(' ');
    let (kind, source) = (rest.next()?.to_owned(), rest.next()?.to_owned());
    Some((Mounted { mount, kind, source, backing: None }, device))
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = text.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        if let Some(escaped) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(escaped);
            at += 4;
        } else {
            out.push(*byte);
            at += 1;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

fn backing_of(device: &str) -> Result<Option<PathBuf>> {
    let path = PathBuf::from(format!("/sys/dev/block/{device}/loop/backing_file"));
    match fs::read(&path) {
        Ok(mut bytes) => {
            while bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            Ok(Some(PathBuf::from(OsString::from_vec(bytes))))
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) if error.raw_os_error() == Some(NO_DEVICE) => Ok(None),
        Err(error) => Err(StorageError::io("read", &path, io::Error::other(error))),
    }
}

/// `ENXIO`: the loop device lost its file while it was looked at.
const NO_DEVICE: i32 = rustix::io::Errno::NXIO.raw_os_error();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line =
            "36 35 7:3 / /mnt/a\\040b\\134c rw,noatime shared:1 master:2 - xfs /dev/loop3 rw";
        let (mounted, device) = parse(line).unwrap();
        assert_eq!(device, "7:3");
        assert_eq!(mounted.mount, Path::new("/mnt/a b\\c"));
        assert_eq!((mounted.kind.as_str(), mounted.source.as_str()), ("xfs", "/dev/loop3"));
        assert_eq!(parse("36 35 7:3 / /mnt"), None);
        assert_eq!(parse(""), None);
        assert_eq!(unescape("\\9zz\\"), Path::new("\\9zz\\"));
        assert!(mounts().unwrap().iter().any(|mounted| mounted.mount == Path::new("/")));
    }

    #[test]
    fn programs_that_are_missing_or_fail_are_named() {
        let missing = run("mica-no-such-program", "nothing", [], []).unwrap_err();
        assert!(missing.to_string().contains("install the package nothing"), "{missing}");
        let failed = run("ls", "coreutils", ["/mica/no/such/file"], []).unwrap_err();
        assert!(failed.to_string().contains("/mica/no/such/file"), "{failed}");
        assert_eq!(run("echo", "coreutils", ["a"], [OsStr::new("b")]).unwrap(), "a b");
    }
}
