//! The chunks of a body, and the fields behind the last one (RFC 9112, 7.1).
//!
//! Called by [`super::BodyReader`]. Refuses a size that does not fit 64 bits, lines that end with
//! anything but CR LF, extensions without end, and fields that are too many or too long.

use bytes::{Bytes, BytesMut};
use hyper::HeaderMap;

use super::{FIELDS_MAX, Malformed, add_field};

/// Bytes of extensions and of leading zeros of all chunks together: nobody uses them, so a body that is
/// full of them is an attack on whoever reads them.
const EXTENSION_BYTES_MAX: usize = 4096;

/// Bytes of the fields behind the last chunk.
const TRAILER_BYTES_MAX: usize = 16 * 1024;

/// Where in a body it is.
#[derive(Debug, Default)]
pub struct Chunked {
    state: State,
    extension_bytes: usize,
    trailers: Option<HeaderMap>,
}

#[derive(Debug)]
enum State {
    /// In the digits of a size, of which there was one, or none.
    Size { size: u64, has_digit: bool },
    /// Behind them.
    Extension { size: u64 },
    /// At the line feed of that line.
    SizeEnd { size: u64 },
    /// In a chunk.
    Data { left: u64 },
    /// At the carriage return behind it.
    DataReturn,
    /// At the line feed.
    DataEnd,
    /// Behind the last chunk.
    Trailers(Vec<u8>),
    /// At the end.
    Done,
}

const BEFORE_SIZE: State = State::Size { size: 0, has_digit: false };

impl Default for State {
    fn default() -> Self {
        BEFORE_SIZE
    }
}

impl Chunked {
    /// Takes the front of `input`, as [`super::BodyReader::take`] does.
    pub fn take(&mut self, input: &[u8], content: &mut BytesMut) -> Result<usize, Malformed> {
        let mut at = 0;
        while let Some(byte) = input.get(at).copied() {
            match &mut self.state {
                State::Done => break,
                State::Data { left } => {
                    let rest = &input[at..];
                    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    content.extend_from_slice(&rest[..count]);
                    at += count;
                    *left -= u64::try_from(count).unwrap_or(u64::MAX);
                    if *left == 0 {
                        self.state = State::DataReturn;
                    }
                }
                State::Trailers(block) => {
                    at += 1;
                    block.push(byte);
                    if block.as_slice() == b"\r\n" || block.ends_with(b"\r\n\r\n") {
                        self.trailers = parse(std::mem::take(block))?;
                        self.state = State::Done;
                    } else if block.len() >= TRAILER_BYTES_MAX {
                        return Err(Malformed::Chunk);
                    }
                }
                _ => {
                    at += 1;
                    self.state = self.next(byte)?;
                }
            }
        }
        Ok(at)
    }

    /// The state behind one byte that is no content.
    fn next(&mut self, byte: u8) -> Result<State, Malformed> {
        Ok(match (&self.state, byte) {
            (&State::Size { size, .. }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).map(u64::from);
                let next = size.checked_mul(16).zip(digit).map(|(high, digit)| high | digit);
                let size = next.ok_or(Malformed::Chunk)?;
                if size == 0 {
                    self.extend(size)?;
                }
                State::Size { size, has_digit: true }
            }
            (&(State::Size { size, has_digit: true } | State::Extension { size }), b'\r') => {
                State::SizeEnd { size }
            }
            (&State::Size { size, has_digit: true }, b';' | b' ' | b'\t') => self.extend(size)?,
            (&State::Extension { size }, byte) if byte != b'\n' => self.extend(size)?,
            (State::SizeEnd { size: 0 }, b'\n') => State::Trailers(Vec::new()),
            (&State::SizeEnd { size }, b'\n') => State::Data { left: size },
            (State::DataReturn, b'\r') => State::DataEnd,
            (State::DataEnd, b'\n') => BEFORE_SIZE,
            _ => return Err(Malformed::Chunk),
        })
    }

    fn extend(&mut self, size: u64) -> Result<State, Malformed> {
        self.extension_bytes += 1;
        let fits = self.extension_bytes <= EXTENSION_BYTES_MAX;
        if fits { Ok(State::Extension { size }) } else { Err(Malformed::Chunk) }
    }

    /// Whether the last chunk and the fields behind it have come.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Those fields, once.
    pub fn trailers(&mut self) -> Option<HeaderMap> {
        self.trailers.take()
    }
}

