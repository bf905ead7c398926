//! Runs programs of the outer machine, with errors that name the step.
//!
//! Used by every part of the lab that calls one. Output is kept for the error message, and long
//! steps say each few seconds how far they are. It runs nothing through a shell.

use super::progress;
use anyhow::{Context as _, Result, anyhow, bail};
use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How much of a failed program's output an error shows.
const LINES_KEPT: usize = 15;
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Runs a short program and returns its standard output.
pub fn capture(step: &str, command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{step}: cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{step}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{step}: its output is not UTF-8"))
}

/// Runs a long program, shows that it moves, and keeps the end of its output for the error.
pub fn watched(step: &str, command: &mut Command) -> Result<()> {
    let started = Instant::now();
    let program = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{step}: cannot run {program}"))?;
    let (sender, receiver) = mpsc::sync_channel::<String>(64);
    let streams: [Option<Box<dyn std::io::Read + Send>>; 2] = [
        child.stdout.take().map(|pipe| Box::new(pipe) as Box<_>),
        child.stderr.take().map(|pipe| Box::new(pipe) as Box<_>),
    ];
    for stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    drop(sender);
    let kept = follow(step, started, &receiver);
    let status = child.wait().with_context(|| format!("{step}: wait for {program}"))?;
    if status.success() {
        progress::say(&format!("{step}: {:.1} s", started.elapsed().as_secs_f64()));
        return Ok(());
    }
    let tail = kept.into_iter().collect::<Vec<_>>().join("\n    ");
    Err(anyhow!("{program}: {status}; it said:\n    {tail}")).context(step.to_owned())
}

/// Reads lines until both streams end. Returns the last few.
fn follow(step: &str, started: Instant, lines: &mpsc::Receiver<String>) -> VecDeque<String> {
    let mut kept = VecDeque::with_capacity(LINES_KEPT);
    let mut shown = Instant::now();
    loop {
        match lines.recv_timeout(PROGRESS_EVERY) {
            Ok(line) => {
                if kept.len() == LINES_KEPT {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return kept,
        }
        if shown.elapsed() >= PROGRESS_EVERY {
            shown = Instant::now();
            let line = kept.back().map_or("", String::as_str);
            progress::say(&format!("{step}: {:.0} s … {line}", started.elapsed().as_secs_f64()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_step_and_shows_the_end_of_the_output() {
        let mut command = Command::new("sh");
        command.args(["-c", "seq 1 40; echo broken >&2; exit 3"]);
        let error = format!("{:#}", watched("make a thing", &mut command).unwrap_err());
        assert!(error.starts_with("make a thing: "), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("40") || error.contains("broken"), "{error}");
        assert!(!error.contains("\n    1\n"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = capture("look", &mut Command::new("/nonexistent/prog")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/prog"), "{error}");
    }
}
