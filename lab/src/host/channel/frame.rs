//! The frames of the exec channel: one byte of kind, four of length, then the payload.
//!
//! Both ends use it. It refuses an unknown kind and a payload over `PAYLOAD_MAX`, so that neither
//! end can be made to hold more than one bounded buffer.

use std::io::{self, Read, Write};

/// The longest payload of one frame; longer streams are cut into many.
pub const PAYLOAD_MAX: usize = 256 * 1024;

const HEADER_LEN: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// JSON of `super::Hello`.
    Hello = 1,
    Stdin = 2,
    /// The client's standard input has ended. Empty.
    StdinEnd = 3,
    Stdout = 4,
    Stderr = 5,
    /// The exit code, an i32 in big endian.
    Exit = 6,
    /// Why the request could not be carried out, as text.
    Failed = 7,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [
            Kind::Hello,
            Kind::Stdin,
            Kind::StdinEnd,
            Kind::Stdout,
            Kind::Stderr,
            Kind::Exit,
            Kind::Failed,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

/// Writes one frame with one write call, so that frames of two threads behind a lock never mix.
pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= PAYLOAD_MAX)
        .ok_or_else(|| io::Error::other("an exec channel frame is over its limit"))?;
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes)
}

/// Reads one frame. `None` means that the other end closed between two frames.
pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0_u8; HEADER_LEN];
    let mut filled = 0;
    while filled < HEADER_LEN {
        match from.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let [kind, length @ ..] = header;
    let kind = Kind::from_byte(kind).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("unknown frame kind {kind}"))
    })?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > PAYLOAD_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is over the limit of {PAYLOAD_MAX}"),
        ));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some(Frame { kind, payload }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_written() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Stdout, b"hello").unwrap();
        write(&mut bytes, Kind::Exit, &7_i32.to_be_bytes()).unwrap();
        let mut from = bytes.as_slice();
        let first = read(&mut from).unwrap().unwrap();
        assert_eq!((first.kind, first.payload.as_slice()), (Kind::Stdout, b"hello".as_slice()));
        assert_eq!(read(&mut from).unwrap().unwrap().kind, Kind::Exit);
        assert_eq!(read(&mut from).unwrap(), None);
    }

    #[test]
    fn a_cut_frame_an_unknown_kind_and_a_huge_length_are_refused() {
        assert!(read(&mut [4, 0, 0].as_slice()).is_err());
        assert!(read(&mut [4, 0, 0, 0, 9, 1].as_slice()).is_err());
        assert!(read(&mut [99, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read(&mut [4, 0xff, 0, 0, 0].as_slice()).is_err());
        assert!(write(&mut Vec::new(), Kind::Stdin, &vec![0; PAYLOAD_MAX + 1]).is_err());
    }
}
