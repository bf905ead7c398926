//! Answers of servers in sandboxes, taken apart: HTTP/1.1 from bytes that are hostile.
//!
//! Called by [`super::exchange`], which reads them from a stream into a guest. Knows no stream: what comes
//! in is pieces of any length, and what comes out does not depend on where they were cut. Refuses
//! whatever two readers could take for two things: an answer's end is where everybody sees it, or the
//! answer is none.

mod chunked;
mod framing;
mod head;

use bytes::{Bytes, BytesMut};
use hyper::HeaderMap;

use chunked::Chunked;
pub use framing::Framing;
pub use head::{Head, HeadReader};

/// Header fields of an answer, and of its end.
const FIELDS_MAX: usize = 200;

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The head is no head.
    #[error("the head of the answer is not HTTP/1.1")]
    Head,
    /// The head does not end.
    #[error("the head of the answer is too long")]
    HeadTooLong,
    /// It says nothing but that more will come.
    #[error("too many interim answers")]
    Interim,
    /// Two lengths, or one that is none.
    #[error("the length of the answer is not clear")]
    Length,
    /// A chunk is none.
    #[error("the answer is not chunked as it says")]
    Chunk,
    /// It ended before its end.
    #[error("the answer was cut short")]
    CutShort,
}

/// The body of an answer, on its way.
#[derive(Debug)]
pub enum BodyReader {
    /// So many bytes are left.
    Length(u64),
    /// Chunks. In a box: it is the largest by far, and a body at rest keeps this.
    Chunked(Box<Chunked>),
    /// Everything until the stream ends.
    UntilClosed,
    /// Nothing is left.
    Done,
}

impl BodyReader {
    /// Of an answer with this framing.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        match framing {
            Framing::Nothing | Framing::Length(0) => Self::Done,
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Box::default()),
            Framing::UntilClosed => Self::UntilClosed,
        }
    }

    /// Takes the front of `input`, adds what is content to `content`, and says how much it took: all of it,
    /// but for what stands behind the end.
    ///
    /// # Errors
    /// See [`Malformed`]. The answer is over then.
    pub fn take(&mut self, input: &[u8], content: &mut BytesMut) -> Result<usize, Malformed> {
        match self {
            Self::Done => Ok(0),
            Self::UntilClosed => {
                content.extend_from_slice(input);
                Ok(input.len())
            }
            Self::Length(left) => {
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
                content.extend_from_slice(&input[..count]);
                *left -= u64::try_from(count).unwrap_or(u64::MAX);
                if *left == 0 {
                    *self = Self::Done;
                }
                Ok(count)
            }
            Self::Chunked(chunked) => chunked.take(input, content),
        }
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// [`Malformed::CutShort`] where the answer has not.
    pub fn close(&mut self) -> Result<(), Malformed> {
        match self {
            Self::UntilClosed => *self = Self::Done,
            _ if self.is_done() => {}
            _ => return Err(Malformed::CutShort),
        }
        Ok(())
    }

    /// Whether it has come to its end.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match self {
            Self::Done => true,
            Self::Length(_) | Self::UntilClosed => false,
            Self::Chunked(chunked) => chunked.is_done(),
        }
    }

    /// The fields that came behind the body.
    pub fn trailers(&mut self) -> Option<HeaderMap> {
        match self {
            Self::Chunked(chunked) => chunked.trailers(),
            _ => None,
        }
    }

    /// What is still to come, where that is known.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        match self {
            Self::Done => Some(0),
            Self::Length(left) => Some(*left),
            Self::Chunked(_) | Self::UntilClosed => None,
        }
    }
}

/// A field of `block`, as the map takes it; `parsed` points into the block.
fn add_field(
    fields: &mut HeaderMap,
    block: &Bytes,
    parsed: &httparse::Header<'_>,
) -> Result<(), hyper::http::Error> {
    let name = hyper::header::HeaderName::from_bytes(parsed.name.as_bytes())?;
    let value = hyper::header::HeaderValue::from_maybe_shared(block.slice_ref(parsed.value))?;
    fields.try_append(name, value)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut body: BodyReader, input: &[u8]) -> (Result<usize, Malformed>, Vec<u8>, bool) {
        let mut content = BytesMut::new();
        let taken = body.take(input, &mut content);
        (taken, content.to_vec(), body.is_done())
    }

    #[test]
    fn a_length_ends_where_it_says() {
        let body = || BodyReader::new(Framing::Length(3));
        assert_eq!(read(body(), b"ab"), (Ok(2), b"ab".to_vec(), false));
        assert_eq!(read(body(), b"abcd"), (Ok(3), b"abc".to_vec(), true));
        assert_eq!(read(BodyReader::new(Framing::Length(0)), b"x"), (Ok(0), vec![], true));
        assert_eq!(read(BodyReader::new(Framing::Nothing), b"x"), (Ok(0), vec![], true));
    }

    #[test]
    fn only_what_has_no_end_of_its_own_ends_with_the_stream() {
        let mut open = BodyReader::new(Framing::UntilClosed);
        assert_eq!(open.left(), None);
        assert!(!open.is_done() && open.close().is_ok() && open.is_done());
        assert_eq!(BodyReader::new(Framing::Length(1)).close(), Err(Malformed::CutShort));
        assert_eq!(BodyReader::new(Framing::Chunked).close(), Err(Malformed::CutShort));
        assert_eq!(BodyReader::new(Framing::Nothing).close(), Ok(()));
    }
}
