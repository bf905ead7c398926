//! What a lab remembers between commands: one directory per name, one JSON file in it.
//!
//! Every verb reads it. Whether the lab runs is never taken from a file alone: the process that
//! the pid file names must be a QEMU that was started with this directory's own socket.

use super::channel::client::Channel;
use super::options::{self, Shape};
use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The names of the files of one lab.
#[derive(Debug, Clone)]
pub struct Home {
    pub name: String,
    pub directory: PathBuf,
}

/// What `up` decided. Written when QEMU starts, removed by `down`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lab {
    pub shape: Shape,
    pub image: PathBuf,
    pub kernel_release: String,
    pub api_port: u16,
    pub channel_port: u16,
    pub token: String,
    pub started_unix_s: u64,
    /// Digest of each program as it is in the host now.
    pub programs: BTreeMap<String, String>,
    /// False when it was started with `--no-daemon`.
    pub daemon: bool,
}

impl Lab {
    pub fn channel(&self) -> Channel {
        Channel { port: self.channel_port, token: self.token.clone() }
    }

    pub fn api_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.api_port)
    }
}

/// Held while a verb changes a lab. Dropping it lets the next one in.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Home {
    /// `MICA_LAB_DIR`, else `/var/lib/mica-lab`; below it the lab's name.
    pub fn new(name: &str) -> Result<Home> {
        options::check_name(name)?;
        let root = std::env::var_os("MICA_LAB_DIR")
            .map_or_else(|| PathBuf::from("/var/lib/mica-lab"), PathBuf::from);
        Ok(Home::at(&root, name))
    }

    fn at(root: &Path, name: &str) -> Home {
        Home { name: name.to_owned(), directory: root.join(name) }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn state_file(&self) -> PathBuf {
        self.file("lab.json")
    }
    pub fn pid_file(&self) -> PathBuf {
        self.file("qemu.pid")
    }
    pub fn qmp_socket(&self) -> PathBuf {
        self.file("qmp.sock")
    }
    pub fn console_log(&self) -> PathBuf {
        self.file("console.log")
    }
    pub fn root_overlay(&self) -> PathBuf {
        self.file("root.qcow2")
    }
    pub fn tools_drive(&self) -> PathBuf {
        self.file("tools.ext4")
    }
    pub fn store_drive(&self) -> PathBuf {
        self.file("store.img")
    }
    pub fn key_file(&self) -> PathBuf {
        self.file("api-key")
    }

    /// Makes the directory and waits for whoever holds the lab's lock.
    pub fn lock(&self) -> Result<Lock> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .with_context(|| format!("make {}", self.directory.display()))?;
        let path = self.file("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            super::progress::say("another mica-lab command works on this lab; waiting for it");
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("lock {}", path.display()))?;
        }
        Ok(Lock { _file: file })
    }

    /// What the last `up` wrote, if anything did.
    pub fn load(&self) -> Result<Option<Lab>> {
        let path = self.state_file();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(format!("read {}", path.display())),
        };
        serde_json::from_slice(&text).map(Some).with_context(|| {
            format!(
                "{} is not what this mica-lab writes; `mica lab down` ends the lab and removes it",
                path.display()
            )
        })
    }

    pub fn save(&self, lab: &Lab) -> Result<()> {
        let json = serde_json::to_vec_pretty(lab).context("encode the lab's state")?;
        write_private(&self.state_file(), &json)
    }

    /// The running lab, or an error that says how to start one.
    pub fn running(&self) -> Result<Lab> {
        if self.qemu()?.is_some()
            && let Some(lab) = self.load()?
        {
            return Ok(lab);
        }
        let flag =
            if self.name == "default" { String::new() } else { format!(" --name {}", self.name) };
        bail!("the lab is down; start it with `mica lab up{flag}`")
    }

    /// The process of this lab's QEMU, if it is alive. A stale pid file counts as nothing.
    pub fn qemu(&self) -> Result<Option<Pid>> {
        let path = self.pid_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(format!("read {}", path.display())),
        };
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
        let ours = arguments.is_ok_and(|bytes| is_our_qemu(&bytes, &self.qmp_socket()));
        Ok(ours.then_some(pid))
    }

    /// Ends QEMU without asking the guest.
    pub fn kill_qemu(&self) -> Result<()> {
        if let Some(pid) = self.qemu()? {
            rustix::process::kill_process(pid, Signal::KILL).context("kill QEMU")?;
        }
        Ok(())
    }

    /// Removes what belongs to one start. The store and the key stay.
    pub fn forget_start(&self) -> Result<()> {
        let paths = [
            self.state_file(),
            self.pid_file(),
            self.qmp_socket(),
            self.root_overlay(),
            self.tools_drive(),
        ];
        paths.iter().try_for_each(|path| remove(path))
    }
}

