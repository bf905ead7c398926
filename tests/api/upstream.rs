//! Servers for sandboxes to have: the stand-in's agent connects to this machine's loopback.
//!
//! Called by the proxy tests. Each takes one connection and does exactly what the test says.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};

use crate::client::PATIENCE;

/// A server with one connection to serve.
pub struct Upstream<T> {
    pub port: u16,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Upstream<T> {
    /// Serves the first connection with `handle`.
    pub fn start(handle: impl FnOnce(Served) -> T + Send + 'static) -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").expect("a port"), handle)
    }

    /// The same on a port of its own, for what goes to one.
    pub fn start_on_port(port: u16, handle: impl FnOnce(Served) -> T + Send + 'static) -> Self {
        Self::start_on(TcpListener::bind(("127.0.0.1", port)).expect("a port"), handle)
    }

    /// Serves the first connection of `listener` with `handle`.
    pub fn start_on(
        listener: TcpListener,
        handle: impl FnOnce(Served) -> T + Send + 'static,
    ) -> Self {
        let port = listener.local_addr().expect("an address").port();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            handle(Served { reader: BufReader::new(stream) })
        });
        Self { port, thread }
    }

    /// What the handler returned.
    pub fn join(self) -> T {
        match self.thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// The server's end of a connection.
pub struct Served {
    reader: BufReader<TcpStream>,
}

impl Served {
    /// The request head, line by line, in lower case.
    pub fn head(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.reader.read_line(&mut line).expect("a line"), 0, "after {lines:?}");
            match line.trim_end() {
                "" => return lines,
                line => lines.push(line.to_ascii_lowercase()),
            }
        }
    }

    /// The next bytes, as they come.
    pub fn some(&mut self) -> Vec<u8> {
        let data = self.reader.fill_buf().expect("bytes").to_vec();
        self.reader.consume(data.len());
        data
    }

    /// Reads until the text `end` has come, and gives everything up to it.
    pub fn until(&mut self, end: &str) -> String {
        let mut text = String::new();
        while !text.contains(end) {
            let data = self.some();
            assert!(!data.is_empty(), "the stream ended after {text:?}");
            text.push_str(&String::from_utf8_lossy(&data));
        }
        text
    }

    pub fn exactly(&mut self, count: usize) -> Vec<u8> {
        let mut data = vec![0; count];
        self.reader.read_exact(&mut data).expect("the bytes");
        data
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.reader.get_mut().write_all(bytes.as_ref()).expect("send");
        self
    }

    /// As [`Self::send`], where the other end may hang up in the middle.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes.as_ref())
    }

    /// Closes the writing direction.
    pub fn finish(&mut self) {
        self.reader.get_mut().shutdown(std::net::Shutdown::Write).expect("shutdown");
    }

    /// Waits for the other end to go. Panics when it does not within the patience.
    pub fn until_gone(&mut self) {
        let mut scratch = Vec::new();
        match self.reader.read_to_end(&mut scratch) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the other end is still there: {error}"),
        }
    }
}

/// A gate that a test opens for its server.
pub fn gate() -> (impl FnOnce() + Send, Receiver<()>) {
    let (sender, receiver) = channel();
    (move || sender.send(()).expect("somebody waits"), receiver)
}
