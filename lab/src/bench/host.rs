//! A host that runs, as a client of its control plane sees it: connections, calls with their times, and what
//! every run has made there.
//!
//! Called by the tables. Knows E2B's API with CubeSandbox's rollback and our clone. Refuses to leave
//! anything behind: what it made is removed by [`Host::clean`], and at the latest when it is dropped.

use std::collections::BTreeSet;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::engine::client::{Answer, Client};

/// Life of the sandboxes, should nobody be left to kill them.
const LIFE_S: u32 = 3600;
/// The label of everything that a run makes, with the run's own name as its value.
const LABEL: &str = "mica-bench";
/// Longest wait for a sandbox that another operation has.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to leave such a sandbox alone.
const BUSY: Duration = Duration::from_millis(20);
/// Clients that remove what is left at once.
const CLEANERS: usize = 8;
/// Rounds of looking for what is left.
const SWEEPS_MAX: usize = 100;

/// A sandbox, as its create was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// What its agent asks for; empty where it asks for nothing.
    pub token: String,
    /// What the names of its ports end in.
    pub domain: String,
}

/// One call: when it began, how long the answer took, and what came of it.
#[derive(Debug)]
pub struct Timed<T> {
    /// When it was sent.
    pub begun: Instant,
    /// Until the whole answer was there.
    pub took: Duration,
    /// What it was, or what went wrong.
    pub value: Result<T>,
}

impl<T> Timed<T> {
    /// Makes something else of the answer, outside of the time.
    pub fn and_then<U>(self, make: impl FnOnce(T) -> Result<U>) -> Timed<U> {
        Timed { begun: self.begun, took: self.took, value: self.value.and_then(make) }
    }
}

/// What a run has made and not removed.
#[derive(Debug, Default)]
struct Made {
    sandboxes: BTreeSet<String>,
    snapshots: BTreeSet<String>,
    /// Sandboxes of which a snapshot may have been made whose answer never came.
    unsure: BTreeSet<String>,
}

/// Where it is, and who asks.
#[derive(Clone, Debug)]
pub struct Address {
    /// As `http://HOST:PORT`.
    pub url: String,
    /// One of its keys.
    pub api_key: String,
    /// What sandboxes are made of.
    pub template: String,
}

/// A host under measurement.
#[derive(Debug)]
pub struct Host {
    /// Where.
    pub socket: SocketAddr,
    /// As it was given.
    pub address: Address,
    run: String,
    stop: Arc<AtomicBool>,
    made: Mutex<Made>,
    idle: Mutex<Vec<Client>>,
}

impl Host {
    /// Finds it. `stop` is set by who wants the run to end early.
    ///
    /// # Errors
    /// When the URL is no URL of a host.
    pub fn new(address: Address, stop: Arc<AtomicBool>) -> Result<Self> {
        let socket = socket_of(&address.url)?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let run = format!("{}-{:x}", std::process::id(), since.as_nanos());
        let (made, idle) = (Mutex::default(), Mutex::default());
        Ok(Self { socket, address, run, stop, made, idle })
    }

    /// # Errors
    /// When the run is to end.
    pub fn go_on(&self) -> Result<()> {
        ensure!(!self.stopped(), "interrupted");
        Ok(())
    }

