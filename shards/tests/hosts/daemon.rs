//! The double as a daemon of its own, that can be told what to do and be killed.
//!
//! Called by `restart`. Refuses to outlive its test.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::common::{DOUBLE, Places};

pub struct Daemon {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    lines: usize,
}

impl Daemon {
    /// Starts one; with `keep`, running sandboxes outlive it also when it is told to stop.
    pub fn start(places: &Places, keep: bool) -> Self {
        Self::start_with(places, keep, 0, false)
    }

    /// The same, where images of more than so many MiB are restored on demand, or VM processes tell what
    /// was written.
    pub fn start_with(
        places: &Places,
        keep: bool,
        on_demand_over_mib: u32,
        log_writes: bool,
    ) -> Self {
        let mut child = Command::new(DOUBLE)
            .arg("daemon")
            .args([places.store(), places.cgroup.clone(), places.program()])
            .arg(if keep { "keep" } else { "end" })
            .arg(on_demand_over_mib.to_string())
            .arg(if log_writes { "log" } else { "scan" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Self { child, stdin, stdout, lines: 0 };
        assert_eq!(daemon.line(), "ready");
        daemon
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Begins to do what a line says.
    pub fn begin(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.lines += 1;
    }

    /// Does what a line says, and waits for it; no other may be under way.
    pub fn tell(&mut self, line: &str) -> String {
        let number = self.lines;
        self.begin(line);
        let said = self.line();
        let done = said.strip_prefix(&format!("{number} ok ")).map(str::to_owned);
        done.unwrap_or_else(|| panic!("{line}: {said}"))
    }

    /// As a power cut would end it, if the machine went on.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// As an operator ends it.
    pub fn stop(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail where it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
