//! Which nodes the pages of a process are on: `/proc/PID/numa_maps`, taken apart.
//!
//! Called by `shards` on blocking threads, about VM processes, which are hostile: the names of what
//! they map are theirs to choose. Refuses what is longer than any VM process's, and counts nothing
//! that it cannot read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use rustix::process::Pid;

use crate::topology::NODES_MAX;

/// Longest text: a VM process may have 65,530 mappings, and each has a line of some 100 bytes.
pub const TEXT_BYTES_MAX: usize = 16 << 20;

/// One mapping with pages in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Where it starts.
    pub start: u64,
    /// The name of the file that it shows, shortened; memory without a name has none.
    pub file: Option<String>,
    /// Pages on each node, in units of [`mica_units::PAGE_BYTES`].
    pub pages: BTreeMap<u32, u64>,
}

/// The mappings of a process. Blocks: the kernel walks all page tables.
///
/// # Errors
/// When the process is gone or may not be looked at; `NotFound` also where the kernel knows no nodes.
pub fn read(pid: Pid) -> io::Result<Vec<Mapping>> {
    let mut text = Vec::new();
    let file = File::open(format!("/proc/{}/numa_maps", pid.as_raw_nonzero()))?;
    file.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut text)?;
    if text.len() > TEXT_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more mappings than are looked at"));
    }
    Ok(parse(&text))
}

/// Takes the text apart. Lines that are none are left out.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `7f0000000000 bind:0 file=/memfd:x\040(deleted) mapped=3 N0=2 N1=1 kernelpagesize_kB=4`. The kernel
/// writes spaces of a name as `\040`, so a name is one word.
fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
    let start = std::str::from_utf8(words.next()?).ok()?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let mut mapping = Mapping { start, ..Mapping::default() };
    let mut page_kib = 4;
    // The policy, which may not say anything that is taken for something else.
    words.next()?;
    for word in words {
        if let Some(name) = word.strip_prefix(b"file=") {
            mapping.file = Some(String::from_utf8_lossy(&name[..name.len().min(256)]).into_owned());
        } else if let Some(kib) = word.strip_prefix(b"kernelpagesize_kB=") {
            page_kib = number(kib)?;
        } else if let Some(count) = word.strip_prefix(b"N") {
            let at = count.iter().position(|byte| *byte == b'=')?;
            let node = u32::try_from(number(&count[..at])?).ok().filter(|n| *n < NODES_MAX)?;
            mapping.pages.insert(node, number(&count[at + 1..])?);
        }
    }
    for pages in mapping.pages.values_mut() {
        *pages = pages.saturating_mul(page_kib) / (mica_units::PAGE_BYTES >> 10);
    }
    Some(mapping)
}

fn number(digits: &[u8]) -> Option<u64> {
    let plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_a_vm_process_are_read() {
        let text = b"00400000 default file=/mica-vm mapped=40 active=0 N1=40 kernelpagesize_kB=4\n\
            7f0000000000 bind:0 file=/memfd:mica-replica\\040(deleted) anon=3 mapped=9 N0=8 N1=1 kernelpagesize_kB=4\n\
            7f1000000000 bind:0 anon=1 dirty=1 N0=1 kernelpagesize_kB=2048\n\
            7fff00000000 bind=static:0-1 stack anon=2 N0=2 kernelpagesize_kB=4\n\
            7fff10000000 default\n";
        let all = parse(text);
        assert_eq!(all.len(), 5);
        assert_eq!(all[1].file.as_deref(), Some("/memfd:mica-replica\\040(deleted)"));
        assert_eq!(all[1].pages, [(0, 8), (1, 1)].into());
        assert_eq!((all[2].start, &all[2].pages), (0x7f10_0000_0000, &[(0, 512)].into()));
        assert_eq!(all[4].pages, BTreeMap::new());
    }

    #[test]
    fn hostile_lines_count_nothing() {
        for bad in [
            "",
            "x",
            "zz default N0=1",
            "1000",
            "1000 default N0=",
            "1000 default N=1",
            "1000 default N0=-1",
            "1000 default N9999=1",
            "1000 default N0=99999999999999999999",
            "1000 default kernelpagesize_kB=x",
            "1000 default N4294967296=1",
            "11111111111111111111 default N0=1",
            "1000 default N",
        ] {
            let counted: u64 = parse(bad.as_bytes()).iter().flat_map(|m| m.pages.values()).sum();
            assert_eq!(counted, 0, "{bad}");
        }
        // A name that looks like counts is a name; too large a count stays a number.
        let named = parse(b"1000 default file=/N0=7 N1=2");
        assert_eq!(named[0].pages, [(1, 2)].into());
        let large = parse(b"1000 N5=9 N0=18446744073709551615 kernelpagesize_kB=2048");
        assert_eq!(large[0].pages, [(0, u64::MAX / 4)].into());
        let long = format!("1000 default file={} N0=1", "x".repeat(1 << 20));
        assert_eq!(parse(long.as_bytes())[0].file.as_ref().unwrap().len(), 256);
    }

    #[test]
    fn this_process_has_pages() {
        match read(rustix::process::getpid()) {
            Ok(mappings) => {
                let pages: u64 = mappings.iter().flat_map(|m| m.pages.values()).sum();
                assert!(pages > 100, "{pages}");
            }
            // A kernel without nodes.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in prop::collection::vec(any::<u8>(), 0..200), like in "[0-9a-fN=: \n]{0,200}") {
            let mappings = parse(&text).into_iter().chain(parse(like.as_bytes()));
            for mapping in mappings {
                prop_assert!(mapping.pages.keys().all(|node| *node < NODES_MAX));
            }
        }
    }
}