    /// Whether the run is to end.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Leaves the host alone for so long, or until the run is to end.
    pub fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.stopped() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// A connection to the control plane, of those that wait or a new one.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn client(&self) -> Result<Client> {
        while let Some(client) = lock(&self.idle).pop() {
            if client.is_open() {
                return Ok(client);
            }
        }
        let key = self.address.api_key.as_str();
        Client::open(self.socket, &[("X-API-Key", key), ("Content-Type", "application/json")])
    }

    /// Takes a connection back that may be used again.
    pub fn give_back(&self, client: Client) {
        if client.is_open() {
            lock(&self.idle).push(client);
        }
    }

    /// A connection to a port of a sandbox.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn to_sandbox(&self, sandbox: &Sandbox, port: u16, content_type: &str) -> Result<Client> {
        let port = port.to_string();
        let headers = [
            ("E2b-Sandbox-Id", sandbox.id.as_str()),
            ("E2b-Sandbox-Port", port.as_str()),
            ("X-Access-Token", sandbox.token.as_str()),
            ("Content-Type", content_type),
            ("Connect-Protocol-Version", "1"),
        ];
        Client::open(self.socket, &headers)
    }

    /// A connection to a port of a sandbox, by the name that browsers use.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn by_name(&self, sandbox: &Sandbox, port: u16) -> Result<Client> {
        let Sandbox { id, domain, .. } = sandbox;
        Client::open_as(self.socket, &format!("{port}-{id}.{domain}"), &[])
    }

    /// Starts a sandbox of a template or of a snapshot.
    pub fn create(&self, client: &mut Client, of: &str) -> Timed<Sandbox> {
        let body = json!({
            "templateID": of, "timeout": LIFE_S, "metadata": { LABEL: self.run },
        });
        timed(client, "POST", "/sandboxes", &body, &[200, 201]).and_then(|answer| {
            let sandbox = sandbox_of(&answer)?;
            lock(&self.made).sandboxes.insert(sandbox.id.clone());
            Ok(sandbox)
        })
    }

    /// Ends a sandbox.
    pub fn kill(&self, client: &mut Client, id: &str) -> Timed<()> {
        let path = format!("/sandboxes/{id}");
        let call = timed(client, "DELETE", &path, &Value::Null, &[200, 204, 404]);
        call.and_then(|_| {
            lock(&self.made).sandboxes.remove(id);
            Ok(())
        })
    }

    /// Makes a snapshot and gives its id.
    pub fn snapshot(&self, client: &mut Client, id: &str) -> Timed<String> {
        let path = format!("/sandboxes/{id}/snapshots");
        let call = timed(client, "POST", &path, &json!({}), &[200, 201]).and_then(|answer| {
            let snapshot = text_of(&answer, "snapshotID")?;
            lock(&self.made).snapshots.insert(snapshot.clone());
            Ok(snapshot)
        });
        if call.value.is_err() {
            lock(&self.made).unsure.insert(id.to_owned());
        }
        call
    }

    /// Deletes a snapshot.
    pub fn delete_snapshot(&self, client: &mut Client, id: &str) -> Timed<()> {
        let path = format!("/templates/{id}");
        let call = timed(client, "DELETE", &path, &Value::Null, &[200, 204, 404]);
        call.and_then(|_| {
            lock(&self.made).snapshots.remove(id);
            Ok(())
        })
    }

    /// Puts a sandbox back to a snapshot of its own.
    pub fn rollback(&self, client: &mut Client, id: &str, snapshot: &str) -> Timed<()> {
        let body = json!({ "snapshotID": snapshot });
        timed(client, "POST", &format!("/sandboxes/{id}/rollback"), &body, &[200]).and_then(nothing)
    }

    /// Has the host make so many copies of a sandbox in one request.
    pub fn clone_in_one(&self, client: &mut Client, id: &str, count: usize) -> Timed<Vec<Sandbox>> {
        let body = json!({ "count": count, "timeout": LIFE_S });
        let path = format!("/sandboxes/{id}/clone");
        timed(client, "POST", &path, &body, &[201]).and_then(|answer| {
            let list = answer.as_array().context("an answer that is no list")?;
            let copies = list.iter().map(sandbox_of).collect::<Result<Vec<_>>>()?;
            let mut made = lock(&self.made);
            made.sandboxes.extend(copies.iter().map(|copy| copy.id.clone()));
            ensure!(copies.len() == count, "{} copies of {count} were made", copies.len());
            Ok(copies)
        })
    }

    /// Pauses a sandbox, and looks whether it is: both are in the time, as CubeSandbox's client does it.
    pub fn pause(&self, client: &mut Client, id: &str) -> Timed<()> {
        let begun = Instant::now();
        let value = self.pause_and_look(client, id);
        Timed { begun, took: begun.elapsed(), value }
    }

    fn pause_and_look(&self, client: &mut Client, id: &str) -> Result<()> {
        let path = format!("/sandboxes/{id}");
        timed(client, "POST", &format!("{path}/pause"), &json!({}), &[200, 204]).value?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = timed(client, "GET", &path, &Value::Null, &[200]).value?;
            if seen["state"] == "paused" {
                return Ok(());
            }
            self.go_on()?;
            ensure!(Instant::now() < deadline, "{id} is not paused");
            std::thread::sleep(BUSY);
        }
    }

    /// Lets a paused sandbox go on.
    pub fn resume(&self, client: &mut Client, id: &str) -> Timed<()> {
        let body = json!({ "timeout": LIFE_S });
        let path = format!("/sandboxes/{id}/resume");
        timed(client, "POST", &path, &body, &[200, 201]).and_then(nothing)
    }

    /// Any `GET` that is answered 200: the body.
    ///
    /// # Errors
    /// When it is not.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut client = self.client()?;
        let body = client.call("GET", path, b"", 200);
        self.give_back(client);
        body
    }

    /// What a sandbox takes of memory that it shares with nobody, as the host's metrics have it.
    ///
    /// # Errors
    /// When the host shows no metrics, or not to this key.
    pub fn memory_of(&self, sandbox: &Sandbox) -> Result<u64> {
        let text = String::from_utf8(self.get("/metrics/sandboxes")?)?;
        let own = format!("sandbox=\"{}\"", sandbox.id);
        let found = text.lines().find_map(|line| {
            let rest = line.strip_prefix("mica_sandbox_memory_bytes{")?;
            let (labels, value) = rest.rsplit_once('}')?;
            labels.split(',').any(|label| label.trim() == own).then_some(value.trim())
        });
        found.context("it has no memory in /metrics/sandboxes")?.parse().context("its memory")
    }

    /// Kills these and deletes those, with a few clients at once.
    ///
    /// # Errors
    /// With the first failure, after everything was tried.
    pub fn remove(&self, sandboxes: &[String], snapshots: &[String]) -> Result<()> {
        // A host may refuse to delete what something that lives was made of.
        self.each(sandboxes, |client, id| self.kill(client, id).value)?;
        self.each(snapshots, |client, id| self.delete_snapshot(client, id).value)
    }

    fn each(
        &self,
        ids: &[String],
        act: impl Fn(&mut Client, &str) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = Mutex::new(ids.iter());
        let work = || -> Result<()> {
            let mut client = self.client()?;
            let mut first = Ok(());
            loop {
                let Some(id) = lock(&next).next() else { break };
                if let Err(error) = patiently(&mut client, self, |client| act(client, id)) {
                    first = first.and(Err(error.context(format!("remove {id}"))));
                }
            }
            self.give_back(client);
            first
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..CLEANERS.min(ids.len())).map(|_| scope.spawn(work)).collect();
            let panicked = |_| Err(anyhow!("a client panicked"));
            let done: Vec<_> =
                threads.into_iter().map(|one| one.join().unwrap_or_else(panicked)).collect();
            done.into_iter().collect()
        })
    }

    /// Removes everything that the run has made, also what it does not know of because an answer never came.
    ///
    /// # Errors
    /// When something stays.
    pub fn clean(&self) -> Result<()> {
        let made = std::mem::take(&mut *lock(&self.made));
        let mut snapshots: Vec<String> = made.snapshots.into_iter().collect();
        for id in &made.unsure {
            snapshots.extend(self.listed(&format!("/snapshots?sandboxID={id}"), "snapshotID")?);
        }
        let sandboxes: Vec<String> = made.sandboxes.into_iter().collect();
        let removed = self.remove(&sandboxes, &snapshots);
        let swept = self.sweep();
        removed.and(swept)
    }

    /// Ends what has the run's label.
    fn sweep(&self) -> Result<()> {
        // The value is itself a query, encoded.
        let path =
            format!("/v2/sandboxes?limit=100&state=running,paused&metadata={LABEL}%3D{}", self.run);
        for _ in 0..SWEEPS_MAX {
            let left = self.listed(&path, "sandboxID")?;
            if left.is_empty() {
                return Ok(());
            }
            self.remove(&left, &[])?;
        }
        Err(anyhow!("there are always more sandboxes with the label {LABEL}={}", self.run))
    }

    fn listed(&self, path: &str, field: &str) -> Result<Vec<String>> {
        let list: Value = serde_json::from_slice(&self.get(path)?)?;
        let list = list.as_array().with_context(|| format!("{path} gives no list"))?;
        list.iter().map(|entry| text_of(entry, field)).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let made = lock(&self.made);
        let all_gone = made.sandboxes.is_empty() && made.snapshots.is_empty();
        drop(made);
        if !all_gone && let Err(error) = self.clean() {
            eprintln!("mica-bench: something may be left on the host: {error:#}");
        }
    }
}

