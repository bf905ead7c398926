//! A test double: plays one VM process, well or badly, or a daemon that can be killed.
//!
//! Run by the tests of this crate: `mica-shards-double vm MODE --uid N --gid N` speaks frames on
//! descriptor 0; `mica-shards-double daemon STORE CGROUP PROGRAM COUNT` makes sandboxes and waits.
//! Refuses to be anything like a virtual machine: the "guest" is a thread.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test double that cannot go on must fail its test")]

mod daemon;
mod guest;

use std::os::fd::OwnedFd;
use std::process::exit;

use mica_wire::vm::{Command, ControlSocket, Ending, Event, FdRole};

use guest::Agent;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["vm", mode, "--uid", uid, "--gid", gid] => {
            assert_eq!(uid, gid);
            assert!(uid.parse::<u32>().unwrap() >= 10_000);
            vm(mode);
        }
        ["daemon", store, cgroup, program, count] => {
            daemon::run(store, cgroup, program, count.parse().unwrap());
        }
        _ => panic!("unknown arguments {arguments:?}"),
    }
}

/// For ever, as far as a test is concerned. The process is killed long before.
fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

fn control() -> ControlSocket {
    let stdin = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().unwrap();
    // The original must not keep the socket open.
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null").unwrap()).unwrap();
    ControlSocket::from_fd(stdin)
}

fn vm(mode: &str) {
    let socket = control();
    match mode {
        "exit-at-once" => {
            eprintln!("\x1b[31mthe jail cannot be closed\x1b[0m");
            exit(3);
        }
        "silent" => hang(),
        "garbage" => send_raw(&socket, b"this is not a frame at all"),
        "too-long" => send_raw(&socket, &vec![0x4d; 60_000]),
        "out-of-turn" => socket.send_event(&Event::Doorbell).unwrap(),
        _ => {
            socket.send_event(&Event::Jailed).unwrap();
            boot(mode, &socket);
        }
    }
    hang();
}

fn send_raw(socket: &ControlSocket, bytes: &[u8]) {
    rustix::net::send(socket, bytes, rustix::net::SendFlags::empty()).unwrap();
}

fn boot(mode: &str, socket: &ControlSocket) {
    if mode == "deaf" {
        hang();
    }
    let (Command::Boot(config), fds) = socket.receive_command().unwrap() else {
        panic!("the first command is Boot");
    };
    assert_eq!(config.fds.len(), fds.len());
    let console = config.fds.iter().position(|role| *role == FdRole::Console).unwrap();
    write_console(&fds[console], b"\x1b[2Jhello from the console\r\n");
    if let Some(disk) = config.fds.iter().position(|role| *role == FdRole::Disk) {
        rustix::io::pwrite(&fds[disk], b"mine", 0).unwrap();
    }
    match mode {
        "bad-config" => {
            let ending = Ending::BadConfig("no such kernel".to_owned());
            socket.send_event(&Event::Ended(ending)).unwrap();
            exit(1);
        }
        "eof-after-boot" => exit(1),
        "second-jailed" => socket.send_event(&Event::Jailed).unwrap(),
        "never-rings" => hang(),
        _ => {}
    }
    socket.send_event(&Event::Started).unwrap();
    socket.send_event(&Event::ConsoleStarted).unwrap();
    if mode == "panics" {
        write_console(&fds[console], b"Kernel panic - not syncing: no init found\n");
        socket.send_event(&Event::Ended(Ending::Reset)).unwrap();
        exit(0);
    }
    socket.send_event(&Event::Doorbell).unwrap();
    let children = if mode == "with-children" { guest::start_children() } else { Vec::new() };
    run(mode, socket);
    drop(children);
}

fn run(mode: &str, socket: &ControlSocket) {
    let agent = Agent::parse(mode);
    loop {
        let (command, mut fds) = match socket.receive_command() {
            Ok(received) => received,
            // One that goes on without its daemon: what a start-up sweep is for.
            Err(_) if mode == "stubborn" => hang(),
            Err(_) => exit(0),
        };
        match command {
            Command::OpenStream { vsock_port } => {
                assert_eq!(vsock_port, mica_wire::guest::GATEWAY_PORT);
                let stream = fds.pop().unwrap();
                let own: OwnedFd = std::os::fd::AsFd::as_fd(socket).try_clone_to_owned().unwrap();
                let own = ControlSocket::from_fd(own);
                std::thread::spawn(move || agent.serve(stream, &own));
                if mode == "stops-reading" {
                    // After the exchange with the agent no command is ever taken again.
                    hang();
                }
            }
            Command::Stop => {
                socket.send_event(&Event::Ended(Ending::Asked)).unwrap();
                exit(0);
            }
            Command::Boot(_) => panic!("boot comes once"),
        }
    }
}

fn write_console(console: &OwnedFd, text: &[u8]) {
    let mut total = [0u8; 8];
    rustix::io::pread(console, &mut total, 0).unwrap();
    let written = u64::from_le_bytes(total);
    rustix::io::pwrite(console, text, 8 + written).unwrap();
    let total = written + text.len() as u64;
    rustix::io::pwrite(console, &total.to_le_bytes(), 0).unwrap();
}