fn parse(block: Vec<u8>) -> Result<Option<HeaderMap>, Malformed> {
    let block = Bytes::from(block);
    let mut room = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let parsed = match httparse::parse_headers(&block, &mut room) {
        Ok(httparse::Status::Complete((end, parsed))) if end == block.len() => parsed,
        _ => return Err(Malformed::Chunk),
    };
    if parsed.is_empty() {
        return Ok(None);
    }
    let mut fields = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        add_field(&mut fields, &block, field).map_err(|_| Malformed::Chunk)?;
    }
    Ok(Some(fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The content, the trailers, and how much was left over.
    type Read = (Vec<u8>, Option<HeaderMap>, Option<usize>);

    /// What is read in pieces of `cut` bytes.
    fn read(input: &[u8], cut: usize) -> Result<Read, Malformed> {
        let (mut chunked, mut content, mut taken) = (Chunked::default(), BytesMut::new(), 0);
        for piece in input.chunks(cut) {
            taken += chunked.take(piece, &mut content)?;
        }
        let left = chunked.is_done().then(|| input.len() - taken);
        Ok((content.to_vec(), chunked.trailers(), left))
    }

    #[test]
    fn chunks_are_joined_and_end_where_they_say_however_they_are_cut() {
        let input = concat!(
            "5\r\nhello\r\n",
            "00c;x=\"y\"\r\n, my world!!\r\n",
            "A \r\n0123456789\r\n",
            "0\r\nx-Sum: 7\r\n\r\nGET"
        );
        for cut in 1..input.len() {
            let (content, trailers, left) = read(input.as_bytes(), cut).unwrap();
            assert_eq!(content, b"hello, my world!!0123456789", "{cut}");
            assert_eq!(trailers.unwrap()["x-sum"], "7");
            assert_eq!(left, Some(3));
        }
        assert_eq!(read(b"0\r\n\r\n", 9), Ok((vec![], None, Some(0))));
        assert_eq!(read(b"3\r\nab", 9), Ok((b"ab".to_vec(), None, None)));
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        for input in [
            "\r\n",
            ";x\r\n",
            "g\r\n",
            "0x1\r\n",
            "-1\r\n",
            " 1\r\n",
            "1\na",
            "1\r\r\n",
            "1;x\na",
            "1\r\nab\r\n",
            "1\r\na\n",
            "1\r\na\r\r",
            "10000000000000000\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\na: 1\r\n b\r\n\r\n",
            "0\r\na: 1\n\r\n\r\n",
        ] {
            assert_eq!(read(input.as_bytes(), 64), Err(Malformed::Chunk), "{input:?}");
        }
        assert!(read(b"ffffffffffffffff\r\na", 64).is_ok(), "the largest size");
    }

    #[test]
    fn what_is_no_content_has_bounds() {
        let extended = |count: usize| format!("1;{}\r\na", "x".repeat(count));
        assert!(read(extended(EXTENSION_BYTES_MAX - 1).as_bytes(), 64).is_ok());
        assert!(read(extended(EXTENSION_BYTES_MAX).as_bytes(), 64).is_err());
        let often = "1;\r\na\r\n".repeat(EXTENSION_BYTES_MAX + 1);
        assert!(read(often.as_bytes(), 64).is_err(), "of all chunks together");
        let zeros = format!("{}1\r\na", "0".repeat(EXTENSION_BYTES_MAX + 1));
        assert!(read(zeros.as_bytes(), 64).is_err());
        let trailers = |count: usize| format!("0\r\n{}\r\n", "a: b\r\n".repeat(count));
        assert!(read(trailers(FIELDS_MAX).as_bytes(), 64).is_ok());
        assert!(read(trailers(FIELDS_MAX + 1).as_bytes(), 64).is_err());
        let long = format!("0\r\na: {}", "b".repeat(TRAILER_BYTES_MAX));
        assert!(read(long.as_bytes(), 64).is_err());
    }
}
