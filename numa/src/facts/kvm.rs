//! Whether this machine's KVM can run a Linux guest.
//!
//! Called by the binary, before `mica serve` starts anything, and by [`super::Facts`]. Refuses to try: a guest
//! that crawls or hangs tells less than a sentence.

use std::fmt;
use std::fs::OpenOptions;
use std::io;

/// What `/dev/kvm` is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// Intel VT-x: runs anything.
    Vmx,
    /// AMD-V: runs anything.
    Svm,
    /// KVM without processor support (PVM): the tiny guest runs, a stock kernel does not.
    Pvm,
    /// There is none, and why.
    Missing(String),
}

impl KvmKind {
    /// Looks at this machine.
    ///
    /// # Errors
    /// When `/proc/cpuinfo` cannot be read.
    pub fn detect() -> io::Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        Ok(Self::from(&cpuinfo, Self::try_device()))
    }

    /// Whether this machine's `/dev/kvm` opens.
    ///
    /// # Errors
    /// Why not.
    pub fn try_device() -> Result<(), io::ErrorKind> {
        let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        opened.map(drop).map_err(|error| error.kind())
    }

    /// In a word.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
            Self::Pvm => "pvm",
            Self::Missing(_) => "none",
        }
    }

    /// What processors with this `/proc/cpuinfo` and a `/dev/kvm` that opens so are good for.
    #[must_use]
    pub fn from<T>(cpuinfo: &str, device: Result<T, io::ErrorKind>) -> Self {
        if let Err(kind) = device {
            return Self::Missing(match kind {
                io::ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "/dev/kvm may not be opened by this user".to_owned()
                }
                kind => format!("/dev/kvm does not open: {kind}"),
            });
        }
        let flag = |wanted| {
            cpuinfo
                .lines()
                .filter(|line| line.starts_with("flags"))
                .any(|line| line.split_ascii_whitespace().any(|flag| flag == wanted))
        };
        match (flag("vmx"), flag("svm")) {
            (true, _) => Self::Vmx,
            (_, true) => Self::Svm,
            _ => Self::Pvm,
        }
    }

    /// Whether a stock Linux guest runs on it.
    #[must_use]
    pub fn runs_linux(&self) -> bool {
        matches!(self, Self::Vmx | Self::Svm)
    }
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmx => f.write_str("KVM on Intel VT-x"),
            Self::Svm => f.write_str("KVM on AMD-V"),
            Self::Pvm => f.write_str(
                "/dev/kvm works, but the processor shows neither vmx nor svm: this is PVM, which \
                 cannot run a stock Linux kernel at speed",
            ),
            Self::Missing(why) => write!(f, "no KVM: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_device_decide() {
        let kind = |flags: &str| KvmKind::from(&format!("model name\t: vmx\n{flags}\n"), Ok(()));
        assert_eq!(kind("flags\t\t: fpu vmx sse"), KvmKind::Vmx);
        assert_eq!(kind("flags\t\t: fpu svm sse"), KvmKind::Svm);
        assert_eq!(kind("flags\t\t: fpu svm_lock sse"), KvmKind::Pvm);
        assert_eq!(kind("vmx flags\t: vnmi"), KvmKind::Pvm);
        let missing = |kind: io::ErrorKind| KvmKind::from::<()>("flags: vmx", Err(kind));
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied] {
            assert!(!missing(kind).runs_linux());
        }
        assert!(KvmKind::Vmx.runs_linux() && KvmKind::Svm.runs_linux());
        assert!(!KvmKind::Pvm.runs_linux());
    }
}
