//! The same operations as an HTTP client sees them: a daemon as a child, and one connection to it.
//!
//! Called by the benchmark's program. The client is a few lines over one kept-alive loopback connection, so
//! that next to nothing of the time is its own. Refuses every answer but the one expected.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::floor::Floor;
use super::place::{Places, TEMPLATE};
use super::series::Book;

/// Shells that the daemon keeps.
const POOL: usize = 8;
/// Longest wait for the daemon.
const PATIENCE: Duration = Duration::from_secs(60);
/// For so long no VM process may have run before a round begins.
const QUIET: Duration = Duration::from_millis(10);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Creates and ends over HTTP. One round more warms up.
///
/// # Errors
/// When the daemon does not come up, or answers anything but success.
pub fn creates(
    places: &Places,
    mica: &Path,
    floor: &Floor,
    book: &mut Book,
    rounds: u32,
) -> Result<()> {
    let daemon = Daemon::start(places, mica)?;
    let mut client = daemon.client()?;
    let body = format!(r#"{{"templateID":"{TEMPLATE}","timeout":3600,"secure":false}}"#);
    for round in 0..=rounds {
        let life = floor.life()?;
        daemon.quiet()?;
        let begun = Instant::now();
        let answer = client.call("POST", "/sandboxes", &body, 201)?;
        let create = begun.elapsed();
        let made: serde_json::Value = serde_json::from_str(&answer)?;
        let id = made["sandboxID"].as_str().context("an answer without an id")?;
        daemon.quiet()?;
        let path = format!("/sandboxes/{id}");
        let begun = Instant::now();
        client.call("DELETE", &path, "", 204)?;
        let destroy = begun.elapsed();
        if round > 0 {
            book.add("create_http", create, life.hit);
            book.add("destroy_http", destroy, life.destroy);
        }
    }
    Ok(())
}

/// `mica serve` on the store of the benchmark.
struct Daemon {
    child: Child,
    address: SocketAddr,
    keys: PathBuf,
    cgroup: PathBuf,
}

impl Daemon {
    fn start(places: &Places, mica: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let keys = places.root().join("keys");
        let mut command = Command::new(mica);
        command
            .args(["serve", "--accept-unusable-kvm", "--without-cgroup-limits", "--shards", "1"])
            .args(["--listen", &address.to_string()])
            .args(["--pool-min", &POOL.to_string(), "--pool-max", &POOL.to_string()])
            .args(["--uid-first", "700000"])
            .arg("--store")
            .arg(places.store())
            .arg("--key-file")
            .arg(&keys)
            .arg("--cgroup-root")
            .arg(&places.cgroup)
            .arg("--vm-program")
            .arg(places.vm_program())
            .env("MICA_LOG", "error")
            .stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("run {}", mica.display()))?;
        let mut daemon = Self { child, address, keys, cgroup: places.cgroup.clone() };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(daemon.address).is_err() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("mica serve ended with {status}");
            }
            ensure!(Instant::now() < deadline, "mica serve does not listen");
            thread::sleep(QUIET);
        }
        Ok(daemon)
    }

    fn client(&self) -> Result<Client> {
        let keys = fs::read_to_string(&self.keys).context("read the keys")?;
        let key = keys.lines().find(|line| !line.is_empty() && !line.starts_with('#'));
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let head = format!(
            "Host: {}\r\nX-API-Key: {}\r\nContent-Type: application/json\r\n",
            self.address,
            key.context("no key")?.trim()
        );
        Ok(Client { stream, head })
    }

    /// Waits until the pool is full and no VM process does anything.
    fn quiet(&self) -> Result<()> {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            let groups = fs::read_dir(&self.cgroup)?.flatten().filter(is_dir).count();
            let used = fs::read_to_string(self.cgroup.join("cpu.stat"))?;
            let used = used.lines().next().map(str::to_owned);
            if groups >= POOL && used.is_some() && used == last {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "the daemon's pool does not come to rest");
            last = used;
            thread::sleep(QUIET);
        }
    }

    /// Asks it to stop, and waits for a bounded time.
    fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("no number")?, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("mica serve did not end in time and was killed");
            }
            thread::sleep(QUIET);
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("mica-bench: {error:#}");
        }
    }
}

/// One connection.
struct Client {
    stream: TcpStream,
    head: String,
}

impl Client {
    /// Sends one request and reads its answer's body.
    fn call(&mut self, method: &str, path: &str, body: &str, wanted: u16) -> Result<String> {
        let length = body.len();
        let head = &self.head;
        let request =
            format!("{method} {path} HTTP/1.1\r\n{head}Content-Length: {length}\r\n\r\n{body}");
        self.stream.write_all(request.as_bytes())?;
        let (status, body) = self.answer()?;
        ensure!(status == wanted, "{method} {path} gave {status}: {body}");
        Ok(body)
    }

    fn answer(&mut self) -> Result<(u16, String)> {
        let mut bytes = Vec::new();
        let mut piece = [0u8; 4096];
        loop {
            if let Some((status, at, length)) = head_of(&bytes)? {
                let body = bytes.get(at..at + length);
                if let Some(body) = body {
                    return Ok((status, String::from_utf8(body.to_vec())?));
                }
            }
            let count = self.stream.read(&mut piece)?;
            ensure!(count > 0 && bytes.len() < ANSWER_BYTES_MAX, "the answer is cut off");
            bytes.extend_from_slice(&piece[..count]);
        }
    }
}

/// Status, start and length of the body, once the head is there.
fn head_of(bytes: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end])?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let lengths = lines.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") { value.trim().parse().ok() } else { None }
    });
    Ok(Some((status.context("no status")?, end + 4, lengths.last().unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_say_where_the_body_is() {
        let answer = b"HTTP/1.1 201 Created\r\nA: b\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(head_of(answer).unwrap(), Some((201, answer.len() - 2, 2)));
        assert_eq!(head_of(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap(), Some((204, 27, 0)));
        assert_eq!(head_of(&answer[..30]).unwrap(), None);
        assert!(head_of(b"nonsense\r\n\r\n").is_err());
    }
}
