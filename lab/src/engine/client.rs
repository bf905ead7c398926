//! An HTTP client of a few lines over one kept-alive connection, so that next to nothing of a measured time
//! is its own.
//!
//! Called by `http` and by the tables of `bench`. Refuses an answer longer than a benchmark's can be, and one that ends early.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Longest wait for a piece of an answer.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longest answer that is read: a thousand clones, or a host's metrics.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// How much is read at once.
const PIECE_BYTES: usize = 16 << 10;

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    /// What of the last read is not used up.
    rest: Vec<u8>,
    headers: String,
    broken: bool,
}

/// An answer, whatever its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The answer, if its status is one of these.
    ///
    /// # Errors
    /// When it is not, with what the body says.
    pub fn one_of(self, method: &str, path: &str, wanted: &[u16]) -> Result<Self> {
        let status = self.status;
        let said = || String::from_utf8_lossy(&self.body).into_owned();
        ensure!(wanted.contains(&status), "{method} {path} gave {status}: {}", said());
        Ok(self)
    }
}

/// How long the body of an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

impl Client {
    /// Connects. Every request has these headers.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open(address: SocketAddr, headers: &[(&str, &str)]) -> Result<Self> {
        Self::open_as(address, &address.to_string(), headers)
    }

    /// The same, where the host goes by another name than its address.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open_as(address: SocketAddr, name: &str, headers: &[(&str, &str)]) -> Result<Self> {
        let stream =
            TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = format!("Host: {name}\r\n");
        for (name, value) in headers {
            write!(text, "{name}: {value}\r\n")?;
        }
        Ok(Self { stream, rest: Vec::new(), headers: text, broken: false })
    }

    /// Sends one request, and gives the answer's body.
    ///
    /// # Errors
    /// When the status is not `wanted`, or the connection breaks.
    pub fn call(&mut self, method: &str, path: &str, body: &[u8], wanted: u16) -> Result<Vec<u8>> {
        Ok(self.ask(method, path, body)?.one_of(method, path, &[wanted])?.body)
    }

    /// Sends one request, and gives the answer.
    ///
    /// # Errors
    /// When the connection breaks, or what comes is no answer. The connection is of no use then.
    pub fn ask(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let answer = self.exchange(method, path, body);
        self.broken |= answer.is_err();
        answer
    }

    /// Whether another request may be sent: nothing broke, and the other side has not hung up.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let waits = || {
            self.stream.set_nonblocking(true)?;
            let seen = self.stream.peek(&mut [0]);
            self.stream.set_nonblocking(false)?;
            seen
        };
        // Bytes that nobody asked for are as bad as an end.
        let silent = |error: std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        !self.broken && waits().is_err_and(silent)
    }

    fn exchange(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        self.send(method, path, body)?;
        let (status, body) = self.receive()?;
        Ok(Answer { status, body })
    }

    /// Sends one request, and does not wait for the answer.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn send(&mut self, method: &str, path: &str, body: &[u8]) -> Result<()> {
        let (length, headers) = (body.len(), &self.headers);
        let mut request =
            format!("{method} {path} HTTP/1.1\r\n{headers}Content-Length: {length}\r\n\r\n")
                .into_bytes();
        request.extend_from_slice(body);
        Ok(self.stream.write_all(&request)?)
    }

    /// The answer to the oldest request that has none: its status and its body.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn receive(&mut self) -> Result<(u16, Vec<u8>)> {
        let (status, framing) = self.head()?;
        let body = match framing {
            Framing::Length(length) => self.take(length)?,
            Framing::Chunked => self.chunks()?,
        };
        Ok((status, body))
    }

    fn head(&mut self) -> Result<(u16, Framing)> {
        loop {
            if let Some((status, framing, end)) = head_of(&self.rest)? {
                self.rest.drain(..end);
                return Ok((status, framing));
            }
            self.read_more()?;
        }
    }

    fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let length = usize::from_str_radix(line.trim(), 16).context("the length of a chunk")?;
            ensure!(body.len() + length <= ANSWER_BYTES_MAX, "the answer is too long");
            let chunk = self.take(length)?;
            body.extend_from_slice(&chunk);
            // The line end after the chunk; after the last one it ends the (empty) trailers.
            self.take(2)?;
            if length == 0 {
                return Ok(body);
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.rest.windows(2).position(|two| two == b"\r\n") {
                let line = self.rest.drain(..end + 2).collect();
                return Ok(String::from_utf8(line)?);
            }
            self.read_more()?;
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.rest.len() < length {
            self.read_more()?;
        }
        Ok(self.rest.drain(..length).collect())
    }

    fn read_more(&mut self) -> Result<()> {
        let mut piece = [0u8; PIECE_BYTES];
        let count = self.stream.read(&mut piece)?;
        ensure!(count > 0, "the answer is cut off");
        ensure!(self.rest.len() < ANSWER_BYTES_MAX, "the answer is too long");
        self.rest.extend_from_slice(&piece[..count]);
        Ok(())
    }
}

/// Status, framing and length of a head, once it is there.
fn head_of(bytes: &[u8]) -> Result<Option<(u16, Framing, usize)>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let mut framing = Framing::Length(0);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            framing = Framing::Length(value.trim().parse().context("the length of an answer")?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            ensure!(value.trim().eq_ignore_ascii_case("chunked"), "an encoding: {value}");
            framing = Framing::Chunked;
        }
    }
    Ok(Some((status.context("no status")?, framing, end + 4)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// What a client makes of these bytes as an answer.
    fn answered(answer: &'static [u8], wanted: u16) -> Result<Vec<u8>> {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let serving = thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut request = [0u8; 1024];
            let count = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let mut client = Client::open(address, &[("X-One", "1")]).unwrap();
        let body = client.call("POST", "/x", b"body", wanted);
        let request = serving.join().unwrap();
        assert!(request.starts_with("POST /x HTTP/1.1\r\nHost: 127.0.0.1:"), "{request}");
        assert!(request.ends_with("X-One: 1\r\nContent-Length: 4\r\n\r\nbody"), "{request}");
        body
    }

    #[test]
    fn bodies_with_a_length_and_in_chunks() {
        let ok = |answer| answered(answer, 200).unwrap();
        assert_eq!(ok(b"HTTP/1.1 200 OK\r\nA: b\r\ncontent-length: 2\r\n\r\n{}"), b"{}");
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(ok(chunked), b"abc0123456789");
        assert_eq!(answered(b"HTTP/1.1 204 No Content\r\n\r\n", 204).unwrap(), b"");
    }

    #[test]
    fn other_answers_are_errors() {
        let error = |answer| format!("{:#}", answered(answer, 200).unwrap_err());
        let missing = error(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\ngone");
        assert_eq!(missing, "POST /x gave 404: gone");
        assert_eq!(
            error(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}"),
            "the answer is cut off"
        );
        assert_eq!(error(b"nonsense\r\n\r\n"), "no status");
        let long = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nFFFFFF\r\n";
        assert_eq!(error(long), "the answer is too long");
    }
}
