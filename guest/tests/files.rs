//! The file routes and the filesystem service over real HTTP, as root and as another user.
//!
//! The tests about other users need root, because the agent in a sandbox is root. Without it they
//! say so and check nothing, unless `REQUIRE_ROOT=1`, which makes that a failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod required;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mica_guest::filesystem;
use mica_guest::http::{Router, serve};
use mica_guest::sandbox::{Sandbox, TemplateSettings};
use mica_guest::users;
use mica_wire::guest::InitRequest;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    base: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.base).unwrap_or_default();
    }
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

async fn server() -> Server {
    let settings = TemplateSettings { default_user: "root".into(), ..Default::default() };
    let sandbox = Arc::new(Sandbox::new(settings, false));
    let identity = InitRequest {
        sandbox_id: "test".into(),
        template_id: "test".into(),
        machine_id: "0".repeat(32),
        access_token: None,
        env_vars: BTreeMap::new(),
        wall_clock_unix_ns: 0,
        new_sandbox: true,
        defaults: None,
    };
    sandbox.set_identity(identity);
    let mut router = Router::new(sandbox);
    filesystem::register(&mut router);
    let router = Arc::new(router);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let base =
        std::env::temp_dir().join(format!("mica-f-{}-{}", std::process::id(), address.port()));
    std::fs::create_dir_all(&base).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let router = Arc::clone(&router);
            // A client that goes away early is part of what is tested.
            tokio::spawn(async move { serve(stream, router).await.unwrap_or_default() });
        }
    });
    Server { address, base }
}

impl Server {
    fn at(&self, name: &str) -> String {
        self.base.join(name).display().to_string()
    }

    async fn ask(&self, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut head = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut bytes = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
        answer(&bytes)
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask(&format!("GET /files?path={path}"), headers, b"").await
    }

    async fn put(&self, query: &str, body: &[u8]) -> Answer {
        let octets = [("content-type", "application/octet-stream")];
        self.ask(&format!("POST /files?{query}"), &octets, body).await
    }

    async fn form(&self, query: &str, body: &[u8]) -> Answer {
        let form = [("content-type", "multipart/form-data; boundary=XX")];
        self.ask(&format!("POST /files{query}"), &form, body).await
    }

