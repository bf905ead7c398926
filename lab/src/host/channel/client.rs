//! The outer end of the exec channel: sends a request, carries the streams, returns the exit code.
//!
//! Called by every verb of `mica-lab` that needs something done in the host. It never retries a
//! request by itself, because a program may not be safe to run twice.

use super::frame::{self, Kind};
use super::{Hello, Request};
use anyhow::{Context as _, Result, anyhow, bail};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

/// Loopback accepts at once or not at all.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// Where the channel is and what opens it.
#[derive(Debug, Clone)]
pub struct Channel {
    pub port: u16,
    pub token: String,
}

/// What a captured program said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    /// Both streams as text, for messages.
    pub fn text(&self) -> String {
        let mut text = String::from_utf8_lossy(&self.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&self.stderr));
        text.trim_end().to_owned()
    }
}

impl Channel {
    /// True when the host answers within `patience`.
    pub fn answers(&self, patience: Duration) -> bool {
        self.call(Request::Ping, patience).is_ok_and(|output| output.code == 0)
    }

    /// A short request without input: collects what it prints. Each read waits at most `patience`.
    pub fn call(&self, request: Request, patience: Duration) -> Result<Output> {
        let stream = self.open(request)?;
        stream.set_read_timeout(Some(patience)).context("set the read timeout")?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = receive(stream, &mut stdout, &mut stderr)?;
        Ok(Output { code, stdout, stderr })
    }

    /// Runs `argv` with `input` as its standard input and collects what it prints.
    pub fn exec_with_input(&self, argv: &[&str], mut input: impl Read) -> Result<Output> {
        let stream = self.open(exec_request(argv))?;
        let mut sender = stream.try_clone().context("clone the channel's socket")?;
        send_input(&mut sender, &mut input)
            .with_context(|| format!("send the input of `{}`", argv.join(" ")))?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = receive(stream, &mut stdout, &mut stderr)?;
        Ok(Output { code, stdout, stderr })
    }

    /// Runs `argv` with this process's own three streams and returns its exit code.
    pub fn exec_attached(&self, argv: Vec<String>) -> Result<i32> {
        let stream = self.open(Request::Exec { argv })?;
        let mut sender = stream.try_clone().context("clone the channel's socket")?;
        // Detached on purpose: it may sit in a read of a terminal when the program is done.
        thread::spawn(move || {
            if send_input(&mut sender, &mut io::stdin().lock()).is_err() {
                // The program ended without reading its input, which is its right.
            }
        });
        receive(stream, &mut io::stdout(), &mut io::stderr())
    }

    fn open(&self, request: Request) -> Result<TcpStream> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_MAX)
            .with_context(|| format!("connect to the host's exec channel at {address}"))?;
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        let hello = Hello { token: self.token.clone(), request };
        let json = serde_json::to_vec(&hello).context("encode the request")?;
        frame::write(&mut stream, Kind::Hello, &json).context("send the request to the host")?;
        Ok(stream)
    }
}

/// The request that runs `argv`.
pub fn exec_request(argv: &[&str]) -> Request {
    Request::Exec { argv: argv.iter().map(|word| (*word).to_owned()).collect() }
}

fn send_input(to: &mut TcpStream, input: &mut impl Read) -> io::Result<()> {
    let mut buffer = vec![0; frame::PAYLOAD_MAX];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return frame::write(to, Kind::StdinEnd, &[]),
            Ok(count) => frame::write(to, Kind::Stdin, &buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn receive(mut stream: TcpStream, stdout: &mut impl Write, stderr: &mut impl Write) -> Result<i32> {
    loop {
        let frame = frame::read(&mut stream)
            .context("read from the host's exec channel")?
            .ok_or_else(|| anyhow!("the host closed the exec channel before the program ended"))?;
        match frame.kind {
            Kind::Stdout => write_through(stdout, &frame.payload)?,
            Kind::Stderr => write_through(stderr, &frame.payload)?,
            Kind::Exit => {
                let code = <[u8; 4]>::try_from(frame.payload.as_slice())
                    .context("the host sent a malformed exit code")?;
                // The sender may still be in a write; nothing it says matters any more.
                if stream.shutdown(Shutdown::Both).is_err() {
                    // Closed by the other end already.
                }
                return Ok(i32::from_be_bytes(code));
            }
            Kind::Failed => bail!("{}", String::from_utf8_lossy(&frame.payload)),
            Kind::Hello | Kind::Stdin | Kind::StdinEnd => {
                bail!("the host sent a frame that only a client sends: {:?}", frame.kind)
            }
        }
    }
}

fn write_through(to: &mut impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context("write the program's output")
}
