//! `multipart/form-data`, cut into parts as it arrives.
//!
//! Called by [`super::files`]. Pure: bytes in, pieces out. (The `multer` crate was looked at: it
//! reads its source until that has nothing more at the moment, so a fast client and a slow disk
//! put a whole upload into memory, and it bounds neither a part's headers nor what comes before
//! the first part.) Refuses part headers over [`HEADERS_BYTES_MAX`], a preamble over
//! [`PREAMBLE_BYTES_MAX`], more parts than [`PARTS_MAX`] and a body that ends before its last
//! delimiter. Holds at most one chunk and one delimiter.

use bytes::{Buf as _, Bytes, BytesMut};
use memchr::memmem;

use crate::http::query;

/// Longest headers of one part.
const HEADERS_BYTES_MAX: usize = 16 * 1024;

/// Most bytes in front of the first part.
const PREAMBLE_BYTES_MAX: usize = 16 * 1024;

/// Most parts of one upload.
const PARTS_MAX: usize = 10_000;

const LINE_BREAK_BYTES: usize = 2;

/// Longest boundary; the standard says 70.
const BOUNDARY_BYTES_MAX: usize = 256;

/// Why a body is not multipart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MultipartError {
    #[error("the multipart content type has no boundary of 1 to {BOUNDARY_BYTES_MAX} bytes")]
    Boundary,
    #[error("over {PREAMBLE_BYTES_MAX} bytes come before the first multipart part")]
    Preamble,
    #[error("a multipart delimiter is not followed by a line break")]
    Delimiter,
    #[error("the headers of a multipart part are over {HEADERS_BYTES_MAX} bytes")]
    Headers,
    #[error("the body has over {PARTS_MAX} multipart parts; send several requests")]
    TooMany,
    #[error("the multipart body ends before its last delimiter")]
    Incomplete,
}

/// What `Content-Disposition` says about a part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartHead {
    pub name: Option<String>,
    pub filename: Option<String>,
}

/// What comes next in a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Begin(PartHead),
    Data(Bytes),
    End,
    /// The last delimiter; whatever follows is ignored.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Preamble,
    AfterDelimiter,
    Headers,
    Data,
    Done,
}

/// Cuts a body into parts.
#[derive(Debug)]
pub struct Splitter {
    delimiter: Vec<u8>,
    buffer: BytesMut,
    state: State,
    /// Bytes of the preamble so far.
    skipped: usize,
    /// Bytes at the front of the buffer that end a part's headers and are not its data.
    line_break_left: usize,
    parts: usize,
}

impl Splitter {
    /// For a body with this `Content-Type`.
    ///
    /// # Errors
    /// When it names no usable boundary.
    pub fn new(content_type: &str) -> Result<Self, MultipartError> {
        let boundary = parameter(content_type, "boundary").ok_or(MultipartError::Boundary)?;
        if boundary.is_empty() || boundary.len() > BOUNDARY_BYTES_MAX {
            return Err(MultipartError::Boundary);
        }
        let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
        // The first delimiter need not be preceded by a line break; now all are alike.
        let buffer = BytesMut::from(&b"\r\n"[..]);
        Ok(Self {
            delimiter,
            buffer,
            state: State::Preamble,
            skipped: 0,
            line_break_left: 0,
            parts: 0,
        })
    }