/// Removes a file that may be missing.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).context(format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes a file that only its owner can read, whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// `bytes` random bytes in hex.
pub fn random_hex(bytes: usize) -> Result<String> {
    let mut buffer = vec![0_u8; bytes];
    let mut filled = 0;
    while filled < bytes {
        filled +=
            rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty())
                .context("draw random bytes")?;
    }
    Ok(buffer.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// `cmdline` is what /proc says: words that each end in NUL.
fn is_our_qemu(cmdline: &[u8], socket: &Path) -> bool {
    let words: Vec<_> = cmdline.split(|byte| *byte == 0).collect();
    let wanted = format!("unix:{},", socket.display());
    words.first().is_some_and(|program| program.windows(4).any(|part| part == b"qemu"))
        && words.iter().any(|word| word.starts_with(wanted.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(test: &str) -> Home {
        let root = std::env::temp_dir().join(format!("mica-lab-{test}-{}", std::process::id()));
        Home::at(&root, "one")
    }

    fn lab() -> Lab {
        Lab {
            shape: Shape { sockets: 2, cores_per_socket: 2, memory_mib: 8192, drive_gib: 32 },
            image: PathBuf::from("/cache/x"),
            kernel_release: "6.12".to_owned(),
            api_port: 3000,
            channel_port: 4000,
            token: "t".to_owned(),
            started_unix_s: 1,
            programs: BTreeMap::new(),
            daemon: true,
        }
    }

    #[test]
    fn state_comes_back_and_is_forgotten() {
        let home = home("state");
        let lock = home.lock().unwrap();
        assert_eq!(home.load().unwrap(), None);
        home.save(&lab()).unwrap();
        assert_eq!(home.load().unwrap(), Some(lab()));
        home.forget_start().unwrap();
        assert_eq!(home.load().unwrap(), None);
        drop(lock);
        fs::remove_dir_all(home.directory.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_pid_file_that_names_another_process_is_stale() {
        let home = home("stale");
        let _lock = home.lock().unwrap();
        fs::write(home.pid_file(), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(home.qemu().unwrap(), None);
        fs::write(home.pid_file(), "garbage").unwrap();
        assert_eq!(home.qemu().unwrap(), None);
        let error = home.running().unwrap_err().to_string();
        assert!(error.contains("mica lab up --name one"), "{error}");
        fs::remove_dir_all(home.directory.parent().unwrap()).unwrap();
    }

    #[test]
    fn qemu_is_known_by_its_own_socket() {
        let socket = Path::new("/var/lib/mica-lab/a/qmp.sock");
        let line = b"qemu-system-x86_64\0-qmp\0unix:/var/lib/mica-lab/a/qmp.sock,server=on\0";
        assert!(is_our_qemu(line, socket));
        assert!(!is_our_qemu(line, Path::new("/var/lib/mica-lab/b/qmp.sock")));
        assert!(!is_our_qemu(b"vi\0unix:/var/lib/mica-lab/a/qmp.sock,\0", socket));
    }

    #[test]
    fn random_hex_has_the_asked_length_and_differs() {
        let (a, b) = (random_hex(20).unwrap(), random_hex(20).unwrap());
        assert_eq!(a.len(), 40);
        assert_ne!(a, b);
    }
}
