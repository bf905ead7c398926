//! Starts `mica serve` with a store of its own and the stand-in VM, and ends it.
//!
//! Called by every test: each has its own daemon, so that none sees another's sandboxes. Refuses to
//! leave anything behind, also when the test fails.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Connection, PATIENCE, Reply};
use crate::programs::{
    WITHOUT_LOGIN_FILES, guest, guest_agent, vm_program, write_vm_program, write_vm_script,
};
use crate::template::{TEMPLATE, make_template};

/// How much of a name the kernel keeps.
const NAME_BYTES: usize = 15;

/// Options for a daemon that makes no VM process but for a sandbox, so that what it holds changes with
/// those alone.
pub const NO_POOL: [&str; 4] = ["--pool-min", "0", "--pool-max", "0"];

/// A running daemon.
pub struct Daemon {
    command: Command,
    child: Child,
    address: SocketAddr,
    key: String,
    directory: PathBuf,
    cgroup: PathBuf,
}

impl Daemon {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With more options than the usual ones.
    pub fn start_with(options: &[&str]) -> Self {
        Self::start_in(options, |_| {})
    }

    /// The same, once `prepare` has seen the directory in which the daemon keeps everything.
    pub fn start_in(options: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        Self::start_as(options, prepare, |_| {})
    }

