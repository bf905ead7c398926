//! The stand-in VM speaks the frames of a VM process as the real one does.
//!
//! Run by `cargo test`, natively: the test is the shard. What the daemon's own tests build on is shown
//! here alone: memory that can be read from outside, states, stops, streams, and a shard that dies.

#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a test says what it expected and stops there")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use mica_units::{FrameRun, GuestPort};
use mica_wire::guest::{
    ControlReply, ControlRequest, ENVD_VERSION, GATEWAY_PORT, InitRequest, Preamble,
};
use mica_wire::vm::{
    Command, ControlSocket, EXCHANGE_BYTES, Ending, Event, FdRole, Phase, RestoreConfig, Shell,
    ShellConfig, plan,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// No answer takes this long.
const PATIENCE: Duration = Duration::from_secs(10);

const MEMORY_MIB: u32 = 64;

/// A state as the stand-in writes one, of a machine that was stopped once.
const STATE: [u8; 16] = *b"STANDIN1\x01\0\0\0\0\0\0\0";

/// The shard's side of one stand-in.
struct Shard {
    child: Child,
    control: ControlSocket,
    exchange: File,
    shell: Shell,
}

impl Shard {
    /// Starts the program and has it build a shell.
    fn build() -> Self {
        let (near, far) = ControlSocket::pair().expect("a socket pair");
        let child = Process::new(env!("CARGO_BIN_EXE_standin-vm"))
            .args(["--builtin-agent", "--uid", "1", "--gid", "1", "--netns", "1"])
            .stdin(Stdio::from(far.into_fd()))
            .stdout(Stdio::null())
            .spawn()
            .expect("the stand-in");
        assert_eq!(near.receive_event().ok(), Some(Event::Spawned { pid: child.id() }));
        assert_eq!(near.receive_event().ok(), Some(Event::Jailed));
        let exchange = memfd(EXCHANGE_BYTES);
        let console = memfd(65_536);
        let spare = near.as_fd().try_clone_to_owned().expect("a duplicate");
        let config = ShellConfig {
            vcpus: 2,
            memory_mib: MEMORY_MIB,
            disk: true,
            console_bytes: 65_536,
            exchange_bytes: EXCHANGE_BYTES,
            log_writes: false,
            fds: vec![FdRole::Spare, FdRole::Console, FdRole::Exchange],
        };
        let fds = [spare.as_fd(), console.as_fd(), exchange.as_fd()];
        near.send_command(&Command::Build(config), &fds).expect("Build");
        let Ok(Event::Built(shell)) = near.receive_event() else { panic!("not built") };
        Self { child, control: near, exchange, shell }
    }

    /// A shell that goes on from a state.
    fn restored() -> Self {
        let shard = Self::build();
        assert_eq!(shard.restore(&[], &STATE, &[FdRole::Disk]), Event::Started);
        shard
    }

    fn say(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Event {
        self.control.send_command(command, fds).expect("a command");
        self.control.receive_event().expect("an event")
    }

    fn restore(&self, plan: &[u8], state: &[u8], roles: &[FdRole]) -> Event {
        let plan_bytes = u64::try_from(plan.len()).expect("a length");
        self.exchange.write_all_at(plan, 0).expect("the plan");
        let at = plan_bytes.next_multiple_of(4096);
        self.exchange.write_all_at(state, at).expect("the state");
        let file = memfd(4096);
        let fds: Vec<_> = roles.iter().map(|_| file.as_fd()).collect();
        let config = RestoreConfig {
            plan_bytes,
            state_bytes: u64::try_from(state.len()).expect("a length"),
            generation: [7; 16],
            fds: roles.to_vec(),
        };
        self.say(&Command::Restore(config), &fds)
    }

    fn freeze(&self) -> Vec<u8> {
        let event = self.say(&Command::Freeze, &[]);
        let Event::Frozen { state_bytes, .. } = event else {
            panic!("{event:?} instead of a stop")
        };
        let mut state = vec![0; usize::try_from(state_bytes).expect("a length")];
        self.exchange.read_exact_at(&mut state, 0).expect("the state");
        state
    }

    /// A stream to the gateway, for `preamble`, not answered yet.
    fn stream(&self, preamble: Preamble) -> UnixStream {
        let (mut near, far) = UnixStream::pair().expect("a socket pair");
        near.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let open = Command::OpenStream { vsock_port: GATEWAY_PORT };
        self.control.send_command(&open, &[far.as_fd()]).expect("OpenStream");
        near.write_all(&preamble.encode()).expect("the preamble");
        near
    }

    fn ask(&self, request: &ControlRequest) -> ControlReply {
        let mut stream = self.stream(Preamble::Control);
        let mut line = serde_json::to_vec(request).expect("JSON");
        line.push(b'\n');
        stream.write_all(&line).expect("the request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("the answer");
        assert_eq!(answer.remove(0), 0, "the verdict is: open");
        serde_json::from_slice(&answer).expect("a reply")
    }

    /// The number in the mark that a stop leaves in guest memory, read as a shard reads it.
    fn mark(&self, page: u64) -> u64 {
        let memory = File::open(format!("/proc/{}/mem", self.child.id())).expect("its memory");
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, self.shell.memory_address + page * 4096).expect("a page");
        u64::from_le_bytes(bytes)
    }

    /// Waits for its end, and gives what it said last.
    fn ending(mut self) -> Ending {
        let Ok(Event::Ended(ending)) = self.control.receive_event() else { panic!("no end") };
        self.child.wait().expect("its end");
        ending
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn memfd(bytes: u64) -> File {
    let fd: OwnedFd = memfd_create("standin-test", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, bytes).expect("its length");
    fd.into()
}

fn init(machine_id: &str) -> ControlRequest {
    ControlRequest::Init(InitRequest {
        sandbox_id: "i0123456789abcdefghij".to_owned(),
        template_id: "tpl".to_owned(),
        machine_id: machine_id.to_owned(),
        access_token: None,
        env_vars: std::collections::BTreeMap::new(),
        wall_clock_unix_ns: 1,
        new_sandbox: true,
        defaults: None,
    })
}

#[test]
fn a_state_goes_on_and_is_saved_again() {
    let shard = Shard::restored();
    assert_eq!(shard.mark(40), 1, "the state that it was restored from");
    assert_eq!(shard.mark(41), 0, "nothing else is written");
    let warm = shard.ask(&ControlRequest::Warm { deadline_ms: 1000 });
    assert_eq!((warm.envd_version.as_str(), warm.error), (ENVD_VERSION, None));
    assert_eq!(shard.ask(&init("0123456789abcdef0123456789abcdef")).error, None);
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", shard.child.id()));
    assert_eq!(comm.ok().as_deref(), Some("i0123456789abcd\n"), "ps shows whose it is");
    assert!(shard.ask(&init("0123")).error.is_some(), "a real agent would refuse that as well");

    let state = shard.freeze();
    assert_eq!(state, *b"STANDIN1\x02\0\0\0\0\0\0\0");
    assert_eq!(shard.mark(40), 2);
    let Event::Status { nonce: 9, phase: Phase::Frozen, shell: Some(shell) } =
        shard.say(&Command::Report { nonce: 9 }, &[])
    else {
        panic!("no report")
    };
    assert_eq!(shell, shard.shell);
    assert_eq!(shard.say(&Command::Thaw, &[]), Event::Thawed);
    assert_eq!(shard.freeze()[8], 3);
    assert_eq!(shard.restore(&[], &state, &[]), Event::Started, "a rollback");
    assert_eq!(shard.mark(40), 2);
    shard.control.send_command(&Command::Stop, &[]).expect("Stop");
    assert_eq!(shard.ending(), Ending::Asked);
}

#[test]
fn a_boot_rings_the_doorbell() {
    let shard = Shard::build();
    let kernel = memfd(4096);
    let boot = mica_wire::vm::BootConfig {
        cmdline: "console=ttyS0".to_owned(),
        disk_read_only: false,
        fds: vec![FdRole::Kernel],
    };
    assert_eq!(shard.say(&Command::Boot(boot), &[kernel.as_fd()]), Event::Started);
    for event in [Event::ConsoleStarted, Event::Doorbell] {
        assert_eq!(shard.control.receive_event().ok(), Some(event));
    }
    assert_eq!(shard.ask(&ControlRequest::Warm { deadline_ms: 1 }).error, None);
}

#[test]
fn plans_and_states_out_of_form_end_it() {
    let run = FrameRun::new(0, 4).expect("a run");
    let of_layer = |layer| {
        let source = plan::Source::Map { layer, page: 0 };
        plan::encode(&[plan::Entry { run, source }]).expect("a plan")
    };
    let shard = Shard::build();
    assert_eq!(shard.restore(&of_layer(0), &STATE, &[FdRole::Layer]), Event::Started);
    for (plan, state) in [
        (of_layer(1), STATE.to_vec()),
        (vec![0; 15], STATE.to_vec()),
        (of_layer(0), b"STANDIN2\x01\0\0\0\0\0\0\0".to_vec()),
        (of_layer(0), vec![]),
    ] {
        let shard = Shard::build();
        let event = shard.restore(&plan, &state, &[FdRole::Layer]);
        assert!(matches!(event, Event::Ended(Ending::BadConfig(_))), "{event:?}");
    }
}

#[test]
fn what_is_out_of_turn_ends_it() {
    for command in
        [Command::Freeze, Command::Thaw, Command::OpenStream { vsock_port: GATEWAY_PORT }]
    {
        let shard = Shard::build();
        let event = shard.say(&command, &[]);
        assert!(matches!(event, Event::Ended(Ending::Internal(_))), "{command:?}: {event:?}");
    }
}

#[test]
fn a_stop_holds_streams_and_a_rollback_cuts_them() {
    let shard = Shard::restored();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let preamble = Preamble::Tcp(GuestPort::new(port).expect("a port"));
    let mut early = shard.stream(preamble);
    let (mut served, _) = listener.accept().expect("a connection");
    served.write_all(b"hello").expect("bytes");
    let mut bytes = [0; 6];
    early.read_exact(&mut bytes).expect("the verdict and bytes");
    assert_eq!(&bytes, b"\0hello");

    let state = shard.freeze();
    let mut late = shard.stream(preamble);
    late.set_nonblocking(true).expect("a mode");
    served.write_all(b"again").expect("bytes");
    // A report is answered after the streams before it were taken, so they had their chance.
    shard.say(&Command::Report { nonce: 1 }, &[]);
    let held = late.read(&mut bytes).expect_err("nothing while it is frozen");
    assert_eq!(held.kind(), std::io::ErrorKind::WouldBlock);
    late.set_nonblocking(false).expect("a mode");
    assert_eq!(shard.say(&Command::Thaw, &[]), Event::Thawed);
    let (mut served_late, _) = listener.accept().expect("a connection");
    served_late.write_all(b"late!").expect("bytes");
    late.read_exact(&mut bytes).expect("the verdict and bytes");
    assert_eq!(&bytes, b"\0late!");
    early.read_exact(&mut bytes[..5]).expect("what waited");
    assert_eq!(&bytes[..5], b"again");

    shard.freeze();
    assert_eq!(shard.restore(&[], &state, &[]), Event::Started);
    for mut stream in [early, late] {
        assert_eq!(stream.read(&mut bytes).expect("the end"), 0);
    }
    // The agent is still there.
    shard.stream(preamble);
    listener.accept().expect("a connection");
}

#[test]
fn it_outlives_its_shard_and_the_next_one_finds_it() {
    let mut shard = Shard::restored();
    let (other, _) = ControlSocket::pair().expect("a socket pair");
    drop(std::mem::replace(&mut shard.control, other));
    let number = i32::try_from(shard.child.id()).expect("a number");
    let pid = rustix::process::Pid::from_raw(number).expect("a process id");
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd");
    let spare = pidfd_getfd(&pidfd, shard.shell.spare_fd, PidfdGetfdFlags::empty());
    shard.control = ControlSocket::from_fd(spare.expect("the spare socket"));
    let event = shard.say(&Command::Report { nonce: 3 }, &[]);
    let shell = Some(shard.shell);
    assert_eq!(event, Event::Status { nonce: 3, phase: Phase::Running, shell });
    assert_eq!(shard.freeze()[8], 2);
}