    /// Adds bytes of the body. Call when [`Splitter::next_piece`] has no more pieces.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.state != State::Done {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next piece; `None` when more of the body is needed.
    ///
    /// # Errors
    /// When the body is not in form.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, MultipartError> {
        loop {
            match self.state {
                State::Preamble => {
                    if !self.skip_preamble()? {
                        return Ok(None);
                    }
                }
                State::AfterDelimiter => match self.after_delimiter()? {
                    Some(true) => {}
                    Some(false) => return Ok(Some(Piece::Done)),
                    None => return Ok(None),
                },
                State::Headers => return self.headers(),
                State::Data => return Ok(self.data()),
                State::Done => return Ok(None),
            }
        }
    }

    /// Whether the body may end here.
    ///
    /// # Errors
    /// When its last delimiter has not come.
    pub fn finish(&self) -> Result<(), MultipartError> {
        if self.state == State::Done { Ok(()) } else { Err(MultipartError::Incomplete) }
    }

    fn skip_preamble(&mut self) -> Result<bool, MultipartError> {
        let found = memmem::find(&self.buffer, &self.delimiter);
        let skip = match found {
            Some(at) => at + self.delimiter.len(),
            None => self.buffer.len().saturating_sub(self.delimiter.len() - 1),
        };
        self.skipped += skip;
        self.buffer.advance(skip);
        if self.skipped > PREAMBLE_BYTES_MAX {
            return Err(MultipartError::Preamble);
        }
        if found.is_some() {
            self.state = State::AfterDelimiter;
        }
        Ok(found.is_some())
    }

    /// `Some(true)`: a part follows. `Some(false)`: that was the last delimiter.
    fn after_delimiter(&mut self) -> Result<Option<bool>, MultipartError> {
        if self.buffer.starts_with(b"--") {
            self.state = State::Done;
            self.buffer.clear();
            return Ok(Some(false));
        }
        let padding = self.buffer.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        if padding > HEADERS_BYTES_MAX {
            return Err(MultipartError::Delimiter);
        }
        match self.buffer.get(padding..).unwrap_or(&[]) {
            [] | [b'\r'] => Ok(None),
            [b'-'] if padding == 0 => Ok(None),
            // The line break stays: it is the start of the headers' end when there are none.
            [b'\r', b'\n', ..] => {
                self.buffer.advance(padding);
                self.state = State::Headers;
                Ok(Some(true))
            }
            _ => Err(MultipartError::Delimiter),
        }
    }

    fn headers(&mut self) -> Result<Option<Piece>, MultipartError> {
        const END: &[u8] = b"\r\n\r\n";
        let Some(at) = memmem::find(&self.buffer, END) else {
            if self.buffer.len() > HEADERS_BYTES_MAX {
                return Err(MultipartError::Headers);
            }
            return Ok(None);
        };
        if at > HEADERS_BYTES_MAX {
            return Err(MultipartError::Headers);
        }
        self.parts += 1;
        if self.parts > PARTS_MAX {
            return Err(MultipartError::TooMany);
        }
        let block = self.buffer.split_to(at);
        // The last line break stays: an empty part may have its delimiter right behind its
        // headers, and then that line break is the delimiter's own.
        self.buffer.advance(END.len() - LINE_BREAK_BYTES);
        self.line_break_left = LINE_BREAK_BYTES;
        let text = String::from_utf8_lossy(&block).into_owned();
        let disposition = text.split("\r\n").find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
        });
        let head = disposition.map(|value| PartHead {
            name: parameter(value, "name"),
            filename: parameter(value, "filename"),
        });
        self.state = State::Data;
        Ok(Some(Piece::Begin(head.unwrap_or_default())))
    }

    fn data(&mut self) -> Option<Piece> {
        let found = memmem::find(&self.buffer, &self.delimiter);
        let until = match found {
            Some(at) => at,
            None => self.buffer.len().saturating_sub(self.delimiter.len() - 1),
        };
        if until > 0 {
            let kept_back = until.min(self.line_break_left);
            self.line_break_left -= kept_back;
            self.buffer.advance(kept_back);
            let data = self.buffer.split_to(until - kept_back).freeze();
            if !data.is_empty() {
                return Some(Piece::Data(data));
            }
        }
        if !self.buffer.starts_with(&self.delimiter) {
            return None;
        }
        self.buffer.advance(self.delimiter.len());
        self.state = State::AfterDelimiter;
        Some(Piece::End)
    }
}

/// A parameter of a header value, quoted or not; `name*=UTF-8''...` as well. Backslashes escape
/// quotes and themselves, and nothing else, because they also stand in paths.
fn parameter(value: &str, wanted: &str) -> Option<String> {
    let mut rest = value.split_once(';')?.1;
    let mut extended = None;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ';', '\r', '\n']);
        let (name, after) = rest.split_once('=')?;
        let (text, next) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => quoted_text(quoted)?,
            None => {
                let end = after.find(';').unwrap_or(after.len());
                let (text, next) = after.split_at(end);
                (text.trim().to_owned(), next)
            }
        };
        let name = name.trim();
        if name.eq_ignore_ascii_case(wanted) {
            return Some(text);
        }
        if name.strip_suffix('*').is_some_and(|name| name.eq_ignore_ascii_case(wanted)) {
            let encoded = text.get(..7).filter(|tag| tag.eq_ignore_ascii_case("utf-8''"));
            extended = encoded.and_then(|_| query::decode(text.get(7..)?, false));
        }
        rest = next;
        if rest.trim().is_empty() || (extended.is_some() && !rest.contains('=')) {
            return extended;
        }
    }
}

