//! What is done inside a sandbox: commands through envd, cells through the code interpreter.
//!
//! Called by the tables. Refuses every answer but the right one: a benchmark of errors is fast.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::host::{Host, Sandbox, Timed};
use crate::engine::client::Client;

/// Where envd listens.
const ENVD: u16 = 49983;
/// Where the code interpreter listens.
const INTERPRETER: u16 = 49999;
/// The flag of the frame that ends a stream, in Connect's protocol.
const END_OF_STREAM: u8 = 2;
/// The error of a cell whose kernel did not come up: a language that the template has a part of.
const UNAVAILABLE: &str = "KernelUnavailable";
/// Flag and length, before each frame.
const FRAME_HEAD_BYTES: usize = 5;

/// A connection to a sandbox's envd.
///
/// # Errors
/// When nobody listens.
pub fn envd(host: &Host, sandbox: &Sandbox) -> Result<Client> {
    host.to_sandbox(sandbox, ENVD, "application/connect+json")
}

/// A connection to a sandbox's code interpreter.
///
/// # Errors
/// When nobody listens.
pub fn interpreter(host: &Host, sandbox: &Sandbox) -> Result<Client> {
    host.to_sandbox(sandbox, INTERPRETER, "application/json")
}

/// Runs a line of bash over such a connection; it must end with 0.
pub fn command(client: &mut Client, line: &str) -> Timed<()> {
    run(client, line, &[]).and_then(|_| Ok(()))
}

/// Runs a Python program with arguments over such a connection; it must end with 0. Gives what it printed.
///
/// # Errors
/// When it does not, or printed no text.
pub fn python(client: &mut Client, program: &str, args: &[&str]) -> Result<String> {
    // A template may have no Python but its code interpreter's.
    let line = "PATH=\"$PATH:/opt/mica/python/bin\"; exec python3 -c \"$0\" \"$@\"";
    let printed = run(client, line, &[&[program], args].concat()).value?;
    String::from_utf8(printed).context("a program that printed no text")
}

/// Runs a line of bash, whose `$0` and so on are `args`. Gives what it printed.
fn run(client: &mut Client, line: &str, args: &[&str]) -> Timed<Vec<u8>> {
    let args = [&["-l", "-c", line], args].concat();
    let request = json!({ "process": { "cmd": "/bin/bash", "args": args }, "stdin": false });
    let body = frame(request.to_string().as_bytes());
    let (begun, answer) =
        (Instant::now(), client.call("POST", "/process.Process/Start", &body, 200));
    let took = begun.elapsed();
    let value = answer.and_then(|answer| {
        let said = || format!("`{line}` said {}", String::from_utf8_lossy(&answer));
        ended_well(&answer).with_context(said)
    });
    Timed { begun, took, value }
}

/// One frame of Connect's streams.
fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

/// The frames of a process must end with exit code 0, and the stream without an error. Gives its output.
fn ended_well(mut answer: &[u8]) -> Result<Vec<u8>> {
    let (mut exited, mut printed) = (false, Vec::new());
    loop {
        let (head, rest) = answer.split_at_checked(FRAME_HEAD_BYTES).context("no last frame")?;
        let [flag, length @ ..] = <[u8; FRAME_HEAD_BYTES]>::try_from(head)?;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        let (message, rest) = rest.split_at_checked(length).context("a frame is cut off")?;
        let message: Value = serde_json::from_slice(message).context("a frame is not JSON")?;
        if flag & END_OF_STREAM != 0 {
            ensure!(message["error"].is_null(), "the stream ended with an error");
            ensure!(exited, "the process did not end with 0");
            return Ok(printed);
        }
        if let Some(text) = message["event"]["data"]["stdout"].as_str() {
            printed.extend(STANDARD.decode(text).context("output that is not base64")?);
        }
        let end = &message["event"]["end"];
        // Zero is left out.
        exited |= end["exited"] == true && end["exitCode"].as_i64().unwrap_or(0) == 0;
        answer = rest;
    }
}

/// The file that memory is filled with. By the sandbox's name, because a stand-in's guests share a machine.
fn filler(sandbox: &Sandbox) -> String {
    format!("/dev/shm/mica-bench-{}", sandbox.id)
}

/// Writes so many megabytes (MiB) of one letter to the guest's shared memory, as CubeSandbox's scripts do it.
///
/// # Errors
/// When the guest has not so much room. There it went unnoticed.
pub fn fill(host: &Host, sandbox: &Sandbox, megabytes: u32) -> Result<()> {
    let file = filler(sandbox);
    let line = format!(
        "head -c {megabytes}M /dev/zero | tr '\\0' x > {file} && \
         test $(stat -c %s {file}) = $(({megabytes} << 20)) || {{ rm -f {file}; exit 1; }}"
    );
    command(&mut envd(host, sandbox)?, &line)
        .value
        .with_context(|| format!("write {megabytes} MB to the guest's /dev/shm; has it room?"))
}

/// Takes it away again, so that a stand-in's machine has it back.
///
/// # Errors
/// When the guest does not answer.
pub fn empty(host: &Host, sandbox: &Sandbox) -> Result<()> {
    command(&mut envd(host, sandbox)?, &format!("rm -f {}", filler(sandbox))).value
}