    async fn rpc(&self, method: &str, user: &str, message: &Value) -> (u16, Value) {
        // "user:" in base64, as the SDKs send it.
        let authorization = format!("Basic {}", base64(format!("{user}:").as_bytes()));
        let headers =
            [("content-type", "application/json"), ("authorization", authorization.as_str())];
        let line = format!("POST /filesystem.Filesystem/{method}");
        let answer = self.ask(&line, &headers, message.to_string().as_bytes()).await;
        (answer.status, answer.json())
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn answer(bytes: &[u8]) -> Answer {
    let at = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let head = std::str::from_utf8(&bytes[..at]).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<String, String> = head
        .split("\r\n")
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let mut rest = &bytes[at + 4..];
    let mut body = rest.to_vec();
    if headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
        body.clear();
        loop {
            let end = rest.windows(2).position(|window| window == b"\r\n").unwrap();
            let size =
                usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[end + 2..end + 2 + size]);
            rest = &rest[end + 4 + size..];
            if size == 0 {
                break;
            }
        }
    }
    Answer { status, headers, body }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        required::skip("ROOT", "these tests are root's, as the agent in a sandbox is");
    }
    is_root
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read() {
    let server = server().await;
    let path = server.at("deep/er/a file.txt").replace(' ', "%20");
    let data: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let written = server.put(&format!("path={path}"), &data).await;
    assert_eq!(written.status, 200, "{}", written.text());
    let shown = server.at("deep/er/a file.txt");
    let wanted = json!([{"path": shown, "name": "a file.txt", "type": "file"}]);
    assert_eq!(written.json(), wanted);
    let read = server.get(&path, &[]).await;
    assert_eq!(read.status, 200);
    assert!(read.body == data, "the same bytes");
    assert_eq!(read.headers["content-length"], data.len().to_string());
    assert_eq!(read.headers["content-disposition"], "inline; filename*=utf-8''a%20file.txt");
    let part = server.get(&path, &[("range", "bytes=4-11")]).await;
    assert_eq!((part.status, &part.body[..]), (206, &data[4..12]));
    assert_eq!(part.headers["content-range"], format!("bytes 4-11/{}", data.len()));
    assert_eq!(server.get(&path, &[("range", "bytes=99999999-")]).await.status, 416);
    // A large file is coded for those alone who take nothing else.
    let as_it_is = server.get(&path, &[("accept-encoding", "gzip, deflate, br")]).await;
    let is_large = data.len() > 1 << 20;
    assert_eq!(!as_it_is.headers.contains_key("content-encoding"), is_large);
    let zipped = server.get(&path, &[("accept-encoding", "gzip, identity;q=0")]).await;
    assert_eq!(zipped.headers["content-encoding"], "gzip");
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(&zipped.body[..]).read_to_end(&mut plain).unwrap();
    assert!(plain == data, "the same bytes through gzip");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_tells_its_length() {
    let server = server().await;
    let path = server.at("empty");
    assert_eq!(server.put(&format!("path={path}"), b"").await.status, 200);
    for encoding in ["identity", "gzip"] {
        let read = server.get(&path, &[("accept-encoding", encoding)]).await;
        assert_eq!(read.status, 200);
        assert_eq!(read.headers["content-length"], "0");
        assert!(read.body.is_empty());
    }
    // Files without a size that have something in them all the same.
    assert!(server.get("/proc/meminfo", &[]).await.text().contains("MemTotal"));
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_cannot_be_have_e2bs_words() {
    let server = server().await;
    let missing = server.get("/no/such", &[]).await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json(), json!({"code": 404, "message": "path '/no/such' does not exist"}));
    let directory = server.get("/tmp", &[]).await;
    assert_eq!(directory.json(), json!({"code": 400, "message": "path '/tmp' is a directory"}));
    let user = server.ask("GET /files?path=/x&username=no-one", &[], b"").await;
    assert_eq!(user.status, 401);
    assert_eq!(user.json()["message"], "invalid username: 'no-one'");
    let encoding = [("accept-encoding", "br, identity;q=0")];
    assert_eq!(server.get("/etc/passwd", &encoding).await.status, 406);
    let fifo = server.base.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from(0o600),
        0,
    )
    .unwrap();
    assert_eq!(server.get(&server.at("fifo"), &[]).await.status, 400, "does not wait for ever");
    assert_eq!(server.get("%00", &[]).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_brings_several_files() {
    let server = server().await;
    let (a, b) = (server.at("a"), server.at("x/b"));
    let body = format!(
        "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{a}\"\r\n\r\none\r\n\
         --XX\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nignored\r\n\
         --XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{b}\"\r\n\r\n\r\n--XX--"
    );
    let written = server.form("", body.as_bytes()).await;
    assert_eq!(written.status, 200, "{}", written.text());
    let paths: Vec<Value> =
        written.json().as_array().unwrap().iter().map(|file| file["path"].clone()).collect();
    assert_eq!(paths, [json!(a), json!(b)]);
    assert_eq!(std::fs::read_to_string(&a).unwrap(), "one");
    assert_eq!(std::fs::read_to_string(&b).unwrap(), "");
    let twice = body.replace(&b, &a);
    let refused = server.form("", twice.as_bytes()).await;
    assert_eq!(refused.status, 400);
    assert!(refused.json()["message"].as_str().unwrap().contains("multiple files"));
    // A path in the query stands for the file's own name.
    let one = b"--XX\r\ncontent-disposition: form-data; name=\"file\"; filename=\"n\"\r\n\r\nq\r\n--XX--\r\n";
    let query = format!("?path={}", server.at("chosen"));
    assert_eq!(server.form(&query, one).await.json()[0]["name"], "chosen");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_uploads_are_refused_and_leave_nothing() {
    let server = server().await;
    let name = server.at("f");
    let start = format!(
        "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\ndata"
    );
    let long = "a".repeat(100_000);
    for body in [
        String::new(),
        "no delimiter at all".to_owned(),
        start.clone(),
        format!("--XX\r\n{long}"),
        long.clone(),
        "--XX\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nx\r\n--XX--".to_owned(),
        start.replace(&name, "/tmp"),
        start.replace(&name, "a\0b"),
        start.replace(&name, &long[..5000]),
    ] {
        let refused = server.form("", body.as_bytes()).await;
        assert_eq!(refused.status, 400, "{} for {:.80}", refused.text(), body);
        assert_eq!(refused.json()["code"], 400);
    }
    let text = [("content-type", "text/plain")];
    assert_eq!(server.ask("POST /files?path=/tmp/x", &text, b"").await.status, 400);
    let zipped = [("content-type", "application/octet-stream"), ("content-encoding", "gzip")];
    let line = format!("POST /files?path={name}");
    assert_eq!(server.ask(&line, &zipped, b"not gzip").await.status, 400);
    assert_eq!(server.put("username=root", b"x").await.status, 400, "no path");
    only_these_are_left(&server.base, &[]).await;
    // A part whose delimiter has come is whole, though the body is not.
    let cut_behind = format!("{start}\r\n--XX");
    assert_eq!(server.form("", cut_behind.as_bytes()).await.status, 400);
    only_these_are_left(&server.base, &["f"]).await;
}

/// What an upload was written to goes with it, a moment after its answer.
async fn only_these_are_left(base: &Path, wanted: &[&str]) {
    let left = async {
        while names(base) != wanted {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = timeout(PATIENCE, left).await;
    assert!(waited.is_ok(), "{:?} and not {wanted:?}", names(base));
}

#[tokio::test(flavor = "multi_thread")]
async fn gzip_is_undone_on_the_way_in() {
    let server = server().await;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&b"hello ".repeat(100_000)).unwrap();
    let body = encoder.finish().unwrap();
    let path = server.at("z");
    let zipped = [("content-type", "application/octet-stream"), ("content-encoding", "gzip")];
    let written = server.ask(&format!("POST /files?path={path}"), &zipped, &body).await;
    assert_eq!(written.status, 200, "{}", written.text());
    assert_eq!(std::fs::read(&path).unwrap(), b"hello ".repeat(100_000));
    let brotli = [("content-type", "application/octet-stream"), ("content-encoding", "br")];
    assert_eq!(server.ask(&format!("POST /files?path={path}"), &brotli, &body).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_off_leaves_nothing() {
    let server = server().await;
    let path = server.at("f");
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /files?path={path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\
         content-type: application/octet-stream\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[7; 300_000]).await.unwrap();
    let seen = async {
        while names(&server.base).is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, seen).await.unwrap();
    assert!(names(&server.base)[0].starts_with(".mica-upload-"));
    drop(stream);
    only_these_are_left(&server.base, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_507() {
    let server = server().await;
    if !is_root() {
        return;
    }
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(&server.base)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return required::skip("ROOT", "a small file system cannot be mounted");
    }
    let answer = server.put(&format!("path={}", server.at("big")), &[0; 1_000_000]).await;
    let left = names(&server.base);
    let unmounted = std::process::Command::new("umount").arg(&server.base).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(answer.status, 507, "{}", answer.text());
    assert!(answer.text().contains("not enough disk space"));
    assert_eq!(left, Vec::<String>::new());
}

/// A directory of root's that nobody else may even look into.
async fn closed() -> Server {
    let server = server().await;
    std::fs::set_permissions(&server.base, std::fs::Permissions::from_mode(0o700)).unwrap();
    server
}

/// Checks whose things are.
fn belong(server: &Server, user: &str, paths: &[&str]) {
    let user = users::find(user).unwrap();
    for path in paths {
        let found = std::fs::symlink_metadata(server.base.join(path)).unwrap();
        assert_eq!((found.uid(), found.gid()), (user.uid, user.gid), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_reads_and_writes_everywhere_and_what_is_made_is_theirs() {
    if !is_root() {
        return;
    }
    let server = closed().await;
    let as_nobody = |path: &str| format!("path={}&username=nobody", server.at(path));
    let secret = server.base.join("secret");
    std::fs::write(&secret, "old and longer").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("secret", server.base.join("link")).unwrap();

    let read = server.ask(&format!("GET /files?{}", as_nobody("link")), &[], b"").await;
    assert_eq!((read.status, read.text()), (200, "old and longer"));
    // What was there keeps its permissions and becomes the user's; a link stays and is root's.
    assert_eq!(server.put(&as_nobody("link"), b"new").await.status, 200);
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "new");
    assert_eq!(std::fs::metadata(&secret).unwrap().mode() & 0o777, 0o640);
    belong(&server, "nobody", &["secret"]);
    belong(&server, "root", &["link"]);

    std::fs::create_dir(server.base.join("of-root")).unwrap();
    assert_eq!(server.put(&as_nobody("of-root/a/b/c"), b"mine").await.status, 200);
    belong(&server, "nobody", &["of-root/a", "of-root/a/b", "of-root/a/b/c"]);
    // Directories that were there before do not change hands.
    belong(&server, "root", &["", "of-root"]);
    let sources = json!([server.at("secret"), server.at("of-root/a/b/c")]);
    let together =
        json!({"source_paths": sources, "destination": server.at("x/all"), "username": "nobody"});
    let kind = [("content-type", "application/json")];
    let composed = server.ask("POST /files/compose", &kind, together.to_string().as_bytes()).await;
    assert_eq!(composed.status, 200, "{}", composed.text());
    assert_eq!(std::fs::read_to_string(server.base.join("x/all")).unwrap(), "newmine");
    belong(&server, "nobody", &["x", "x/all"]);
    // What the agent has open is nobody's business all the same.
    for method in ["GET", "POST"] {
        let line = format!("{method} /files?path=/proc/self/fd/0&username=nobody");
        let octets = [("content-type", "application/octet-stream")];
        assert_eq!(server.ask(&line, &octets, b"").await.status, 400, "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_works_everywhere_for_a_user() {
    if !is_root() {
        return;
    }
    let server = closed().await;
    let secret = server.base.join("secret");
    std::fs::write(&secret, "s").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let call = async |method: &str, message: &Value| {
        let (status, reply) = server.rpc(method, "nobody", message).await;
        assert_eq!(status, 200, "{method}: {reply}");
        reply
    };
    let made = call("MakeDir", &json!({"path": server.at("p/q")})).await;
    assert_eq!(made["entry"]["owner"], "nobody");
    let moved = json!({"source": server.at("secret"), "destination": server.at("r/s/moved")});
    let moved = call("Move", &moved).await["entry"].clone();
    assert_eq!((&moved["owner"], &moved["mode"]), (&json!("root"), &json!(0o600)));
    belong(&server, "nobody", &["p", "p/q", "r", "r/s"]);
    assert_eq!(call("Stat", &json!({"path": server.at("r/s/moved")})).await["entry"]["size"], "1");
    let listed = call("ListDir", &json!({"path": server.at(""), "depth": 3})).await;
    let paths = listed["entries"].as_array().unwrap().iter();
    let paths: Vec<&str> = paths.map(|entry| entry["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["p", "p/q", "r", "r/s", "r/s/moved"].map(|path| server.at(path)));
    call("Remove", &json!({"path": server.at("r")})).await;
    assert_eq!(names(&server.base), ["p"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_speaks_the_protocol() {
    let server = server().await;
    let path = server.at("d");
    let (status, made) = server.rpc("MakeDir", "", &json!({"path": path})).await;
    assert_eq!((status, &made["entry"]["type"]), (200, &json!("FILE_TYPE_DIRECTORY")));
    let (status, error) = server.rpc("MakeDir", "", &json!({"path": path})).await;
    assert_eq!((status, &error["code"]), (409, &json!("already_exists")));
    let file = server.at("d/f");
    assert_eq!(server.put(&format!("path={file}"), b"abc").await.status, 200);
    let (_, found) = server.rpc("Stat", "root", &json!({"path": file, "unknown": 1})).await;
    assert_eq!(found["entry"]["size"], "3");
    let (status, listed) =
        server.rpc("ListDir", "", &json!({"path": server.at(""), "depth": 2})).await;
    assert_eq!(status, 200);
    let shown: Vec<&Value> =
        listed["entries"].as_array().unwrap().iter().map(|entry| &entry["path"]).collect();
    assert_eq!(shown, [&json!(path), &json!(file)]);
    let moved = json!({"source": file, "destination": server.at("e/g")});
    assert_eq!(server.rpc("Move", "", &moved).await.1["entry"]["name"], "g");
    let (status, error) = server.rpc("Stat", "", &json!({"path": file})).await;
    assert_eq!((status, &error["code"]), (404, &json!("not_found")));
    assert_eq!(server.rpc("Remove", "", &json!({"path": path})).await, (200, json!({})));
    assert_eq!(server.rpc("Remove", "", &json!({"path": path})).await, (200, json!({})));
    let (status, error) = server.rpc("Stat", "no-one", &json!({"path": "/"})).await;
    assert_eq!((status, &error["code"]), (401, &json!("unauthenticated")));
    let (status, error) = server.rpc("Stat", "", &json!({"path": "a\0b"})).await;
    assert_eq!((status, &error["code"]), (400, &json!("invalid_argument")));
}