fn quoted_text(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut characters = quoted.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        match (character, characters.peek()) {
            ('"', _) => return Some((text, quoted.get(at + 1..)?)),
            ('\\', Some((_, escaped @ ('"' | '\\')))) => {
                text.push(*escaped);
                characters.next();
            }
            _ => text.push(character),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &str = "multipart/form-data; boundary=XX";

    /// All parts of a body that arrives in chunks of `step`.
    fn split(body: &[u8], step: usize) -> Result<Vec<(PartHead, Vec<u8>)>, MultipartError> {
        let mut splitter = Splitter::new(TYPE)?;
        let mut parts: Vec<(PartHead, Vec<u8>)> = Vec::new();
        let mut open = false;
        for chunk in body.chunks(step) {
            splitter.push(chunk);
            while let Some(piece) = splitter.next_piece()? {
                match piece {
                    Piece::Begin(head) => {
                        assert!(!std::mem::replace(&mut open, true));
                        parts.push((head, Vec::new()));
                    }
                    Piece::Data(data) => parts.last_mut().unwrap().1.extend_from_slice(&data),
                    Piece::End => assert!(std::mem::replace(&mut open, false)),
                    Piece::Done => {}
                }
            }
            assert!(splitter.buffer.len() < step + HEADERS_BYTES_MAX + 300);
        }
        splitter.finish()?;
        Ok(parts)
    }

    fn file(filename: &str) -> PartHead {
        PartHead { name: Some("file".into()), filename: Some(filename.into()) }
    }

    const BODY: &[u8] = b"ignored\r\n--XX\r\n\
        Content-Disposition: form-data; name=\"file\"; filename=\"/a/b.txt\"\r\n\
        Content-Type: text/plain\r\n\r\nline\r\n--X not it\r\n\r\n--XX \t\r\n\
        content-disposition: form-data; name=file; filename=c\r\n\r\n\r\n--XX\r\n\r\n\
        no headers\r\n--XX--\r\nepilogue";

    #[test]
    fn parts_are_the_same_however_the_body_is_cut() {
        let wanted = vec![
            (file("/a/b.txt"), b"line\r\n--X not it\r\n".to_vec()),
            (file("c"), Vec::new()),
            (PartHead::default(), b"no headers".to_vec()),
        ];
        for step in (1..40).chain([BODY.len()]) {
            assert_eq!(split(BODY, step), Ok(wanted.clone()), "in chunks of {step}");
        }
    }

    #[test]
    fn a_body_that_is_cut_off_is_never_whole() {
        let end = memmem::find(BODY, b"--XX--").unwrap() + 6;
        for length in 0..end {
            assert_eq!(split(&BODY[..length], 7), Err(MultipartError::Incomplete), "{length}");
        }
        assert!(split(&BODY[..end], 7).is_ok());
    }

    #[test]
    fn data_may_hold_anything_but_the_delimiter() {
        let mut data = vec![0, 255, b'\r', b'\n', b'-', b'-', b'X', b'\r', b'\r', b'\n', b'-'];
        data.extend(b"--XX\r\n--XY\r\n\r".repeat(50));
        let body = [b"--XX\r\n\r\n", &data[..], b"\r\n--XX--"].concat();
        for step in [1, 2, 3, 5, 8, 64, 4096] {
            assert_eq!(split(&body, step).unwrap()[0].1, data, "{step}");
        }
    }

    #[test]
    fn an_empty_part_without_its_own_line_break_is_empty() {
        let body = b"--XX\r\nA: b\r\n\r\n--XX--";
        for step in 1..20 {
            assert_eq!(split(body, step), Ok(vec![(PartHead::default(), Vec::new())]));
        }
    }

    #[test]
    fn hostile_bodies_are_refused_in_bounded_memory() {
        let endless = vec![b'a'; 100_000];
        assert_eq!(split(&endless, 1000), Err(MultipartError::Preamble));
        let headers = [b"--XX\r\n", &endless[..]].concat();
        assert_eq!(split(&headers, 1000), Err(MultipartError::Headers));
        assert_eq!(split(&headers, headers.len()), Err(MultipartError::Headers));
        let spaces = [b"--XX".to_vec(), vec![b' '; 100_000]].concat();
        assert_eq!(split(&spaces, 1000), Err(MultipartError::Delimiter));
        assert_eq!(split(b"--XXjunk", 3), Err(MultipartError::Delimiter));
        let many = b"--XX\r\n\r\n\r\n".repeat(PARTS_MAX + 1);
        assert_eq!(split(&many, 4096), Err(MultipartError::TooMany));
        for bad in ["multipart/form-data", "multipart/form-data; boundary=", "x; boundary=\"a"] {
            assert_eq!(Splitter::new(bad).unwrap_err(), MultipartError::Boundary, "{bad}");
        }
        let long = format!("multipart/form-data; boundary={}", "b".repeat(1000));
        assert_eq!(Splitter::new(&long).unwrap_err(), MultipartError::Boundary);
    }

    #[test]
    fn parameters_of_all_forms() {
        let of = |value: &str| parameter(value, "filename");
        assert_eq!(of(r#"form-data; name="filename"; filename="x""#).as_deref(), Some("x"));
        assert_eq!(
            of(r#"form-data; filename="a;b=\"c\" \d\\e""#).as_deref(),
            Some(r#"a;b="c" \d\e"#)
        );
        assert_eq!(of("form-data; FileName = plain ; name=y").as_deref(), Some("plain"));
        assert_eq!(of("form-data; filename*=UTF-8''%C3%A9.txt").as_deref(), Some("é.txt"));
        assert_eq!(of("form-data; filename*=utf-8''x; filename=y").as_deref(), Some("y"));
        assert_eq!(of("form-data; filename=\"é/ü\"").as_deref(), Some("é/ü"));
        for bad in
            ["form-data", "form-data; filename", "form-data; filename=\"x", "", ";;;", "a; ="]
        {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
