//! How an exit status is told.
//!
//! Called by the supervisor. Words and codes are those that clients compare.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::messages::End;

/// The end event of an exit status.
#[must_use]
pub fn end_of(status: ExitStatus) -> End {
    let (exit_code, words) = match (status.code(), status.signal()) {
        (Some(code), _) => (code, format!("exit status {code}")),
        (None, Some(signal)) => {
            let dumped = if status.core_dumped() { " (core dumped)" } else { "" };
            (-1, format!("signal: {}{dumped}", signal_words(signal)))
        }
        (None, None) => (-1, "unknown".to_owned()),
    };
    End {
        exit_code,
        exited: status.code().is_some(),
        error: (exit_code != 0).then(|| words.clone()),
        status: words,
    }
}

/// The words of a signal number on Linux.
fn signal_words(signal: i32) -> String {
    let words = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        31 => "bad system call",
        other => return format!("signal {other}"),
    };
    words.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_the_words_clients_compare() {
        let end = |raw| end_of(ExitStatus::from_raw(raw));
        assert_eq!(
            end(0),
            End { exit_code: 0, exited: true, status: "exit status 0".to_owned(), error: None }
        );
        let three = end(3 << 8);
        assert_eq!((three.exit_code, three.exited), (3, true));
        assert_eq!(three.error.as_deref(), Some("exit status 3"));
        let killed = end(9);
        assert_eq!((killed.exit_code, killed.exited), (-1, false));
        assert_eq!(killed.status, "signal: killed");
        assert_eq!(killed.error.as_deref(), Some("signal: killed"));
        assert_eq!(end(64).status, "signal: signal 64");
        assert_eq!(end(6 | 0x80).status, "signal: aborted (core dumped)");
    }
}
