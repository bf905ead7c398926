//! The files by which programs without our environment learn which sandbox they are in.
//!
//! Called by the control exchange when the guest becomes another sandbox. Refuses to leave a file
//! empty or half replaced for a reader: the new text goes over the old one, and then the length.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use mica_units::SandboxId;
use mica_wire::guest::InitRequest;

/// The host name before there is a sandbox.
pub const NOBODY: &str = "mica";

/// Longest host name that Linux takes.
const HOSTNAME_BYTES_MAX: usize = 64;

/// Longest `/etc/hosts` that is read.
const HOSTS_BYTES_MAX: u64 = 1024 * 1024;

/// Characters of a machine id.
const MACHINE_ID_BYTES: usize = 32;

/// What the line of a host name begins with.
const OWN_ADDRESS: &str = "127.0.1.1 ";

/// What a system without `/etc/hosts` gets.
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";

/// A file that could not be replaced.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}")]
pub struct NamesError {
    path: &'static str,
    #[source]
    source: std::io::Error,
}

/// The host name of a sandbox: its id, as far as Linux takes it.
pub fn host_name(sandbox_id: &str) -> &str {
    sandbox_id.get(..HOSTNAME_BYTES_MAX).unwrap_or(sandbox_id)
}

/// Whether a text has the form of `/etc/machine-id`.
pub fn is_machine_id(text: &str) -> bool {
    text.len() == MACHINE_ID_BYTES
        && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Writes all of them below `root`, for a guest that is nobody yet: a sandbox then finds files and
/// directories in memory that it would have to read from its disk.
pub fn rehearse(root: &Path) -> Result<(), NamesError> {
    write_all(root, NOBODY, "", &"0".repeat(MACHINE_ID_BYTES), NOBODY)
}

/// Writes all of them below `root`. The entry of the `former` sandbox gives way to the new one's;
/// without an entry for the host name `sudo` complains at every call.
pub fn write(
    root: &Path,
    request: &InitRequest,
    former: Option<&InitRequest>,
) -> Result<(), NamesError> {
    let former = former.map_or(NOBODY, |former| &former.sandbox_id);
    let InitRequest { sandbox_id, template_id, machine_id, .. } = request;
    write_all(root, sandbox_id, template_id, machine_id, former)
}

fn write_all(
    root: &Path,
    sandbox_id: &str,
    template_id: &str,
    machine_id: &str,
    former: &str,
) -> Result<(), NamesError> {
    let at = |path: &'static str| move |source| NamesError { path, source };
    let own = |path: &'static str| root.join(path.trim_start_matches('/'));

    let hosts = own("/etc/hosts");
    read_hosts(&hosts)
        .map(|held| with_host(&held, host_name(former), host_name(sandbox_id)))
        .and_then(|text| replace(&hosts, 0o644, &text))
        .map_err(at("/etc/hosts"))?;

    let machine_id = format!("{machine_id}\n");
    replace(&own("/etc/machine-id"), 0o444, &machine_id).map_err(at("/etc/machine-id"))?;
    let dbus = own("/var/lib/dbus/machine-id");
    // Usually a link to the other, or not there at all.
    if dbus.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        replace(&dbus, 0o444, &machine_id).map_err(at("/var/lib/dbus/machine-id"))?;
    }

    std::fs::create_dir_all(own("/run/e2b")).map_err(at("/run/e2b"))?;
    for (path, text) in [
        ("/run/e2b/.E2B_SANDBOX", "true"),
        ("/run/e2b/.E2B_SANDBOX_ID", sandbox_id),
        ("/run/e2b/.E2B_TEMPLATE_ID", template_id),
    ] {
        replace(&own(path), 0o644, text).map_err(at(path))?;
    }
    Ok(())
}

