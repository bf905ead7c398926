//! TLS on the daemon's own port: certificates, protocols, and clients that speak something else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use serde_json::{Value, json};

use crate::client::{Connection, PATIENCE};
use crate::daemon::{Daemon, eventually, free_address};
use crate::upstream::Upstream;

const DOMAIN: &str = "sbx.test";
const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// What `mica cert` makes, in a directory of its own.
struct Certificates(PathBuf);

impl Certificates {
    fn make(label: &str) -> Self {
        let name = format!("mica-api-tls-{}-{label}", std::process::id());
        let out = std::env::temp_dir().join(name);
        drop(std::fs::remove_dir_all(&out));
        let made = Command::new(env!("CARGO_BIN_EXE_mica"))
            .args(["cert", "--domain", &format!("{DOMAIN}:3944"), "--out"])
            .arg(&out)
            .output()
            .expect("mica cert");
        assert!(made.status.success(), "{made:?}");
        let said = String::from_utf8_lossy(&made.stdout).into_owned();
        assert!(said.contains("export E2B_DOMAIN=sbx.test:3944\n"), "{said}");
        Self(out)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A daemon with this certificate.
    fn daemon(&self, more: &[&str]) -> Daemon {
        let (chain, key) = (self.file("server.pem"), self.file("server.key"));
        let path = |path: &Path| path.to_str().expect("a path").to_owned();
        let (chain, key) = (path(&chain), path(&key));
        let options = ["--tls-cert", &chain, "--tls-key", &key];
        Daemon::start_with(&[&options, more].concat())
    }

    /// A client that trusts this authority alone.
    fn client(&self, protocols: &[&str]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(self.file("ca.pem")).expect("a certificate");
        roots.add(ca).expect("an authority");
        let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Otherwise it would not look at a certificate that it knew.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

type Secure = StreamOwned<ClientConnection, TcpStream>;

fn secure(address: SocketAddr, config: &Arc<ClientConfig>, name: &str) -> Secure {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let connection = ClientConnection::new(Arc::clone(config), name).expect("a client");
    StreamOwned::new(connection, stream)
}

/// One request whose answer ends the connection.
fn ask(stream: &mut Secure, request: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn one_port_takes_tls_and_plain_requests_for_everything() {
    let certificates = Certificates::make("both");
    let daemon = certificates.daemon(&["--domain", "sbx.test:3944"]);
    let id = daemon.create();
    let config = certificates.client(&["http/1.1"]);
    for name in ["localhost", "127.0.0.1", DOMAIN, "api.sbx.test"] {
        let answer = ask(&mut secure(daemon.address(), &config, name), HEALTH).expect(name);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{name}: {answer}");
    }
    let server = Upstream::start(|mut served| {
        let head = served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
        head
    });
    let host = format!("{}-{id}.{DOMAIN}", server.port);
    let request = format!("GET /a HTTP/1.1\r\nhost: {host}:3944\r\nconnection: close\r\n\r\n");
    let answer = ask(&mut secure(daemon.address(), &config, &host), &request).expect("an answer");
    assert!(answer.ends_with("\r\n\r\nhi"), "{answer}");
    assert_eq!(server.join()[0], "get /a http/1.1");
    daemon.healthy();

    // A name that the authority may not vouch for, and an authority that is not trusted.
    let other = Certificates::make("other");
    for (config, name) in [(&config, "evil.example"), (&other.client(&[]), "localhost")] {
        let error = ask(&mut secure(daemon.address(), config, name), HEALTH).expect_err(name);
        assert!(error.to_string().contains("certificate"), "{error}");
    }
}

#[test]
fn http_2_is_agreed_on_where_both_know_it() {
    let certificates = Certificates::make("alpn");
    let daemon = certificates.daemon(&[]);
    for (offered, agreed) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["http/1.1", "h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&[], None),
    ] {
        let mut stream = secure(daemon.address(), &certificates.client(offered), "localhost");
        if agreed == Some("h2") {
            stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .expect("sent");
            let mut frame = [0; 9];
            stream.read_exact(&mut frame).expect("a frame");
            assert_eq!(frame[3], 4, "settings come first");
        } else {
            let answer = ask(&mut stream, HEALTH).expect("an answer");
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        let got = stream.conn.alpn_protocol().map(String::from_utf8_lossy);
        assert_eq!(got.as_deref(), agreed, "{offered:?}");
    }
}

#[test]
fn links_for_uploads_lead_back_the_way_the_client_came() {
    let certificates = Certificates::make("links");
    let daemon = certificates.daemon(&[]);
    let announced = daemon.ask("POST", "/v3/templates", Some(&json!({ "name": "app" }))).json();
    let template = announced["templateID"].as_str().expect("an id");
    let request = |more: &str| {
        let key = daemon.key();
        format!(
            "GET /templates/{template}/files/aa HTTP/1.1\r\nhost: localhost:3944\r\n\
             x-api-key: {key}\r\nconnection: close\r\n{more}\r\n"
        )
    };
    let config = certificates.client(&["http/1.1"]);
    let under_tls = |more: &str| {
        let answer = ask(&mut secure(daemon.address(), &config, "localhost"), &request(more));
        let answer = answer.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 201 "), "{answer}");
        serde_json::from_str::<Value>(body).expect("JSON")
    };
    let in_the_clear = |more: &str| daemon.connect().send(request(more)).reply().json();
    let forwarded = |scheme: &str| format!("x-forwarded-proto: {scheme}\r\n");
    for (answer, scheme) in [
        (under_tls(""), "https"),
        (in_the_clear(""), "http"),
        // What a proxy in front of the host says of the client's own way to it holds.
        (in_the_clear(&forwarded("https")), "https"),
        (under_tls(&forwarded("http")), "http"),
    ] {
        let url = answer["url"].as_str().expect("a link");
        let wanted = format!("{scheme}://localhost:3944/build-files/");
        assert!(url.starts_with(&wanted), "{url}");
    }
}

#[test]
fn upgrades_pass_under_tls() {
    let certificates = Certificates::make("upgrade");
    let daemon = certificates.daemon(&[]);
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served
            .send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n");
        served.send(b"hello");
        assert_eq!(served.exactly(5), b"world");
        served.send(vec![b'x'; 1 << 20]);
    });
    let mut stream = secure(daemon.address(), &certificates.client(&[]), "localhost");
    let request = format!(
        "GET /sandbox/{id}/{}/ HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n\
         world",
        server.port
    );
    let mut answer = Vec::new();
    stream.write_all(request.as_bytes()).expect("sent");
    stream.read_to_end(&mut answer).expect("an end that is no cut");
    let head = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
    assert!(answer.starts_with(b"HTTP/1.1 101 ") && answer[head..].starts_with(b"hello"));
    assert_eq!(answer.len(), head + 5 + (1 << 20));
    server.join();
}

#[test]
fn a_port_for_tls_alone_says_so_to_others() {
    let certificates = Certificates::make("alone");
    let address = free_address();
    let daemon = certificates.daemon(&["--tls-listen", &address.to_string()]);
    let config = certificates.client(&[]);
    let answer = ask(&mut secure(address, &config, "localhost"), HEALTH).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let message = Connection::open(address).send(HEALTH).reply().error(400);
    assert!(message.contains("https"), "{message}");
    daemon.healthy();
}

#[test]
fn a_renewed_certificate_is_used_without_a_restart() {
    let (old, new) = (Certificates::make("old"), Certificates::make("new"));
    let daemon = old.daemon(&[]);
    let works = |config: &Arc<ClientConfig>| {
        ask(&mut secure(daemon.address(), config, "localhost"), HEALTH).is_ok()
    };
    let (of_old, of_new) = (old.client(&[]), new.client(&[]));
    assert!(works(&of_old) && !works(&of_new));
    // Files that do not fit together change nothing.
    std::fs::copy(new.file("server.pem"), old.file("server.pem")).expect("a copy");
    daemon.signal("HUP");
    assert!(works(&of_old));
    std::fs::copy(new.file("server.key"), old.file("server.key")).expect("a copy");
    daemon.signal("HUP");
    eventually("the new certificate is used", || works(&of_new));
    assert!(!works(&of_old));
    daemon.healthy();
}

#[test]
fn what_is_no_tls_and_what_is_too_slow_ends() {
    let certificates = Certificates::make("garbage");
    let daemon = certificates.daemon(&["--client-timeout", "1"]);
    let before = daemon.settled(None);
    let record = |length: u16| [&[0x16, 3, 1], length.to_be_bytes().as_slice()].concat();
    for garbage in [
        [record(100), vec![0xff; 100]].concat(),
        [record(u16::MAX), vec![1; 70_000]].concat(),
        vec![0x16; 100_000],
        // A hello that does not end.
        [record(16_384), vec![1, 0xff, 0xff, 0xff]].concat(),
        vec![0x16],
    ] {
        let mut connection = Connection::open(daemon.address());
        // The other end may hang up in the middle of this.
        drop(connection.stream().write_all(&garbage));
        let rest = connection.rest();
        assert!(!rest.starts_with(b"HTTP/"), "{:?}", String::from_utf8_lossy(&rest));
        daemon.healthy();
    }
    assert_eq!(daemon.settled(Some(before)), before, "nothing is left of them");
}

#[test]
fn files_that_do_not_work_are_named_at_start() {
    let certificates = Certificates::make("bad");
    let serve = |options: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_mica"))
            .args(["serve", "--vm-program", "/bin/true", "--listen", "127.0.0.1:0"])
            .args(options)
            .output()
            .expect("mica serve");
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let chain = certificates.file("server.pem");
    let chain = chain.to_str().expect("a path");
    assert!(serve(&["--tls-cert", chain]).contains("--tls-key"));
    assert!(serve(&["--tls-listen", "127.0.0.1:1"]).contains("--tls-cert"));
    let said = serve(&["--tls-cert", chain, "--tls-key", "/nonexistent"]);
    assert!(said.contains("cannot read /nonexistent"), "{said}");
}
