//! A small HTTP/1.1 client that sends exactly the bytes it is told to.
//!
//! Called by every test. Refuses to be helpful: no redirects, no retries, no decoding beyond chunks.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// No answer takes this long, on a busy machine either.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// One connection.
pub struct Connection {
    reader: BufReader<TcpStream>,
}

/// One answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case. The last of several wins.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
    }

    /// Checks that it is an error in the form that SDKs read, and gives its message.
    pub fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let json = self.json();
        assert_eq!(json["code"], status, "{json}");
        json["message"].as_str().expect("an error has a message").to_owned()
    }
}

impl Connection {
    pub fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("nodelay");
        Self { reader: BufReader::new(stream) }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.reader.get_mut().write_all(bytes.as_ref()).expect("send");
        self
    }

    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// Reads a status line and headers.
    pub fn head(&mut self) -> (u16, BTreeMap<String, String>) {
        let line = self.line();
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status in {line:?}"));
        let mut headers = BTreeMap::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                return (status, headers);
            }
            let (name, value) = line.split_once(':').expect("a header");
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }

    /// Reads one chunk; `None` at the last one.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line();
        let size = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("a size: {line:?}"));
        if size == 0 {
            return None;
        }
        let mut data = vec![0; size + 2];
        self.reader.read_exact(&mut data).expect("a chunk");
        data.truncate(size);
        Some(data)
    }

    /// Reads lines up to the empty one: the trailers after the last chunk.
    pub fn trailers(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            match self.line() {
                line if line.is_empty() => return lines,
                line => lines.push(line),
            }
        }
    }

    /// Reads a whole answer to a request that was not HEAD.
    pub fn reply(&mut self) -> Reply {
        let (status, headers) = self.head();
        let mut body = Vec::new();
        if let Some(length) = headers.get("content-length") {
            body.resize(length.parse().expect("a length"), 0);
            self.reader.read_exact(&mut body).expect("the body");
        } else if headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            while let Some(chunk) = self.chunk() {
                body.extend(chunk);
            }
            self.trailers();
        }
        Reply { status, headers, body }
    }

    /// Fills `buffer`.
    pub fn exactly(&mut self, buffer: &mut [u8]) {
        self.reader.read_exact(buffer).expect("the bytes");
    }

    /// Reads to the end of the connection, which must come within the patience.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.reader.read_to_end(&mut rest) {
            Ok(_) => rest,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => rest,
            Err(error) => panic!("the connection did not end: {error}"),
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).expect("a line");
        assert_ne!(count, 0, "the connection ended where a line should be");
        line.truncate(line.trim_end_matches(['\r', '\n']).len());
        line
    }
}
