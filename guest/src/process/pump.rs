//! Moves a process's output to its hub, waits for its exit, and tells the end.
//!
//! Called by the service: one task per process. Refuses to end the story before the output is told,
//! except for a killed process whose output others keep open.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::AsyncReadExt as _;
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
    Pty(pipe::Receiver),
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
    process.hub.finish(&end);
    process.close_terminal();
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
                tell_pipe(process, stdout, PIPE_CHUNK_BYTES, Data::Stdout),
                tell_pipe(process, stderr, PIPE_CHUNK_BYTES, Data::Stderr)
            );
        }
        Output::Pty(pty) => tell_pipe(process, pty, PTY_CHUNK_BYTES, Data::Pty).await,
    }
}

async fn tell_pipe(
    process: &Process,
    mut pipe: pipe::Receiver,
    chunk_bytes: usize,
    data: fn(Vec<u8>) -> Data,
) {
    let mut buffer = vec![0; chunk_bytes];
    // One that fails has ended: a terminal's master reads EIO once nobody has the terminal open.
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        process.hub.publish(data(buffer[..length].to_vec())).await;
    }
}
