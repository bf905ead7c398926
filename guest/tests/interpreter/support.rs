//! An interpreter with real kernels behind real HTTP, and a client for it.
//!
//! Used by the tests beside it. Starts nothing without a Python that has the kernels.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mica_guest::http::{Router, serve};
use mica_guest::interpreter::{Interpreter, LaunchSpec, Launcher, add_routes};
use mica_guest::sandbox::{Sandbox, Services, TemplateSettings};
use mica_wire::guest::InitRequest;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::required;

/// Longest any one step may take; a kernel under load is slow to start.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn python() -> Option<PathBuf> {
    let given = std::env::var_os("MICA_TEST_PYTHON").map(PathBuf::from);
    if given.is_none() {
        let text = "MICA_TEST_PYTHON is not set: nothing is checked against a real kernel";
        required::skip("TEST_PYTHON", text);
    }
    given
}

/// Starts the program as whoever runs the tests.
pub fn plain_launcher() -> Launcher {
    Arc::new(|spec: &LaunchSpec| {
        let mut command = tokio::process::Command::new(&spec.program);
        command
            .args(&spec.args)
            .env_clear()
            .envs(&spec.env)
            .current_dir(&spec.cwd)
            .process_group(0);
        Ok(command)
    })
}

pub struct Server {
    address: SocketAddr,
    pub directory: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Kernels end with the runtime; what they leave is in here.
        std::fs::remove_dir_all(&self.directory).unwrap_or_default();
    }
}

pub async fn server_with(python: PathBuf, env_vars: BTreeMap<String, String>) -> Server {
    server_of(python, env_vars, &[]).await
}

/// One whose template starts these kernels too. They have been rehearsed, as before a template is
/// saved, when this returns.
pub async fn server_of(
    python: PathBuf,
    env_vars: BTreeMap<String, String>,
    kernels: &[&str],
) -> Server {
    server_by(plain_launcher(), python, env_vars, kernels).await
}

/// The same, whose kernels are started by this.
pub async fn server_by(
    launcher: Launcher,
    python: PathBuf,
    env_vars: BTreeMap<String, String>,
    kernels: &[&str],
) -> Server {
    let kernels: Vec<String> = kernels.iter().map(|name| (*name).to_owned()).collect();
    let services = Services { interpreter: true, kernels };
    let rehearses = !services.kernels.is_empty();
    // What the people of this machine have in their `.bashrc` is no part of the tests.
    let env = BTreeMap::from([("HOME".to_owned(), std::env::temp_dir().display().to_string())]);
    let settings = TemplateSettings { services, env, ..TemplateSettings::default() };
    let sandbox = Arc::new(Sandbox::new(settings, true));
    let identity = InitRequest {
        sandbox_id: "test".into(),
        template_id: "test".into(),
        machine_id: "0".repeat(32),
        access_token: None,
        env_vars,
        wall_clock_unix_ns: 0,
        new_sandbox: true,
        defaults: None,
    };
    // A unique name: the address of a listener that is still held.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let directory =
        std::env::temp_dir().join(format!("mica-i-{}-{}", std::process::id(), address.port()));
    let interpreter =
        Arc::new(Interpreter::new(Arc::clone(&sandbox), launcher, python, directory.clone()));
    // As in a template: the kernel starts before the sandbox knows who it is.
    interpreter.warm().unwrap();
    if rehearses {
        timeout(PATIENCE, interpreter.rehearse()).await.unwrap().unwrap();
    }
    sandbox.set_identity(identity);
    let mut router = Router::new(sandbox);
    add_routes(&mut router, &interpreter);
    let router = Arc::new(router);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let router = Arc::clone(&router);
            // A client that goes away early is part of what is tested.
            tokio::spawn(async move { serve(stream, router).await.unwrap_or_default() });
        }
    });
    Server { address, directory }
}

pub async fn server() -> Option<Server> {
    Some(server_with(python()?, BTreeMap::new()).await)
}

impl Server {
    pub async fn open(&self, method: &str, path: &str, body: &str) -> (u16, BufReader<TcpStream>) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        timeout(PATIENCE, reader.read_line(&mut line)).await.unwrap().unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        while line.trim_end() != "" {
            line.clear();
            reader.read_line(&mut line).await.unwrap();
        }
        (status, reader)
    }

    /// Status and whole body, chunk framing taken off.
    pub async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let (status, mut reader) = self.open(method, path, body).await;
        let mut rest = String::new();
        timeout(PATIENCE, reader.read_to_string(&mut rest)).await.unwrap().unwrap();
        (status, rest)
    }

    pub async fn run(&self, request: Value) -> Vec<Value> {
        let (status, mut reader) = self.open("POST", "/execute", &request.to_string()).await;
        assert_eq!(status, 200);
        let mut events = Vec::new();
        while let Some(event) = next_event(&mut reader).await {
            events.push(event);
        }
        let last = events.pop().unwrap();
        assert_eq!(last, json!({"type": "end_of_execution"}));
        events.retain(|event| event["type"] != "keepalive");
        events
    }

    pub async fn code(&self, code: &str) -> Vec<Value> {
        self.run(json!({"code": code})).await
    }

    pub async fn stdout(&self, request: Value) -> String {
        let events = self.run(request).await;
        of_type(&events, "stdout").iter().map(|e| e["text"].as_str().unwrap()).collect()
    }
}

/// The next event of a stream, which comes one to a chunk.
pub async fn next_event(reader: &mut BufReader<TcpStream>) -> Option<Value> {
    let mut size = String::new();
    timeout(PATIENCE, reader.read_line(&mut size)).await.unwrap().unwrap();
    let size = usize::from_str_radix(size.trim(), 16).unwrap();
    let mut chunk = vec![0; size + 2];
    timeout(PATIENCE, reader.read_exact(&mut chunk)).await.unwrap().unwrap();
    if size == 0 {
        return None;
    }
    let line = &chunk[..size];
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line, one chunk");
    Some(serde_json::from_slice(line).unwrap())
}

pub fn of_type<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}
