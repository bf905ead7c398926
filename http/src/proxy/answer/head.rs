//! The head of an answer.
//!
//! Called by [`super::super::exchange`] with every piece that is read. Interim answers are passed over.
//! Refuses a head that is too long or has too many fields, folded fields, and what httparse refuses.

use bytes::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING};
use hyper::{StatusCode, Version};

use super::framing::{self, Framing};
use super::{FIELDS_MAX, Malformed, add_field};

/// Bytes of a head.
const HEAD_BYTES_MAX: usize = 128 * 1024;

/// Interim answers (`100`, `103`) before one that is meant.
const INTERIM_MAX: usize = 16;

/// A head.
#[derive(Debug)]
pub struct Head {
    /// What came of the request.
    pub status: StatusCode,
    /// In the server's words, where they are not the usual ones.
    pub reason: Option<ReasonPhrase>,
    /// The fields.
    pub fields: HeaderMap,
    /// Where the body ends.
    pub framing: Framing,
    /// Whether the stream may carry another request when the body has ended.
    pub may_go_on: bool,
}

/// A head on its way.
#[derive(Debug)]
pub struct HeadReader {
    bytes: Vec<u8>,
    /// How far it was searched for its end: looking again at each piece would take a time that a guest
    /// could make as long as it likes.
    searched: usize,
    interim: usize,
    to_head: bool,
}

impl HeadReader {
    /// Nothing read yet. `to_head`: of an answer to a `HEAD`.
    #[must_use]
    pub fn new(to_head: bool) -> Self {
        Self { bytes: Vec::new(), searched: 0, interim: 0, to_head }
    }

    /// Takes one more piece. A head that is whole comes with what stood behind it.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn take(&mut self, piece: &[u8]) -> Result<Option<(Head, Vec<u8>)>, Malformed> {
        self.bytes.extend_from_slice(piece);
        loop {
            let end = find_end(&self.bytes, self.searched);
            if end.unwrap_or(self.bytes.len()) > HEAD_BYTES_MAX {
                return Err(Malformed::HeadTooLong);
            }
            let Some(end) = end else {
                self.searched = self.bytes.len();
                return Ok(None);
            };
            let behind = self.bytes.split_off(end);
            let block = Bytes::from(std::mem::replace(&mut self.bytes, behind));
            self.searched = 0;
            let head = parse(&block, self.to_head)?;
            if !head.status.is_informational() || head.status == StatusCode::SWITCHING_PROTOCOLS {
                return Ok(Some((head, std::mem::take(&mut self.bytes))));
            }
            self.interim += 1;
            if self.interim > INTERIM_MAX {
                return Err(Malformed::Interim);
            }
        }
    }
}

/// The place behind the first empty line, if there is one; `searched` bytes hold none.
fn find_end(bytes: &[u8], searched: usize) -> Option<usize> {
    // The line may have begun in what was searched.
    let from = searched.saturating_sub(2);
    let ends = bytes.iter().enumerate().skip(from).filter(|(_, byte)| **byte == b'\n');
    ends.map(|(at, _)| at + 1).find_map(|next| match bytes.get(next..) {
        Some([b'\n', ..]) => Some(next + 1),
        Some([b'\r', b'\n', ..]) => Some(next + 2),
        _ => None,
    })
}

fn parse(block: &Bytes, to_head: bool) -> Result<Head, Malformed> {
    let mut room = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Response::new(&mut room);
    // Two opinions of where it ends are one too many.
    if parsed.parse(block) != Ok(httparse::Status::Complete(block.len())) {
        return Err(Malformed::Head);
    }
    let code = parsed.code.ok_or(Malformed::Head)?;
    let status = StatusCode::from_u16(code).map_err(|_| Malformed::Head)?;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    let reason = parsed.reason.filter(|said| Some(*said) != status.canonical_reason());
    let reason = reason.and_then(|said| ReasonPhrase::try_from(said.as_bytes()).ok());
    let mut fields = HeaderMap::with_capacity(parsed.headers.len());
    for field in parsed.headers.iter() {
        add_field(&mut fields, block, field).map_err(|_| Malformed::Head)?;
    }
    let framing = framing::of(version, status, &fields, to_head)?;
    let two_lengths = fields.contains_key(TRANSFER_ENCODING) && fields.contains_key(CONTENT_LENGTH);
    let has_end = matches!(framing, Framing::Length(_) | Framing::Chunked);
    // A body where none may be would be read as the next answer: of those that have none by rule it
    // is not known.
    let may_go_on = version == Version::HTTP_11 && has_end && !two_lengths && !closes(&fields);
    Ok(Head { status, reason, fields, framing, may_go_on })
}

