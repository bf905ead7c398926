//! Boots one kernel with `mica-vm` and prints its console, and greets the agent
//! if the guest has one: a tool for whoever works on the VMM.
//!
//! Started by hand: `boot-vm --kernel K [--initramfs I] [--disk D] [--cmdline C] …`. Refuses to be
//! more than that: no templates, no agent, no API.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use mica_lab::one_vm::{Boot, OneVm, find_mica_vm};
use mica_wire::guest::{
    CONTROL_LINE_BYTES_MAX, ControlRequest, GATEWAY_PORT, InitRequest, Preamble,
};
use mica_wire::vm::{Command, Event};

/// Boots one kernel with mica-vm and prints its console.
#[derive(Debug, Parser)]
struct Arguments {
    /// bzImage or ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long)]
    initramfs: Option<PathBuf>,
    /// Raw disk image, written to.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory_mib: u32,
    /// User and group of the VM process.
    #[arg(long, default_value_t = 65534)]
    id: u32,
    /// Give up after this many seconds.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let start = Instant::now();
    let open = |path: &PathBuf| File::open(path).with_context(|| path.display().to_string());
    let disk = match &arguments.disk {
        Some(path) => Some(File::options().read(true).write(true).open(path)?.into()),
        None => None,
    };
    let boot = Boot {
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory_mib,
        cmdline: arguments.cmdline.clone(),
        console_bytes: 1 << 20,
        kernel: open(&arguments.kernel)?.into(),
        initramfs: arguments.initramfs.as_ref().map(open).transpose()?.map(Into::into),
        disk,
    };
    let mut vm = OneVm::spawn(&find_mica_vm()?, arguments.id)?;
    vm.expect(&Event::Jailed, Duration::from_secs(30))?;
    vm.boot(&boot, Duration::from_secs(30))?;
    let mut printed = 0;
    while start.elapsed().as_secs() < arguments.seconds {
        // A short patience only so that the console is printed as it comes.
        let event = vm.next_event(Duration::from_millis(100));
        printed = print_console(&vm, printed)?;
        match event {
            Ok(Some(event)) => {
                eprintln!("[{:8.3} s] {event:?}", start.elapsed().as_secs_f64());
                if event == Event::Doorbell {
                    greet(&vm)?;
                    eprintln!("[{:8.3} s] the agent answered", start.elapsed().as_secs_f64());
                }
            }
            Ok(None) => break,
            Err(_) => {}
        }
    }
    Ok(())
}

/// Opens a stream to the agent, introduces the sandbox, and prints what it answers.
fn greet(vm: &OneVm) -> Result<()> {
    let (mut near, far) = UnixStream::pair()?;
    vm.send(&Command::OpenStream { vsock_port: GATEWAY_PORT }, &[far.as_fd()])?;
    drop(far);
    let request = ControlRequest::Init(InitRequest {
        sandbox_id: "i00000000000000000000".to_owned(),
        template_id: "by-hand".to_owned(),
        machine_id: "0".repeat(32),
        access_token: None,
        env_vars: BTreeMap::new(),
        wall_clock_unix_ns: u64::try_from(
            SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos(),
        )?,
        new_sandbox: true,
        defaults: None,
    });
    near.write_all(&Preamble::Control.encode())?;
    near.write_all(&serde_json::to_vec(&request)?)?;
    near.write_all(b"\n")?;
    near.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut answer = Vec::new();
    near.take(u64::try_from(CONTROL_LINE_BYTES_MAX)?).read_to_end(&mut answer)?;
    eprintln!("{:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// Prints what is new since `printed` bytes.
fn print_console(vm: &OneVm, printed: u64) -> Result<u64> {
    let (bytes, total) = vm.console()?;
    let new = usize::try_from(total - printed)?.min(bytes.len());
    stdout().write_all(&bytes[bytes.len() - new..])?;
    stdout().flush()?;
    Ok(total)
}
