//! Writes the archive format of an initramfs ("newc" cpio), as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` describes it.
//!
//! Called by the build. Refuses a name that is absolute or too long. Two runs over the same input
//! give the same bytes: owner and times are always 0.

use std::io::{self, Write};

const MAGIC: &str = "070701";
const TYPE_DIR: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_CHAR: u32 = 0o020_000;
const NAME_BYTES_MAX: usize = 255;

/// Writes entries one after another.
#[derive(Debug)]
pub struct CpioWriter<W> {
    out: W,
    next_inode: u32,
    written: u64,
}

impl<W: Write> CpioWriter<W> {
    /// Writes to `out`.
    pub const fn new(out: W) -> Self {
        Self { out, next_inode: 1, written: 0 }
    }

    /// A directory, mode 0755.
    pub fn dir(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, TYPE_DIR | 0o755, (0, 0), &[])
    }

    /// A file with the given permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, TYPE_FILE | (permissions & 0o7777), (0, 0), content)
    }

    /// A character device, mode 0600.
    pub fn char_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, TYPE_CHAR | 0o600, (major, minor), &[])
    }

    /// The trailer. Returns what was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.header("TRAILER!!!", 0, 0, (0, 0), 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        if name.is_empty() || name.starts_with('/') || name.len() > NAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name for a cpio entry"));
        }
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "longer than 4 GiB"))?;
        let inode = self.next_inode;
        self.next_inode += 1;
        self.header(name, inode, mode, device, size)?;
        self.put(content)?;
        self.pad()
    }

    /// One header: 13 fields of 8 hexadecimal digits, then the name with its zero, then padding.
    fn header(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        device: (u32, u32),
        size: u32,
    ) -> io::Result<()> {
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = if mode & 0o170_000 == TYPE_DIR { 2 } else { 1 };
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut text = String::from(MAGIC);
        for field in fields {
            text.push_str(&format!("{field:08X}"));
        }
        self.put(text.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Pads to a multiple of four bytes.
    fn pad(&mut self) -> io::Result<()> {
        const ZEROS: [u8; 3] = [0; 3];
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&ZEROS[..usize::try_from(missing).unwrap_or(0)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.dir("dev").unwrap();
        cpio.char_device("dev/console", 5, 1).unwrap();
        cpio.file("init", 0o755, b"hello").unwrap();
        cpio.file("empty", 0o644, b"").unwrap();
        cpio.finish().unwrap()
    }

    #[test]
    fn another_program_reads_it() {
        let listing = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                child.stdin.take().unwrap().write_all(&sample())?;
                child.wait_with_output()
            })
            .unwrap();
        assert!(listing.status.success());
        let text = String::from_utf8(listing.stdout).unwrap();
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][0], "drwxr-xr-x");
        assert_eq!((lines[1][0], lines[1][4], lines[1][5]), ("crw-------", "5,", "1"));
        assert_eq!((lines[2][0], lines[2][4]), ("-rwxr-xr-x", "5"));
        assert_eq!(lines[3].last(), Some(&"empty"));
    }

    #[test]
    fn bytes_are_the_same_each_time_and_aligned() {
        let bytes = sample();
        assert_eq!(bytes, sample());
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
    }

    #[test]
    fn bad_names_are_refused() {
        let mut cpio = CpioWriter::new(Vec::new());
        for name in ["", "/init", &"a".repeat(256)] {
            assert!(cpio.file(name, 0o644, b"").is_err(), "{name:?}");
        }
    }
}