fn closes(fields: &HeaderMap) -> bool {
    let says_close = |value: &hyper::header::HeaderValue| {
        // What is not text is not understood, and so not relied on.
        value.to_str().map_or(true, |options| {
            options.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"))
        })
    };
    fields.get_all(CONNECTION).iter().any(says_close)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<(Head, Vec<u8>)>, Malformed> {
        HeadReader::new(false).take(bytes)
    }

    fn head(text: &str) -> Head {
        read(text.as_bytes()).unwrap().unwrap().0
    }

    fn refused(text: &str) -> Malformed {
        read(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_head_ends_at_the_first_empty_line_however_it_is_cut() {
        let text = b"HTTP/1.1 404 Nope\r\nA: 1\r\na: 2\r\ncontent-length: 3\r\n\r\nabc";
        for cut in 1..text.len() {
            let mut reader = HeadReader::new(false);
            let mut found = None;
            for piece in text.chunks(cut) {
                match &mut found {
                    Some((_, behind)) => Vec::extend_from_slice(behind, piece),
                    None => found = reader.take(piece).unwrap(),
                }
            }
            let (head, behind) = found.expect("a head");
            assert_eq!((head.status.as_u16(), behind.as_slice()), (404, b"abc".as_slice()));
            assert_eq!(head.reason.unwrap().as_bytes(), b"Nope");
            assert_eq!(head.fields.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
            assert_eq!((head.framing, head.may_go_on), (Framing::Length(3), true));
        }
        assert_eq!(head("HTTP/1.1 200 OK\nx: y\n\n").fields["x"], "y", "lines of old servers");
    }

    #[test]
    fn interim_answers_are_passed_over_and_counted() {
        let interim = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
        let end = "HTTP/1.1 200 OK\r\n\r\n";
        let many = |count| format!("{}{end}", interim.repeat(count));
        assert_eq!(head(&many(16)).status, 200);
        assert_eq!(refused(&many(17)), Malformed::Interim);
        assert_eq!(head("HTTP/1.1 101 X\r\n\r\n").status, 101);
    }

    #[test]
    fn only_what_ends_by_itself_leaves_the_stream_for_another() {
        let goes_on = |rest: &str| head(&format!("HTTP/1.1 {rest}\r\n\r\n")).may_go_on;
        assert!(goes_on("200 OK\r\ncontent-length: 0"));
        assert!(goes_on("200 OK\r\ntransfer-encoding: chunked\r\nconnection: keep-alive"));
        for rest in [
            "200 OK",
            "204 No Content",
            "304 Not Modified\r\ncontent-length: 5",
            "200 OK\r\ncontent-length: 0\r\nconnection: x, Close",
            "200 OK\r\ncontent-length: 0\r\nconnection: \u{e9}",
            "200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked",
        ] {
            assert!(!goes_on(rest), "{rest}");
        }
        assert!(!head("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n").may_go_on);
        let to_head = HeadReader::new(true).take(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n");
        assert!(!to_head.unwrap().unwrap().0.may_go_on);
    }

    #[test]
    fn what_is_no_head_is_refused() {
        for text in [
            "what?\r\n\r\n",
            "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
            "HTTP/2.0 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 099 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: 1\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\nspace : 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: 1\r2\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: \0\r\n\r\n",
        ] {
            assert_eq!(refused(text), Malformed::Head, "{text:?}");
        }
        let fields = |count| format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(count));
        assert_eq!(head(&fields(FIELDS_MAX)).fields.len(), FIELDS_MAX);
        assert_eq!(refused(&fields(FIELDS_MAX + 1)), Malformed::Head);
        let long = |count| format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(count));
        assert!(read(long(HEAD_BYTES_MAX - 20).as_bytes()).unwrap().is_none());
        assert_eq!(refused(&long(HEAD_BYTES_MAX)), Malformed::HeadTooLong);
    }
}
