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

#[cfg(test)]
mod tests {
    use super::*;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use tokio::process::Command;

    use super::super::messages::{ProcessConfig, Selector};

    fn process_of(child: &Child) -> Arc<Process> {
        let pid = child.id().unwrap();
        let raw = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        Arc::new(Process {
            pid,
            tag: None,
            config: ProcessConfig::default(),
            pidfd: pidfd_open(raw, PidfdFlags::empty()).unwrap(),
            hub: Default::default(),
            input: tokio::sync::Mutex::new(InputEnd::Closed),
            terminal: Default::default(),
            killed: Default::default(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn an_ended_process_is_forgotten_after_its_time() {
        let child = Command::new("true").spawn().unwrap();
        let (process, table) = (process_of(&child), Arc::new(Table::default()));
        table.add(Arc::clone(&process));
        // Nobody writes to them.
        let ((_, stdout), (_, stderr)) = (pipe::pipe().unwrap(), pipe::pipe().unwrap());
        let output = Output::Pipes(stdout, stderr);
        let supervised = supervise(Arc::clone(&table), Arc::clone(&process), child, output, None);
        let supervised = tokio::spawn(supervised);
        process.hub.ended().await;
        let (ended, selector) = (Instant::now(), Selector::Pid(process.pid));
        tokio::time::sleep(Duration::from_secs(RETAIN_SECONDS - 1)).await;
        assert!(table.find(&selector).is_ok(), "its exit can still be asked for");
        supervised.await.unwrap();
        assert_eq!(ended.elapsed().as_secs(), RETAIN_SECONDS);
        assert!(table.find(&selector).is_err(), "it is forgotten");
    }
}
