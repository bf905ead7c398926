//! Where a kernel listens: its directory, its connection file, its sockets.
//!
//! Called by [`super::kernel`]. Unix sockets where the kernel knows them, in a directory that only
//! the kernel's user and root may enter, so no other user of the guest can speak to a kernel and no
//! port of the guest is taken. Elsewhere TCP, on an address of the loopback network that the
//! gateway to the sandbox's ports does not connect to: nobody outside of the guest reaches it, and
//! who is inside needs the connection's key. Refuses a directory that is taken.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::kernel::KernelError;
use super::languages::{Arg, Kind, Transport};
use super::protocol::Key;
use crate::users::User;

/// Not 127.0.0.1, to which the gateway connects.
const TCP_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The channels of a kernel, by their number in the name of unix sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Shell = 1,
    Iopub = 2,
    Stdin = 3,
    Control = 4,
    Heartbeat = 5,
}

const CHANNELS: [Channel; 5] =
    [Channel::Shell, Channel::Iopub, Channel::Stdin, Channel::Control, Channel::Heartbeat];

/// The sockets of one kernel.
#[derive(Debug)]
pub enum Endpoints {
    Ipc(PathBuf),
    Tcp([u16; CHANNELS.len()]),
}

impl Endpoints {
    /// Chooses the sockets of a kernel with this directory.
    ///
    /// # Errors
    /// When no port is free.
    pub fn choose(transport: Transport, directory: &Path) -> std::io::Result<Self> {
        if transport == Transport::Ipc {
            return Ok(Self::Ipc(directory.join("k")));
        }
        // All are held until all are known, so that none comes twice.
        let held: Vec<TcpListener> = CHANNELS
            .iter()
            .map(|_| TcpListener::bind((TCP_ADDRESS, 0)))
            .collect::<Result<_, _>>()?;
        let mut ports = [0; CHANNELS.len()];
        for (port, listener) in ports.iter_mut().zip(&held) {
            *port = listener.local_addr()?.port();
        }
        Ok(Self::Tcp(ports))
    }

    fn port(&self, channel: Channel) -> u16 {
        let number = channel as u8;
        match self {
            Self::Ipc(_) => u16::from(number),
            Self::Tcp(ports) => ports.get(usize::from(number) - 1).copied().unwrap_or_default(),
        }
    }

    /// Jupyter puts a dash and the port behind the `ip` of an ipc connection.
    fn path(base: &Path, channel: Channel) -> PathBuf {
        let mut name = base.to_owned().into_os_string();
        name.push(format!("-{}", channel as u8));
        PathBuf::from(name)
    }

    /// As ZeroMQ writes it.
    pub fn address(&self, channel: Channel) -> String {
        match self {
            Self::Ipc(base) => format!("ipc://{}", Self::path(base, channel).display()),
            Self::Tcp(_) => format!("tcp://{TCP_ADDRESS}:{}", self.port(channel)),
        }
    }

    /// Whether the kernel listens on the channel.
    pub async fn is_open(&self, channel: Channel) -> bool {
        match self {
            Self::Ipc(base) => Self::path(base, channel).exists(),
            Self::Tcp(_) => {
                let address = SocketAddr::from((TCP_ADDRESS, self.port(channel)));
                tokio::net::TcpStream::connect(address).await.is_ok()
            }
        }
    }

    fn connection_file(&self, key: &Key, name: &str) -> String {
        let (transport, ip) = match self {
            Self::Ipc(base) => ("ipc", base.display().to_string()),
            Self::Tcp(_) => ("tcp", TCP_ADDRESS.to_string()),
        };
        json!({
            "transport": transport,
            "ip": ip,
            "shell_port": self.port(Channel::Shell),
            "iopub_port": self.port(Channel::Iopub),
            "stdin_port": self.port(Channel::Stdin),
            "control_port": self.port(Channel::Control),
            "hb_port": self.port(Channel::Heartbeat),
            "key": key.text(),
            "signature_scheme": "hmac-sha256",
            "kernel_name": name,
        })
        .to_string()
    }
}

/// A kernel's own directory, with its connection file and our files for it.
#[derive(Debug)]
pub struct Home {
    pub directory: PathBuf,
    pub connection: PathBuf,
}

impl Home {
    /// Makes it, as the user's.
    ///
    /// # Errors
    /// When the directory is there already or cannot be made.
    pub fn make(
        directory: PathBuf,
        kind: &Kind,
        endpoints: &Endpoints,
        key: &Key,
        user: &User,
    ) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Directory { path: directory.clone(), source };
        if let Some(parent) = directory.parent() {
            std::fs::create_dir_all(parent).map_err(fail)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(&directory).map_err(fail)?;
        let connection = directory.join("connection.json");
        let files = kind.args.iter().filter_map(|arg| match arg {
            Arg::File(name, text) => Some((directory.join(name), (*text).to_owned())),
            _ => None,
        });
        let text = endpoints.connection_file(key, kind.default_language);
        let made = files.chain([(connection.clone(), text)]).try_for_each(|(path, text)| {
            write_private(&path, text.as_bytes())?;
            give(&path, user)
        });
        if let Err(source) = made.and_then(|()| give(&directory, user)) {
            remove(&directory);
            return Err(fail(source));
        }
        Ok(Self { directory, connection })
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path)?.write_all(bytes)
}

fn give(path: &Path, user: &User) -> std::io::Result<()> {
    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
}

/// Removes a kernel's directory.
pub fn remove(directory: &Path) {
    // What cannot be removed is a few empty sockets in the guest's own memory file system; the
    // name is never used again.
    drop(std::fs::remove_dir_all(directory));
}

#[cfg(test)]
mod tests {
    use super::super::languages;
    use super::*;

    #[test]
    fn the_directory_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let base = std::env::temp_dir().join(format!("mica-kernel-{}", std::process::id()));
        let user = crate::users::find("root").unwrap();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root to give files away");
            return;
        }
        let kind = languages::find(None).unwrap().kind;
        let endpoints = Endpoints::choose(kind.transport, &base).unwrap();
        let key = Key::new("k".into());
        let make = || Home::make(base.join("x"), kind, &endpoints, &key, &user);
        let home = make().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&home.directory), 0o700);
        assert_eq!(mode(&home.connection), 0o600);
        assert_eq!(mode(&home.directory.join("kernel.py")), 0o600);
        assert!(make().is_err(), "taken");
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn tcp_is_not_where_the_gateway_connects() {
        let endpoints = Endpoints::choose(Transport::Tcp, Path::new("/x")).unwrap();
        let addresses: std::collections::BTreeSet<_> =
            CHANNELS.iter().map(|channel| endpoints.address(*channel)).collect();
        assert_eq!(addresses.len(), CHANNELS.len());
        assert!(addresses.iter().all(|address| address.starts_with("tcp://127.0.0.2:")));
        let ipc = Endpoints::choose(Transport::Ipc, Path::new("/x")).unwrap();
        assert_eq!(ipc.address(Channel::Iopub), "ipc:///x/k-2");
    }
}
