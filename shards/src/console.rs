//! A sandbox's console: a memfd that its VM process writes and the shard reads when something fails.
//!
//! Called by `prepare` and the driver. Refuses to trust a byte of it: the guest writes the text
//! and a VM process may write the header.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use mica_wire::vm::console::HEADER_BYTES;
use rustix::fs::{MemfdFlags, SealFlags};

/// Most characters of a console that an error carries.
pub(crate) const TAIL_CHARS_MAX: usize = 2048;

/// An empty console of `bytes`, its length sealed.
pub(crate) fn create(bytes: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("console", flags)?;
    rustix::fs::ftruncate(&memfd, bytes)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memfd)
}

/// The last of what was written, as harmless text. Empty when nothing was, or when the header lies.
pub(crate) fn tail(console: &OwnedFd, console_bytes: u64) -> io::Result<String> {
    Ok(sanitise(&last(console, console_bytes, TAIL_CHARS_MAX as u64)?.1))
}

/// How much was written in all, and the last of it as it is: `bytes_max` at most.
pub(crate) fn last(
    console: &OwnedFd,
    console_bytes: u64,
    bytes_max: u64,
) -> io::Result<(u64, Vec<u8>)> {
    let mut header = [0u8; 8];
    read_at(console, &mut header, 0)?;
    let total = u64::from_le_bytes(header);
    let ring = console_bytes.saturating_sub(HEADER_BYTES);
    let wanted = total.min(ring).min(bytes_max);
    if wanted == 0 {
        return Ok((total, Vec::new()));
    }
    let mut bytes = Vec::new();
    let first = total - wanted;
    // At most two pieces: up to the end of the ring, and from its start.
    let offset = first % ring;
    let straight = wanted.min(ring - offset);
    for (offset, length) in [(offset, straight), (0, wanted - straight)] {
        let mut piece = vec![0u8; usize::try_from(length).unwrap_or(0)];
        read_at(console, &mut piece, HEADER_BYTES + offset)?;
        bytes.extend_from_slice(&piece);
    }
    Ok((total, bytes))
}

fn read_at(console: &OwnedFd, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = File::from(console.try_clone()?);
    file.read_exact_at(buffer, offset)
}

/// Printable ASCII and line ends; escape sequences and everything else are dropped, so that a guest
/// cannot write to the terminal of whoever reads the error.
pub(crate) fn sanitise(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut bytes = bytes.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            0x1b if bytes.peek() == Some(&b'[') => {
                bytes.next();
                // CSI: parameters, then one final byte of 0x40 to 0x7e.
                while bytes.next().is_some_and(|b| !(0x40..=0x7e).contains(&b)) {}
            }
            b'\n' => text.push('\n'),
            b'\t' => text.push(' '),
            0x20..=0x7e => text.push(char::from(byte)),
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 4096;

    /// Writes as a VM process does.
    fn write(console: &OwnedFd, text: &[u8]) {
        let file = File::from(console.try_clone().unwrap());
        for (n, byte) in text.iter().enumerate() {
            let ring = BYTES - HEADER_BYTES;
            file.write_all_at(&[*byte], HEADER_BYTES + n as u64 % ring).unwrap();
        }
        file.write_all_at(&(text.len() as u64).to_le_bytes(), 0).unwrap();
    }

    #[test]
    fn the_tail_goes_round_the_end_of_the_ring() {
        let console = create(BYTES).unwrap();
        assert_eq!(tail(&console, BYTES).unwrap(), "");
        write(&console, b"boot\r\nok\n");
        assert_eq!(tail(&console, BYTES).unwrap(), "boot\nok\n");
        let long: Vec<u8> = (0..5000u32).map(|n| b'a' + u8::try_from(n % 26).unwrap()).collect();
        write(&console, &long);
        let expected = String::from_utf8(long[long.len() - TAIL_CHARS_MAX..].to_vec()).unwrap();
        assert_eq!(tail(&console, BYTES).unwrap(), expected);
    }

    #[test]
    fn a_lying_header_is_harmless_and_the_length_is_sealed() {
        let console = create(BYTES).unwrap();
        let file = File::from(console.try_clone().unwrap());
        file.write_all_at(&u64::MAX.to_le_bytes(), 0).unwrap();
        assert_eq!(tail(&console, BYTES).unwrap(), "");
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 30).is_err());
    }

    #[test]
    fn escape_sequences_do_not_reach_a_terminal() {
        assert_eq!(sanitise(b"\x1b[31mred\x1b[0m\x07 \xff\x00ok\x1b"), "red ok");
    }

    proptest! {
        #[test]
        fn only_printable_text_comes_out(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let text = sanitise(&bytes);
            prop_assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)));
        }
    }
}
