//! QEMU's arguments, and its start.
//!
//! `up` calls `start`. The arguments are a pure function of the lab, tested below. Software
//! emulation is asked for always, also where KVM works: the lab is the same machine everywhere,
//! and nested paging of AMD is something that few outer machines could give.

use super::image::{self, Image};
use super::run;
use super::state::{Home, Lab};
use anyhow::{Context as _, Result};
use std::fs;
use std::process::Command;

/// Where the host listens for the exec channel, inside.
pub const CHANNEL_PORT_INSIDE: u16 = 7000;
/// Where the daemon listens, inside.
pub const API_PORT_INSIDE: u16 = 3000;
/// The free slot for a drive that is plugged in while the host runs.
pub const HOT_PLUG_SLOT: &str = "hot0";

/// The translation cache of emulated code. QEMU's own choice is an eighth of the machine's memory
/// up to this; on a small machine that is flushed over and over while a nested guest boots.
const TRANSLATION_CACHE_MIB: u32 = 1024;

/// The host's kernel command line. No mitigations: they slow emulation and guard nothing here.
fn kernel_command_line() -> String {
    format!(
        "root=PARTUUID={} rootfstype=ext4 rw rootwait init=/usr/sbin/mica-init console=ttyS0 \
         loglevel=4 panic=-1 mitigations=off nokaslr net.ifnames=0",
        image::root_partuuid()
    )
}

/// Every argument after the program's name.
pub fn arguments(home: &Home, lab: &Lab, image: &Image) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
    let shape = &lab.shape;
    add("-name", format!("mica-lab-{}", home.name));
    add("-machine", "q35,usb=off,vmport=off,i8042=off,hpet=on".to_owned());
    add("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"));
    add("-cpu", "max".to_owned());
    add(
        "-smp",
        format!(
            "cpus={},sockets={},cores={},threads=1",
            shape.cpus(),
            shape.sockets,
            shape.cores_per_socket
        ),
    );
    add("-m", format!("{}M", shape.node_memory_mib() * shape.sockets));
    for node in 0..shape.sockets {
        let size = shape.node_memory_mib();
        add("-object", format!("memory-backend-ram,id=ram{node},size={size}M"));
        let first = node * shape.cores_per_socket;
        let last = first + shape.cores_per_socket - 1;
        add("-numa", format!("node,nodeid={node},cpus={first}-{last},memdev=ram{node}"));
    }
    add("-kernel", image.kernel().display().to_string());
    add("-append", kernel_command_line());
    for (name, path, format, cache) in [
        ("root", home.root_overlay(), "qcow2", "unsafe"),
        ("tools", home.tools_drive(), "raw", "unsafe"),
        ("store", home.store_drive(), "raw", "writeback"),
    ] {
        let file = path.display();
        add(
            "-drive",
            format!("if=none,id={name},file={file},format={format},cache={cache},discard=unmap"),
        );
        // The host finds its drives by these serial numbers.
        add("-device", format!("nvme,drive={name},serial=mica-{name}"));
    }
    add("-netdev", network(lab));
    add("-device", "virtio-net-pci,netdev=net0,romfile=".to_owned());
    add("-device", "virtio-rng-pci".to_owned());
    add("-device", format!("pcie-root-port,id={HOT_PLUG_SLOT},chassis=1,slot=1"));
    add("-qmp", format!("unix:{},server=on,wait=off", home.qmp_socket().display()));
    add("-serial", format!("file:{}", home.console_log().display()));
    add("-display", "none".to_owned());
    add("-pidfile", home.pid_file().display().to_string());
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot", "-daemonize"] {
        words.push(flag.to_owned());
    }
    words
}

/// User-mode networking; the two ports are forwarded on loopback only.
fn network(lab: &Lab) -> String {
    format!(
        "user,id=net0,hostfwd=tcp:127.0.0.1:{}-10.0.2.15:{API_PORT_INSIDE},\
         hostfwd=tcp:127.0.0.1:{}-10.0.2.15:{CHANNEL_PORT_INSIDE}",
        lab.api_port, lab.channel_port
    )
}

/// A host that died says why on its console, and the next start must not wipe that away.
fn keep_last_console(home: &Home) -> Result<()> {
    match fs::rename(home.console_log(), home.file("console.last.log")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("keep the console log of the last start")
        }
        _ => Ok(()),
    }
}

/// Starts QEMU in the background. Returns when it has set itself up.
pub fn start(home: &Home, lab: &Lab, image: &Image) -> Result<()> {
    keep_last_console(home)?;
    fs::write(home.console_log(), "").context("empty the console log")?;
    let arguments = arguments(home, lab, image);
    run::capture("start QEMU", Command::new("qemu-system-x86_64").args(arguments)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::options::Shape;
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    fn words(shape: Shape) -> Vec<String> {
        let lab = Lab {
            shape,
            image: PathBuf::from("/cache/i"),
            kernel_release: "6.12".to_owned(),
            api_port: 3001,
            channel_port: 4001,
            token: "secret".to_owned(),
            started_unix_s: 0,
            programs: BTreeMap::new(),
            daemon: true,
        };
        let image =
            Image { directory: lab.image.clone(), kernel_release: lab.kernel_release.clone() };
        let home = Home { name: "one".to_owned(), directory: PathBuf::from("/labs/one") };
        arguments(&home, &lab, &image)
    }

    const SHAPE: Shape = Shape { sockets: 2, cores_per_socket: 3, memory_mib: 4097, drive_gib: 1 };

    #[test]
    fn each_socket_is_a_node_with_its_cores_and_half_the_memory() {
        let words = words(SHAPE);
        let has = |word: &str| words.iter().any(|have| have == word);
        assert!(has("cpus=6,sockets=2,cores=3,threads=1"));
        assert!(has("4096M"));
        assert!(has("node,nodeid=0,cpus=0-2,memdev=ram0"));
        assert!(has("node,nodeid=1,cpus=3-5,memdev=ram1"));
        assert!(has("memory-backend-ram,id=ram1,size=2048M"));
    }

    #[test]
    fn nothing_listens_beyond_loopback_and_no_secret_is_on_the_command_line() {
        let words = words(SHAPE);
        let network = words.iter().find(|word| word.starts_with("user,")).unwrap();
        assert_eq!(network.matches("hostfwd=").count(), 2);
        assert_eq!(network.matches("hostfwd=tcp:127.0.0.1:").count(), 2);
        assert!(!words.iter().any(|word| word.contains("secret")));
    }

    #[test]
    fn no_defaults_and_no_user_configuration_slip_in() {
        let words = words(SHAPE);
        for flag in ["-nodefaults", "-no-user-config", "-daemonize", "-no-reboot"] {
            assert!(words.iter().any(|word| word == flag), "{flag}");
        }
    }
}
