//! The server that every request ends at.
//!
//! Called by the benchmark, and reached by the stand-in over loopback. Answers three paths: `/` at once,
//! `/stream` with a head and a first chunk and no more, `/socket` with a switch of protocols. Refuses to
//! parse more than that.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;

/// What `/` says.
pub const BODY: &str = "hello from a sandbox";
/// Threads that take connections: as many requests as may wait for a thread at once, and more.
const THREADS: usize = 8;

const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n";
const SWITCH: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi";

/// A running server.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    held: Arc<Mutex<Vec<TcpStream>>>,
}

impl Server {
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let held: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        for _ in 0..THREADS {
            let (listener, held) = (listener.try_clone()?, Arc::clone(&held));
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client that goes is the end of its connection and of nothing else.
                    if let Ok(Some(idle)) = serve(stream) {
                        held.lock().unwrap_or_else(PoisonError::into_inner).push(idle);
                    }
                }
            });
        }
        Ok(Self { address, held })
    }

    /// Lets go of the streams that are held idle.
    pub fn release(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Serves a connection; gives it back if it is to stay idle.
fn serve(mut stream: TcpStream) -> std::io::Result<Option<TcpStream>> {
    stream.set_nodelay(true)?;
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len());
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        filled += count;
        if count == 0 {
            return Ok(None);
        }
        if !buffer[..filled].ends_with(b"\r\n\r\n") {
            continue;
        }
        let idle = match &buffer[..filled] {
            head if head.starts_with(b"GET /stream ") => STREAM,
            head if head.starts_with(b"GET /socket ") => SWITCH,
            _ => {
                stream.write_all(answer.as_bytes())?;
                filled = 0;
                continue;
            }
        };
        stream.write_all(idle)?;
        return Ok(Some(stream));
    }
}
