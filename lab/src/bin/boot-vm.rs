//! Boots one kernel with `mica-vm` and prints its console: a tool for whoever works on the VMM.
//!
//! Started by hand: `boot-vm --kernel K [--initramfs I] [--disk D] [--cmdline C] …`. Refuses to be
//! more than that: no templates, no agent, no API.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use mica_lab::one_vm::{Boot, OneVm, find_mica_vm};
use mica_wire::vm::Event;

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
    vm.boot(&boot)?;
    let mut printed = 0;
    while start.elapsed().as_secs() < arguments.seconds {
        // A short patience only so that the console is printed as it comes.
        let event = vm.next_event(Duration::from_millis(100));
        printed = print_console(&vm, printed)?;
        match event {
            Ok(Some(event)) => eprintln!("[{:8.3} s] {event:?}", start.elapsed().as_secs_f64()),
            Ok(None) => break,
            Err(_) => {}
        }
    }
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