/// Tries again while another operation has the sandbox, and on a new connection if one breaks.
fn patiently(
    client: &mut Client,
    host: &Host,
    act: impl Fn(&mut Client) -> Result<()>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = act(client);
        let broken = !client.is_open();
        let busy = done.as_ref().is_err_and(|error| format!("{error:#}").contains(" gave 409"));
        if broken {
            *client = host.client()?;
        }
        if done.is_ok() || !(broken || busy) || Instant::now() > deadline {
            return done;
        }
        std::thread::sleep(BUSY);
    }
}

/// One call, whose answer must have one of these statuses. An empty body is `null`.
pub fn timed(
    client: &mut Client,
    method: &str,
    path: &str,
    body: &Value,
    wanted: &[u16],
) -> Timed<Value> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let begun = Instant::now();
    let answer = client.ask(method, path, body.as_bytes());
    let took = begun.elapsed();
    let value = answer.and_then(|answer| {
        let Answer { status, body } = answer.one_of(method, path, wanted)?;
        // A body that says an error of a status that is good enough is nobody's answer.
        if body.is_empty() || status == 404 {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).with_context(|| format!("{method} {path}: not JSON"))
    });
    Timed { begun, took, value }
}

fn nothing(_: Value) -> Result<()> {
    Ok(())
}

fn sandbox_of(answer: &Value) -> Result<Sandbox> {
    let token = answer["envdAccessToken"].as_str().unwrap_or_default().to_owned();
    // A host that was given no domain takes any.
    let domain = answer["domain"].as_str().unwrap_or("sandbox.example").to_owned();
    Ok(Sandbox { id: text_of(answer, "sandboxID")?, token, domain })
}

fn text_of(answer: &Value, field: &str) -> Result<String> {
    let text = answer[field].as_str().with_context(|| format!("an answer without {field}"))?;
    // It becomes part of a path.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    ensure!(!text.is_empty() && text.bytes().all(plain), "{field} is {text:?}");
    Ok(text.to_owned())
}

/// Where `http://HOST:PORT` is.
///
/// # Errors
/// When it is something else, or nowhere.
pub fn socket_of(url: &str) -> Result<SocketAddr> {
    let host = url.strip_prefix("http://").context("--url must begin with http://")?;
    let host = host.trim_end_matches('/');
    let found = host.to_socket_addrs().with_context(|| format!("--url: find {host}"))?.next();
    found.with_context(|| format!("--url: {host} has no address"))
}

/// A lock that a panic elsewhere does not make useless.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
