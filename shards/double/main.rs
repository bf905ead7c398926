//! A test double: plays one VM process, well or badly, or a daemon that can be killed.
//!
//! Run by the tests of this crate: `mica-shards-double vm MOODS --uid N --gid N --netns 1` speaks frames
//! on descriptor 0, in the mood that the file MOODS names at that moment; `mica-shards-double daemon …`
//! does what it is told line by line. Its memory is real, and scanned, read and put back as a guest's;
//! refuses to be anything else like a virtual machine: the "guest" is a thread.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test double that cannot go on must fail its test")]

mod daemon;
mod guest;
mod machine;
mod mood;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::exit;
use std::sync::Arc;
use std::time::Duration;

use mica_numa::userfault::Userfault;
use mica_wire::vm::{
    BootConfig, Command, ControlSocket, Ending, Event, FdRole, Phase, RestoreConfig, Shell,
    ShellConfig,
};

use guest::Streams;
use machine::Machine;
use mood::Mood;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["vm", moods, "--uid", uid, "--gid", gid, "--netns", "1"] => {
            assert_eq!(uid, gid);
            assert!(uid.parse::<u32>().unwrap() >= 10_000);
            vm(&Mood::at(moods));
        }
        ["daemon", ref options @ ..] => daemon::run(options),
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
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    // The original must not keep the socket open.
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null").unwrap()).unwrap();
    ControlSocket::from_fd(stdin)
}

fn vm(mood: &Mood) {
    let socket = Arc::new(control());
    if mood.is("exit-at-once") {
        eprintln!("\x1b[31mthe jail cannot be closed\x1b[0m");
        exit(3);
    }
    socket.send_event(&Event::Spawned { pid: std::process::id() }).unwrap();
    match &*mood.now() {
        "exit-before-the-jail" => {
            eprintln!("\x1b[31mno right to be jailed\x1b[0m");
            exit(3);
        }
        "silent" => hang(),
        "garbage" => send_raw(&socket, b"this is not a frame at all"),
        "too-long" => send_raw(&socket, &vec![0x4d; 60_000]),
        "out-of-turn" => socket.send_event(&Event::Doorbell).unwrap(),
        "deaf" => {
            socket.send_event(&Event::Jailed).unwrap();
            hang();
        }
        _ => {
            socket.send_event(&Event::Jailed).unwrap();
            Vm::build(mood.clone(), socket).run();
        }
    }
    hang();
}

