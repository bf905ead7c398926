//! Moves a process's output to its hub, waits for its exit, and tells the end.
//!
//! Called by the service: one task per process. Refuses to end the story before the output is told,
//! except for a killed process whose output others keep open.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::time::Instant;

use super::events::end_of;
use super::messages::{Data, End};
use super::table::{InputEnd, Process, RETAIN_SECONDS, Table};

/// Largest piece of a pipe's output in one event.
const PIPE_CHUNK_BYTES: usize = 32 * 1024;

/// Largest piece of a terminal's output in one event.
const PTY_CHUNK_BYTES: usize = 16 * 1024;

/// How long the output of a killed process is still waited for: its children may hold it open.
const KILLED_DRAIN: Duration = Duration::from_millis(500);

/// What a process writes to.
#[derive(Debug)]
pub enum Output {
    /// Two pipes.
    Pipes(pipe::Receiver, pipe::Receiver),
    /// A terminal.
    Pty(Arc<AsyncFd<OwnedFd>>),
}

/// Sees a process through to its end and, a while later, out of the table.
pub async fn supervise(
    table: Arc<Table>,
    process: Arc<Process>,
    child: Child,
    output: Output,
    deadline: Option<Instant>,
) {
    let end = run_to_end(&process, child, output, deadline).await;
    process.hub.finish(end).await;
    *process.input.lock().await = InputEnd::Closed;
    tokio::time::sleep(Duration::from_secs(RETAIN_SECONDS)).await;
    table.remove(&process);
}

async fn run_to_end(
    process: &Process,
    mut child: Child,
    output: Output,
    deadline: Option<Instant>,
) -> End {
    let is_pty = matches!(output, Output::Pty(_));
    let told = tell_all(process, output);
    tokio::pin!(told);
    let mut all_told = false;
    let mut deadline = deadline;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut told, if !all_told => all_told = true,
            () = at(deadline) => {
                deadline = None;
                // It may be gone this moment, and then its exit comes next.
                drop(process.signal(Signal::KILL));
            }
        }
    };
    if is_pty {
        // The terminal hangs up with the leader of its session; nothing more comes.
        process.killed.notify_one();
    }
    if !all_told {
        tokio::select! {
            () = told => {}
            () = at(deadline) => {}
            () = async {
                process.killed.notified().await;
                tokio::time::sleep(KILLED_DRAIN).await;
            } => {}
        }
    }
    status.map(end_of).unwrap_or_else(|error| End {
        exit_code: -1,
        exited: false,
        status: "unknown".to_owned(),
        error: Some(format!("cannot learn how the process ended: {error}")),
    })
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn tell_all(process: &Process, output: Output) {
    match output {
        Output::Pipes(stdout, stderr) => {
            tokio::join!(
                tell_pipe(process, stdout, Data::Stdout),
                tell_pipe(process, stderr, Data::Stderr)
            );
        }
        Output::Pty(pty) => tell_pty(process, &pty).await,
    }
}

async fn tell_pipe(process: &Process, mut pipe: impl AsyncRead + Unpin, data: fn(Vec<u8>) -> Data) {
    let mut buffer = vec![0; PIPE_CHUNK_BYTES];
    // A pipe that fails is a pipe that has ended: there is nothing more to tell.
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        process.hub.publish(data(buffer[..length].to_vec())).await;
    }
}

async fn tell_pty(process: &Process, pty: &AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; PTY_CHUNK_BYTES];
    // The master reads EIO once nobody has the terminal open: its way to say the end.
    while let Ok(length @ 1..) = read_pty(pty, &mut buffer).await {
        process.hub.publish(Data::Pty(buffer[..length].to_vec())).await;
    }
}

async fn read_pty(pty: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        let mut ready = pty.readable().await?;
        let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?));
        match read {
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Writes all of `bytes` to a terminal.
///
/// # Errors
/// When nobody has the terminal open.
pub async fn write_pty(pty: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = pty.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(written)) => bytes = bytes.get(written..).unwrap_or_default(),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