fn read_hosts(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HOSTS.to_owned()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(HOSTS_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The entry of the former name is the line that was written for it; where the memory that knew that name is
/// gone, its form tells. One that the user has edited since is the user's.
fn with_host(held: &str, former: &str, name: &str) -> String {
    let entry = |name: &str| format!("{OWN_ADDRESS}{name}");
    let (stale, new) = (entry(former), entry(name));
    let of_sandbox = |line: &str| {
        line.strip_prefix(OWN_ADDRESS).is_some_and(|name| name.parse::<SandboxId>().is_ok())
    };
    let mut text = String::with_capacity(held.len() + new.len() + 2);
    for line in held.lines().filter(|line| *line != stale && *line != new && !of_sandbox(line)) {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&new);
    text.push('\n');
    text
}

fn replace(path: &Path, mode: u32, text: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(false).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("mica-{name}-{}", std::process::id()));
            std::fs::create_dir_all(root.join("etc")).unwrap();
            Self(root)
        }

        fn read(&self, path: &str) -> String {
            std::fs::read_to_string(self.0.join(path)).unwrap()
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn request(id: &str, digit: char) -> InitRequest {
        InitRequest {
            sandbox_id: id.to_owned(),
            template_id: "template".to_owned(),
            machine_id: digit.to_string().repeat(32),
            access_token: None,
            env_vars: BTreeMap::new(),
            wall_clock_unix_ns: 1,
            new_sandbox: true,
            defaults: None,
        }
    }

    #[test]
    fn each_sandbox_has_its_own_names_and_no_others() {
        let root = Root::new("names");
        std::fs::write(root.0.join("etc/hosts"), "127.0.0.1 localhost\n10.0.0.1 mine").unwrap();
        std::fs::write(root.0.join("etc/machine-id"), "something longer than an id\n".repeat(4))
            .unwrap();
        std::fs::create_dir_all(root.0.join("var/lib/dbus")).unwrap();
        std::fs::write(root.0.join("var/lib/dbus/machine-id"), "").unwrap();
        let (long, short) = (request("a-longer-name", '1'), request("box", '2'));
        for (own, former) in [(&long, None), (&short, Some(&long)), (&short, Some(&short))] {
            write(&root.0, own, former).unwrap();
            assert_eq!(
                root.read("etc/hosts"),
                format!("127.0.0.1 localhost\n10.0.0.1 mine\n127.0.1.1 {}\n", own.sandbox_id)
            );
            for path in ["etc/machine-id", "var/lib/dbus/machine-id"] {
                assert_eq!(root.read(path), format!("{}\n", own.machine_id));
            }
            assert_eq!(root.read("run/e2b/.E2B_SANDBOX_ID"), own.sandbox_id);
        }
        assert_eq!(root.read("run/e2b/.E2B_SANDBOX"), "true");
        assert_eq!(root.read("run/e2b/.E2B_TEMPLATE_ID"), "template");
    }

    #[test]
    fn of_a_disk_whose_memory_is_gone_no_name_stays() {
        let root = Root::new("names-booted");
        let held = "127.0.0.1 localhost\n127.0.1.1 i0123456789abcdefghij\n127.0.1.1 mine\n";
        std::fs::write(root.0.join("etc/hosts"), held).unwrap();
        write(&root.0, &request("box", 'f'), None).unwrap();
        let expected = "127.0.0.1 localhost\n127.0.1.1 mine\n127.0.1.1 box\n";
        assert_eq!(root.read("etc/hosts"), expected);
    }

    #[test]
    fn a_bare_system_gets_what_it_lacks_and_nothing_of_dbus() {
        let root = Root::new("names-bare");
        write(&root.0, &request("box", 'f'), None).unwrap();
        assert_eq!(root.read("etc/hosts"), format!("{HOSTS}127.0.1.1 box\n"));
        assert_eq!(root.read("etc/machine-id").len(), 33);
        assert!(!root.0.join("var").exists());
    }

    #[test]
    fn a_rehearsal_is_gone_with_the_first_sandbox() {
        let root = Root::new("names-rehearsed");
        rehearse(&root.0).unwrap();
        write(&root.0, &request("box", 'f'), None).unwrap();
        assert_eq!(root.read("etc/hosts"), format!("{HOSTS}127.0.1.1 box\n"));
        assert_eq!(root.read("etc/machine-id"), format!("{}\n", "f".repeat(32)));
        assert_eq!(root.read("run/e2b/.E2B_TEMPLATE_ID"), "template");
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let root = Root::new("names-bad");
        std::fs::create_dir(root.0.join("etc/machine-id")).unwrap();
        let error = write(&root.0, &request("box", 'f'), None).unwrap_err();
        assert_eq!(error.to_string(), "cannot write /etc/machine-id");
    }

    #[test]
    fn the_form_of_a_machine_id() {
        assert!(is_machine_id(&"0f".repeat(16)));
        for bad in ["", "0f", &"0F".repeat(16), &"g0".repeat(16), &"0".repeat(33), &"é".repeat(16)]
        {
            assert!(!is_machine_id(bad), "{bad}");
        }
    }

    #[test]
    fn a_host_name_is_cut_to_what_linux_takes() {
        assert_eq!(host_name("box"), "box");
        assert_eq!(host_name(&"x".repeat(100)).len(), HOSTNAME_BYTES_MAX);
    }
}
