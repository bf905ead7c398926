//! Cold boot of the tiny guest: VM process start to first guest byte, beside its floor.
//!
//! Run by `make bench-smoke`, as root, on a machine with `/dev/kvm`. The floor is the same KVM calls in
//! a bare loop in this process (`mica_vmm::floor`). The two are taken in turns, so that whatever else
//! the machine does falls on both. Refuses to say which figure is good: it prints them.

#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mica_lab::one_vm::{Boot, OneVm, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::{Then, vmlinux};
use mica_units::Mebibytes;
use mica_wire::vm::{Command, Ending, Event};

const PATIENCE: Duration = Duration::from_secs(30);
const MEMORY_MIB: u32 = 64;
/// User and group of the VM processes: nobody else's.
const ID: u32 = 165_000;

/// Cold boot of the tiny guest, and its floor.
#[derive(Debug, Parser)]
struct Arguments {
    /// Measured rounds; one more before them warms up.
    #[arg(long, default_value_t = 50)]
    rounds: u32,
    /// The mica-vm to start; otherwise `MICA_VM`, or the one beside this program.
    #[arg(long)]
    vm_program: Option<PathBuf>,
}

/// How long each part of one boot took, from the start of the process on.
#[derive(Clone, Copy, Debug)]
struct Stages {
    jailed: Duration,
    built: Duration,
    started: Duration,
    first_byte: Duration,
    /// From the stop command to the end of the process.
    gone: Duration,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.rounds > 0, "at least one round");
    let program = arguments.vm_program.map_or_else(find_mica_vm, Ok)?;
    let image = vmlinux("hello\n", Then::Idle);
    let mut boots = Vec::new();
    let mut floors = Vec::new();
    for round in 0..=arguments.rounds {
        let stages = boot_once(&program, &image)?;
        let floor = floor_once(&image)?;
        if round > 0 {
            boots.push(stages);
            floors.push(floor);
        }
    }
    println!("Cold boot of a tiny guest, 1 vCPU, {MEMORY_MIB} MiB, {} rounds, in ms", boots.len());
    println!("{:<52} {:>8} {:>8}", "", "p50", "p95");
    let row = |name: &str, pick: fn(&Stages) -> Duration| {
        print_row(name, boots.iter().map(pick).collect());
    };
    row("mica-vm: process start to jailed", |stages| stages.jailed);
    row("mica-vm: process start to shell built", |stages| stages.built);
    row("mica-vm: process start to vCPUs running", |stages| stages.started);
    row("mica-vm: process start to first guest byte", |stages| stages.first_byte);
    print_row("floor: the same KVM calls in a loop, to first byte", floors);
    row("mica-vm: stop to process gone", |stages| stages.gone);
    Ok(())
}

fn print_row(name: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| {
        let rank = (times.len() * percent).div_ceil(100).max(1) - 1;
        times.get(rank).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
    };
    println!("{name:<52} {:>8.3} {:>8.3}", at(50), at(95));
}

fn boot_once(program: &Path, image: &[u8]) -> Result<Stages> {
    let boot = Boot { memory_mib: MEMORY_MIB, ..Boot::of_image(image)? };
    let start = Instant::now();
    let mut vm = OneVm::spawn(program, ID)?;
    vm.expect(&Event::Jailed, PATIENCE)?;
    let jailed = start.elapsed();
    vm.build(&boot.shape(), PATIENCE)?;
    let built = start.elapsed();
    vm.send_boot(&boot)?;
    vm.expect(&Event::Started, PATIENCE)?;
    let started = start.elapsed();
    vm.expect(&Event::ConsoleStarted, PATIENCE)?;
    let first_byte = start.elapsed();
    let stop = Instant::now();
    vm.send(&Command::Stop, &[])?;
    vm.expect(&Event::Ended(Ending::Asked), PATIENCE)?;
    vm.wait(PATIENCE)?;
    Ok(Stages { jailed, built, started, first_byte, gone: stop.elapsed() })
}

fn floor_once(image: &[u8]) -> Result<Duration> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
    let kernel = File::from(memfd_of("kernel", image)?);
    Ok(mica_vmm::floor::first_byte(kvm.into(), kernel, Mebibytes::new(MEMORY_MIB))?)
}