    /// The same, once `change` has seen the command.
    pub fn start_as(
        options: &[&str],
        prepare: impl FnOnce(&Path),
        change: impl FnOnce(&mut Command),
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mica-api-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&directory).expect("a directory");
        prepare(&directory);
        make_template(&directory);
        let (cgroup_root, limits) = cgroup();
        let cgroup = cgroup_root.join(&name);
        let address = free_address();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command
            .args(["serve", "--listen", &address.to_string()])
            .arg("--store")
            .arg(directory.join("store"))
            .arg("--key-file")
            .arg(directory.join("keys"))
            .arg("--vm-program")
            .arg(vm_program(&directory))
            .arg("--cgroup-root")
            .arg(&cgroup)
            .args(options)
            .env("MICA_LOG", "error")
            .stdin(Stdio::null());
        if !limits {
            command.arg("--without-cgroup-limits");
        }
        // Two shards, so that requests have to cross from one to the other.
        if !options.contains(&"--shards") {
            command.args(["--shards", "2"]);
        }
        change(&mut command);
        let child = command.spawn().expect("mica serve");
        let key = String::new();
        let mut daemon = Self { command, child, address, key, directory, cgroup };
        daemon.wait_until_up();
        // An open one makes none.
        let keys = std::fs::read_to_string(daemon.directory.join("keys")).unwrap_or_default();
        keys.trim().clone_into(&mut daemon.key);
        daemon
    }

    /// `mica key …` on the daemon's key database: what it printed.
    pub fn key_command(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_mica"))
            .arg("key")
            .args(arguments)
            .arg("--key-db")
            .arg(self.key_database())
            .output()
            .expect("mica key");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn key_database(&self) -> PathBuf {
        self.directory.join("keys.json")
    }

    /// Makes a key with these options, and waits until the daemon takes it.
    pub fn make_key(&self, options: &[&str]) -> String {
        let key = self.key_command(&[&["create"], options].concat()).trim().to_owned();
        eventually("a new key works", || {
            self.ask_as(&key, "GET", "/templates", None).status == 200
        });
        key
    }

    /// The holdings once they are `wanted`, or stay the same for a moment: the daemon sees closed
    /// connections a moment after they close.
    pub fn settled(&self, wanted: Option<[usize; 4]>) -> [usize; 4] {
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.holdings();
        loop {
            thread::sleep(Duration::from_millis(200));
            let now = self.holdings();
            let done = wanted.map_or(now == last, |wanted| now == wanted);
            if done || Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    /// Kills the daemon outright.
    pub fn crash(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("its end");
        // Sockets of a ring outlive a killed process for a moment, and would take connections that
        // nobody serves.
        eventually("nobody listens", || TcpStream::connect(self.address).is_err());
    }

    /// Starts it again on what it left.
    pub fn restart(&mut self) {
        self.child = self.command.spawn().expect("mica serve");
        self.wait_until_up();
    }

    /// Gives the VM processes from now on more options.
    pub fn change_vm_options(&self, options: &str) {
        write_vm_program(&self.directory.join("vm"), &format!("--builtin-agent {options}"));
    }

    /// Gives the sandboxes from now on the real agent, as a process of this machine.
    pub fn use_real_agent(&self) {
        let options = format!("--guest '{}'", guest().display());
        write_vm_program(&self.directory.join("vm"), &options);
    }

    /// Gives the VM processes from now on the real agent, so that commands run in their sandboxes: as plain
    /// processes of this machine.
    pub fn use_guest_agent(&self) {
        write_vm_script(&self.directory.join("vm"), WITHOUT_LOGIN_FILES, &guest_agent());
    }

    /// Where it keeps everything.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the daemon holds: open files; and of sandboxes their VM processes, their cgroups, and
    /// their directories. A cgroup is the pool's as long as a process waits in it.
    pub fn holdings(&self) -> [usize; 4] {
        let entries = |path: &Path| std::fs::read_dir(path).expect("a directory").count();
        let groups = self.groups();
        // One without a process is left over from a sandbox.
        let of_sandbox = |names: &&Vec<(u32, String)>| names.iter().all(|(_, n)| is_sandbox(n));
        let links =
            std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("a directory");
        // One may be closed while it is looked at. A shard makes its rings when it starts; as long as it
        // waits for one it holds that twice.
        let links =
            links.filter_map(|link| std::fs::read_link(link.expect("an entry").path()).ok());
        [
            links.filter(|link| link.as_os_str() != "anon_inode:[io_uring]").count(),
            self.vm_processes().len(),
            groups.iter().filter(of_sandbox).count(),
            entries(&self.directory.join("store/sandboxes")),
        ]
    }

    /// How much of the daemon's memory is its own and resident.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("a status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.expect("RssAnon") * 1024
    }

    /// Directories of snapshots in the store: committed or not, paused sandboxes' and the template's.
    pub fn snapshots_kept(&self) -> usize {
        let entries = std::fs::read_dir(self.directory.join("store/snapshots"));
        entries.expect("a directory").flatten().filter(|entry| entry.path().is_dir()).count()
    }

    /// Their names, which are the ids of those that are committed.
    pub fn snapshot_directories(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.directory.join("store/snapshots"));
        let names = entries.expect("a directory").flatten().map(|entry| entry.file_name());
        names.map(|name| name.to_string_lossy().into_owned()).collect()
    }

    fn wait_until_up(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.answers() {
            if let Some(status) = self.child.try_wait().expect("the daemon's state") {
                panic!("mica serve ended with {status}; its log is above");
            }
            assert!(Instant::now() < deadline, "mica serve does not listen");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it is up. A connection alone would not tell: sockets of a ring outlive a killed
    /// process for a moment.
    fn answers(&self) -> bool {
        let ask = || {
            let mut stream = TcpStream::connect(self.address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200"))
        };
        ask().unwrap_or(false)
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn connect(&self) -> Connection {
        Connection::open(self.address)
    }

    /// One control-plane request on a connection of its own.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        self.ask_as(&self.key, method, path, body)
    }

    /// The same with another key.
    pub fn ask_as(&self, key: &str, method: &str, path: &str, body: Option<&Value>) -> Reply {
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {key}\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        self.connect().send(head + &body).reply()
    }

    /// Creates a sandbox and gives its id.
    pub fn create(&self) -> String {
        let body = json!({ "templateID": TEMPLATE, "timeout": 300 });
        let reply = self.ask("POST", "/v2/sandboxes", Some(&body));
        assert_eq!(reply.status, 201, "{reply:?}");
        reply.json()["sandboxID"].as_str().expect("an id").to_owned()
    }

    /// One request about a sandbox, without a body.
    pub fn act(&self, id: &str, action: &str) -> Reply {
        self.ask("POST", &format!("/sandboxes/{id}/{action}"), None)
    }

    /// One request about a sandbox.
    pub fn act_with(&self, id: &str, action: &str, body: &Value) -> Reply {
        self.ask("POST", &format!("/sandboxes/{id}/{action}"), Some(body))
    }

    /// What `GET` says of a sandbox.
    pub fn get(&self, id: &str) -> Reply {
        self.ask("GET", &format!("/sandboxes/{id}"), None)
    }

    pub fn delete(&self, id: &str) -> Reply {
        self.ask("DELETE", &format!("/sandboxes/{id}"), None)
    }

    /// The state of a sandbox that is there.
    pub fn state(&self, id: &str) -> String {
        let reply = self.get(id);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["state"].as_str().expect("a state").to_owned()
    }

    /// Makes a snapshot and gives its id.
    pub fn snapshot(&self, id: &str) -> String {
        let reply = patiently(|| self.act(id, "snapshots"));
        assert_eq!(reply.status, 201, "{reply:?}");
        reply.json()["snapshotID"].as_str().expect("an id").to_owned()
    }

    /// Pauses a sandbox, which must work.
    pub fn pause(&self, id: &str) {
        let reply = patiently(|| self.act(id, "pause"));
        assert_eq!((reply.status, reply.body.len()), (204, 0), "{reply:?}");
    }

    /// Sends a request from a thread of its own: for what does not come back before something else
    /// happens.
    pub fn begin(&self, method: &str, path: &str, body: Option<&Value>) -> JoinHandle<Reply> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {}\r\n\
             content-length: {}\r\n\r\n{body}",
            self.key,
            body.len()
        );
        let mut connection = self.connect();
        thread::spawn(move || connection.send(request).reply())
    }

    /// A connection on which a request head for a port of a sandbox was begun: what is missing are
    /// further headers and the empty line.
    pub fn to_sandbox(&self, id: &str, port: u16, request_line: &str) -> Connection {
        let mut connection = self.connect();
        connection.send(format!(
            "{request_line} HTTP/1.1\r\nhost: localhost\r\ne2b-sandbox-id: {id}\r\n\
             e2b-sandbox-port: {port}\r\n"
        ));
        connection
    }

    pub fn healthy(&self) {
        assert_eq!(self.ask("GET", "/health", None).status, 200);
    }

    /// Process ids of the VMs that are a sandbox. The stand-in takes its sandbox's name once it is
    /// one; what waits in the pool, or is on its way there, has the program's.
    pub fn vm_processes(&self) -> Vec<u32> {
        let sandboxes = self.processes().into_iter().filter(|(_, name)| is_sandbox(name));
        sandboxes.map(|(id, _)| id).collect()
    }

    /// The process that is this sandbox.
    pub fn vm_of(&self, id: &str) -> u32 {
        let shown = &id[..NAME_BYTES];
        let found = self.processes().into_iter().find(|(_, name)| name == shown);
        found.unwrap_or_else(|| panic!("no process is called {shown}")).0
    }

    /// Every process below the daemon's cgroup, with its name.
    pub fn processes(&self) -> Vec<(u32, String)> {
        self.groups().into_iter().flatten().collect()
    }

    /// The cgroups of VM processes: what runs in each, with its name.
    fn groups(&self) -> Vec<Vec<(u32, String)>> {
        let name = |id: u32| std::fs::read_to_string(format!("/proc/{id}/comm")).ok();
        let processes = |list: String| {
            let ids = list.lines().map(|line| line.parse().expect("a process id"));
            ids.filter_map(|id| Some((id, name(id)?.trim().to_owned()))).collect()
        };
        let groups = std::fs::read_dir(&self.cgroup).into_iter().flatten().flatten();
        let lists = groups.map(|group| group.path().join("cgroup.procs"));
        // A group may go while it is looked at, and so may a process.
        lists.filter_map(|list| std::fs::read_to_string(list).ok()).map(processes).collect()
    }

    /// Names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let names = tasks.expect("its threads").flatten().map(|task| task.path().join("comm"));
        names
            .filter_map(|name| Some(std::fs::read_to_string(name).ok()?.trim().to_owned()))
            .collect()
    }

    pub fn signal(&self, name: &str) {
        kill(name, self.child.id());
    }

    /// Waits for the daemon's own end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the daemon's state") {
                return status;
            }
            assert!(Instant::now() < deadline, "mica serve does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // First as an operator would, so that the daemon removes its own cgroups and disks.
        if matches!(self.child.try_wait(), Ok(None)) {
            kill("TERM", self.child.id());
            let deadline = Instant::now() + PATIENCE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
        // VM processes outlive a daemon that was killed.
        drop(std::fs::write(self.cgroup.join("cgroup.kill"), "1"));
        let deadline = Instant::now() + PATIENCE;
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let groups = std::fs::read_dir(&self.cgroup).into_iter().flatten().flatten();
        for group in groups.filter(|entry| entry.path().is_dir()) {
            drop(std::fs::remove_dir(group.path()));
        }
        drop(std::fs::remove_dir(&self.cgroup));
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

/// Whether a process has the name of a sandbox, as far as the kernel keeps it.
fn is_sandbox(name: &str) -> bool {
    name.len() == NAME_BYTES && name.starts_with('i')
}

/// Asks again for as long as the answer is that another operation has the sandbox, as a client is
/// told to: one that failed may still be letting the guest go on.
pub fn patiently(ask: impl Fn() -> Reply) -> Reply {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reply = ask();
        let busy = reply.status == 409 && reply.headers.contains_key("retry-after");
        if !busy || Instant::now() > deadline {
            return reply;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `holds`, within the patience.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not yet after all this time: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub fn kill(signal: &str, process: u32) {
    let status =
        Command::new("kill").args(["-s", signal, &process.to_string()]).status().expect("kill");
    assert!(status.success(), "process {process} is gone");
}

pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port")
}

/// Where cgroup v2 is mounted, and whether it has the controllers that limits need.
pub fn cgroup() -> (PathBuf, bool) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    });
    let mount = mount.expect("cgroup v2 is not mounted; mount it at /sys/fs/cgroup");
    let controllers = std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let has = |wanted| controllers.split_whitespace().any(|name| name == wanted);
    (mount, has("memory") && has("pids"))
}