/// What came of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// It ran, and this is what it wrote.
    Ran(String),
    /// The template has no kernel for the language; what was said.
    NoKernel(String),
}

/// Runs a cell over such a connection.
pub fn cell(client: &mut Client, language: &str, code: &str) -> Timed<Cell> {
    execute(client, &json!({ "code": code, "language": language }))
}

fn execute(client: &mut Client, body: &Value) -> Timed<Cell> {
    let body = body.to_string();
    let (begun, answer) = (Instant::now(), client.ask("POST", "/execute", body.as_bytes()));
    let took = begun.elapsed();
    let value = answer.and_then(|answer| match answer.status {
        200 => written(&answer.body),
        400 => Ok(Cell::NoKernel(String::from_utf8_lossy(&answer.body).into_owned())),
        status => bail!("/execute gave {status}: {}", String::from_utf8_lossy(&answer.body)),
    });
    Timed { begun, took, value }
}

/// What a cell wrote to its output, and its results.
fn written(answer: &[u8]) -> Result<Cell> {
    let mut text = String::new();
    let mut ended = false;
    for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let event: Value = serde_json::from_slice(line).context("a line that is not JSON")?;
        match event["type"].as_str() {
            Some("stdout" | "result") => text += event["text"].as_str().unwrap_or_default(),
            Some("error") if event["name"] == UNAVAILABLE => {
                return Ok(Cell::NoKernel(event["value"].as_str().unwrap_or_default().to_owned()));
            }
            Some("error") => {
                return Err(anyhow!("the cell failed: {}: {}", event["name"], event["value"]));
            }
            Some("end_of_execution") => ended = true,
            _ => {}
        }
    }
    ensure!(ended, "the cell did not end");
    Ok(Cell::Ran(text))
}

/// A cell whose output must have this in it.
pub fn cell_that_says(client: &mut Client, language: &str, code: &str, wanted: &str) -> Timed<()> {
    cell(client, language, code).and_then(|cell| says(&cell, wanted))
}

/// A cell of the language that sandboxes run where none is named. What it writes must be this, and nothing else.
pub fn code(client: &mut Client, code: &str, wanted: &str) -> Timed<()> {
    execute(client, &json!({ "code": code })).and_then(|cell| match cell {
        Cell::Ran(text) if text == wanted => Ok(()),
        cell => Err(anyhow!("{code} gave {cell:?}, and not {wanted:?}")),
    })
}

/// # Errors
/// When the cell did not say it.
pub fn says(cell: &Cell, wanted: &str) -> Result<()> {
    match cell {
        Cell::Ran(text) if text.contains(wanted) => Ok(()),
        Cell::Ran(text) => Err(anyhow!("the cell said {text:?}, and not {wanted:?}")),
        Cell::NoKernel(said) => Err(anyhow!("no kernel: {said}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_says_what_it_wrote_and_must_end() {
        let out =
            b"{\"type\":\"stdout\",\"text\":\"Hello\\n\"}\n{\"type\":\"result\",\"text\":\"55\"}\n";
        let end = b"{\"type\":\"end_of_execution\"}\n";
        let ran = Cell::Ran("Hello\n55".to_owned());
        assert_eq!(written(&[out.as_slice(), end].concat()).unwrap(), ran);
        assert!(written(out).is_err());
        let error = b"{\"type\":\"error\",\"name\":\"NameError\",\"value\":\"x\"}\n";
        assert!(
            written(&[error.as_slice(), end].concat())
                .unwrap_err()
                .to_string()
                .contains("NameError")
        );
        let down = b"{\"type\":\"error\",\"name\":\"KernelUnavailable\",\"value\":\"no jar\"}\n";
        let none = Cell::NoKernel("no jar".to_owned());
        assert_eq!(written(&[down.as_slice(), end].concat()).unwrap(), none);
        assert!(says(&Cell::Ran("55".to_owned()), "55").is_ok());
        assert!(says(&Cell::Ran("54".to_owned()), "55").is_err());
        assert!(says(&Cell::NoKernel("no r".to_owned()), "55").is_err());
    }

    #[test]
    fn only_a_command_that_ended_with_0_counts() {
        let last = |text: &[u8]| {
            let mut bytes = frame(text);
            bytes[0] = END_OF_STREAM;
            bytes
        };
        let stream = |end: &[u8], finish: &[u8]| {
            [frame(br#"{"event":{"start":{"pid":7}}}"#), frame(end), last(finish)].concat()
        };
        let good = br#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#;
        assert_eq!(ended_well(&stream(good, b"{}")).unwrap(), b"");
        let data = br#"{"event":{"data":{"stdout":"NDIK"}}}"#;
        let printed = [frame(data), stream(good, b"{}")].concat();
        assert_eq!(ended_well(&printed).unwrap(), b"42\n");
        let failed = br#"{"event":{"end":{"exited":true,"exitCode":3}}}"#;
        assert!(ended_well(&stream(failed, b"{}")).is_err());
        assert!(ended_well(&stream(good, br#"{"error":{"code":"internal"}}"#)).is_err());
        let whole = stream(good, b"{}");
        for end in 0..whole.len() {
            assert!(ended_well(&whole[..end]).is_err(), "cut at {end}");
        }
    }
}