/// A thread that is there and does nothing, as those of vCPUs without a guest. It has its name when this
/// returns: a thread gives it to itself.
fn name_a_thread(name: String) {
    let (named, is_named) = std::sync::mpsc::channel();
    let idle = move || {
        named.send(()).unwrap();
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new().name(name).spawn(idle).unwrap();
    is_named.recv().unwrap();
}

fn send_raw(socket: &ControlSocket, bytes: &[u8]) {
    rustix::net::send(socket, bytes, rustix::net::SendFlags::empty()).unwrap();
}

/// A shell, and then what is restored into it.
struct Vm {
    mood: Mood,
    socket: Arc<ControlSocket>,
    machine: Arc<Machine>,
    streams: Streams,
    shell: Shell,
    exchange: std::fs::File,
    console: OwnedFd,
    /// Keeps the socket open when the daemon dies, as the next one wants it.
    _spare: OwnedFd,
    _userfault: Option<OwnedFd>,
    children: Vec<std::process::Child>,
}

impl Vm {
    fn build(mood: Mood, socket: Arc<ControlSocket>) -> Self {
        let (command, fds) = socket.receive_command().unwrap();
        let Command::Build(config) = command else { panic!("first is Build, not {command:?}") };
        // Of one mood from here to the end of the build, also where a test changes it meanwhile.
        let as_built = mood.now();
        match as_built.as_str() {
            "never-built" => hang(),
            "not-built" => {
                let ending = Ending::Internal("KVM has no more".to_owned());
                socket.send_event(&Event::Ended(ending)).unwrap();
                exit(1);
            }
            _ => {}
        }
        let [spare, console, exchange] = shell_fds(&config, fds);
        for vcpu in 0..config.vcpus {
            name_a_thread(format!("vcpu-{vcpu}"));
        }
        let machine = Machine::new(config.memory(), config.log_writes);
        // Without it nobody can tell writes apart. The shard registers the memory, from outside.
        let userfault = (as_built != "untracked").then(Userfault::create).and_then(Result::ok);
        let shell = Shell {
            memory_address: machine.address(),
            spare_fd: spare.as_raw_fd(),
            exchange_fd: exchange.as_raw_fd(),
            console_fd: console.as_raw_fd(),
            userfault_fd: userfault.as_ref().map(AsRawFd::as_raw_fd),
        };
        // A lie about where memory is must hurt nobody but this sandbox.
        let told = match as_built.as_str() {
            "memory-nowhere" => Shell { memory_address: u64::MAX - 4095, ..shell },
            "memory-elsewhere" => Shell { memory_address: 4096, ..shell },
            _ => shell,
        };
        socket.send_event(&Event::Built(told)).unwrap();
        if as_built == "second-built" {
            socket.send_event(&Event::Built(shell)).unwrap();
        }
        if as_built == "dies-in-the-pool" {
            std::thread::sleep(Duration::from_millis(20));
            exit(1);
        }
        Self {
            mood,
            socket,
            machine,
            streams: Streams::default(),
            shell: told,
            exchange: exchange.into(),
            console,
            _spare: spare,
            _userfault: userfault,
            children: Vec::new(),
        }
    }

    fn run(mut self) -> ! {
        loop {
            let (command, fds) = self.socket.receive_command().unwrap();
            match command {
                Command::Build(_) => panic!("Build comes once"),
                Command::Boot(config) => self.boot(&config, fds),
                Command::Restore(config) => self.restore(&config, fds),
                Command::OpenStream { vsock_port } => self.open_stream(vsock_port, fds),
                Command::Freeze => self.freeze(),
                Command::Thaw => self.thaw(),
                Command::Report { nonce } => self.report(nonce),
                Command::Stop => self.end(Ending::Asked),
            }
        }
    }

    fn say(&self, event: &Event) {
        self.socket.send_event(event).unwrap();
    }

    fn end(&self, ending: Ending) -> ! {
        self.say(&Event::Ended(ending));
        exit(0)
    }

    fn restore(&mut self, config: &RestoreConfig, fds: Vec<OwnedFd>) {
        let first = self.machine.phase() == Phase::Idle;
        self.machine.expect_standing();
        if first {
            write_console(&self.console, b"\x1b[2Jhello from the console\r\n");
        }
        let failing = if first { "bad-restore" } else { "bad-rollback" };
        if self.mood.is(failing) || first && self.mood.is_turn("bad-restore") {
            self.end(Ending::BadConfig("no such state".to_owned()));
        }
        match &*self.mood.now() {
            "eof-at-restore" => exit(1),
            "never-starts" => hang(),
            "dies-at-rollback" if !first => exit(1),
            "never-rolls-back" if !first => hang(),
            _ => {}
        }
        self.machine.restore(config, fds, &self.exchange);
        self.streams.cut();
        if self.mood.is("panics") {
            write_console(&self.console, b"Kernel panic - not syncing: no init found\n");
            self.end(Ending::Reset);
        }
        if self.mood.is("with-children") && first {
            self.children = guest::start_children();
        }
        self.say(&Event::Started);
        if self.mood.is("starts-twice") {
            self.say(&Event::Started);
        }
        if first && self.mood.is("speaks") {
            // Once in a life, and never an answer to anything.
            self.say(&Event::ConsoleStarted);
            self.say(&Event::Doorbell);
        }
        self.machine.go_on();
    }

    fn boot(&mut self, config: &BootConfig, fds: Vec<OwnedFd>) {
        match &*self.mood.now() {
            "bad-boot" => self.end(Ending::BadConfig("no such kernel".to_owned())),
            "never-starts" => hang(),
            _ => {}
        }
        self.machine.boot(config, fds);
        self.say(&Event::Started);
        self.machine.go_on();
        if self.mood.is("never-rings") {
            return;
        }
        self.say(&Event::ConsoleStarted);
        self.say(&Event::Doorbell);
    }

    fn open_stream(&self, vsock_port: u32, mut fds: Vec<OwnedFd>) {
        assert_eq!(vsock_port, mica_wire::guest::GATEWAY_PORT);
        assert_ne!(self.machine.phase(), Phase::Idle, "a stream into a shell");
        let stream = fds.pop().unwrap().into();
        guest::serve(&self.mood, stream, &self.streams, &self.machine, &self.socket);
        if self.mood.is("stops-reading") {
            // After the exchange with the agent no command is ever taken again.
            hang();
        }
    }

    fn freeze(&self) {
        match &*self.mood.now() {
            "never-freezes" => return,
            "dies-at-freeze" => exit(1),
            "ends-at-freeze" => self.end(Ending::TripleFault),
            _ => {}
        }
        let frozen = self.machine.freeze(&self.exchange);
        let frozen = match (&*self.mood.now(), frozen) {
            ("log-too-long", Event::Frozen { state_bytes, .. }) => {
                Event::Frozen { state_bytes, log_bytes: u64::MAX }
            }
            ("log-too-short", Event::Frozen { state_bytes, log_bytes }) => {
                Event::Frozen { state_bytes, log_bytes: log_bytes / 2 }
            }
            ("state-too-long", _) => Event::Frozen { state_bytes: 3 << 20, log_bytes: 0 },
            ("state-longer-than-the-exchange", _) => {
                Event::Frozen { state_bytes: u64::MAX, log_bytes: 0 }
            }
            ("state-empty", _) => Event::Frozen { state_bytes: 0, log_bytes: 0 },
            (_, frozen) => frozen,
        };
        self.say(&frozen);
        match &*self.mood.now() {
            "frozen-twice" => self.say(&frozen),
            "thaws-unasked" => self.say(&Event::Thawed),
            "dies-frozen" => exit(1),
            "garbage-when-frozen" => send_raw(&self.socket, &[0xff; 100]),
            _ => {}
        }
    }

    fn thaw(&self) {
        self.machine.expect_standing();
        match &*self.mood.now() {
            "never-thaws" => return,
            "dies-at-thaw" => exit(1),
            _ => {}
        }
        self.machine.go_on();
        self.say(&Event::Thawed);
        if self.mood.is("thaws-twice") {
            self.say(&Event::Thawed);
        }
    }

    fn report(&self, nonce: u64) {
        match &*self.mood.now() {
            "never-reports" => return,
            "reports-garbage" => return send_raw(&self.socket, &[0xff; 100]),
            "reports-idle" => return self.report_as(nonce, Phase::Idle),
            // What a daemon asked that is gone. It was another time.
            "reports-to-another" => {
                self.report_as(nonce.wrapping_add(1), Phase::Frozen);
                self.report_as(nonce.wrapping_add(2), self.machine.phase());
            }
            _ => {}
        }
        self.report_as(nonce, self.machine.phase());
    }

    fn report_as(&self, nonce: u64, phase: Phase) {
        self.say(&Event::Status { nonce, phase, shell: Some(self.shell) });
    }
}

/// Spare socket, console and exchange.
fn shell_fds(config: &ShellConfig, fds: Vec<OwnedFd>) -> [OwnedFd; 3] {
    assert_eq!(config.fds.len(), fds.len());
    let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
    [FdRole::Spare, FdRole::Console, FdRole::Exchange].map(|role| {
        let at = config.fds.iter().position(|known| *known == role).unwrap();
        fds[at].take().unwrap()
    })
}

fn write_console(console: &OwnedFd, text: &[u8]) {
    let mut total = [0u8; 8];
    rustix::io::pread(console, &mut total, 0).unwrap();
    let written = u64::from_le_bytes(total);
    rustix::io::pwrite(console, text, 8 + written).unwrap();
    let total = written + text.len() as u64;
    rustix::io::pwrite(console, &total.to_le_bytes(), 0).unwrap();
}
