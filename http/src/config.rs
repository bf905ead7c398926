//! What the front end may be told, and the bounds it keeps.
//!
//! Called by `src/`, which fills it from the command line. Refuses to read the environment.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mica_wire::guest::CONTROL_LINE_BYTES_MAX;

use rustls::server::ResolvesServerCert;
use rustls::{ServerConfig, crypto};

use crate::keys::Keys;

/// The names of HTTP/2 and HTTP/1.1 where TLS agrees on one of them.
pub const ALPN_H2: &[u8] = b"h2";
const ALPN_H1: &[u8] = b"http/1.1";

/// The longest life a sandbox may be given.
const SANDBOX_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Configuration of the front end, the same on every shard.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Where every shard listens (`SO_REUSEPORT`). The port is not 0.
    pub listen: SocketAddr,
    /// TLS, on the same port and perhaps on one more.
    pub tls: Option<Tls>,
    /// The domain under which `{port}-{id}.DOMAIN` reaches a sandbox. `None`: any domain does, and
    /// clients are told none.
    pub domain: Option<String>,
    /// Who may use the control plane.
    pub keys: Keys,
    /// The bounds.
    pub limits: Limits,
    /// Whether the operator can read what was counted.
    pub metrics: bool,
}

/// How this host speaks TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    /// An address for TLS alone, besides [`HttpConfig::listen`], which takes both.
    pub listen: Option<SocketAddr>,
    pub(crate) config: Arc<ServerConfig>,
}

impl Tls {
    /// TLS 1.2 and 1.3 with the certificates that `certificates` has at the time of each handshake.
    ///
    /// # Errors
    /// When the library refuses its own defaults.
    pub fn new(
        certificates: Arc<dyn ResolvesServerCert>,
        listen: Option<SocketAddr>,
    ) -> Result<Self, rustls::Error> {
        let provider = Arc::new(crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(certificates);
        config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_H1.to_vec()];
        Ok(Self { listen, config: Arc::new(config) })
    }
}

/// Bounds on what a client may make this host hold or wait for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections of one shard at a time. More are answered 503 and closed.
    pub connections_max: usize,
    /// Streams into sandboxes of one shard at a time. More are answered 429.
    pub streams_max: usize,
    /// A request head, from its first byte to the blank line.
    pub head_bytes_max: usize,
    /// Header fields of a request.
    pub head_fields_max: usize,
    /// Time for a request head to arrive.
    pub head_timeout: Duration,
    /// Time for the body of a control-plane request to arrive. Proxied bodies have no such limit.
    pub body_timeout: Duration,
    /// The body of a control-plane request.
    pub body_bytes_max: usize,
    /// Time a connection may stay open between requests. Longer than clients keep theirs, so that
    /// it is the client who closes.
    pub idle_timeout: Duration,
    /// Time for a sandbox to take a connection.
    pub connect_timeout: Duration,
    /// Time that requests still have once the daemon was asked to stop.
    pub drain_timeout: Duration,
    /// The longest life a sandbox may be given.
    pub sandbox_timeout_max: Duration,
    /// The life of a sandbox whose create says nothing of it. `NEVER` is a life without an end.
    pub sandbox_timeout_default: Duration,
    /// One file that is uploaded for a template's build.
    pub upload_bytes_max: u64,
    /// All such files of one tenant together; those unused for longest go first.
    pub upload_tenant_bytes_max: u64,
    /// Builds of one tenant that run at once. Others wait.
    pub builds_at_once: usize,
    /// Memory that a build may have its guest booted with, where no template of the operator's has more.
    pub build_memory_mib_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            streams_max: 20_000,
            head_bytes_max: 64 * 1024,
            head_fields_max: 100,
            head_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(15),
            body_bytes_max: API_BODY_BYTES_MAX,
            idle_timeout: Duration::from_secs(620),
            connect_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(10),
            sandbox_timeout_max: SANDBOX_TIMEOUT_MAX,
            sandbox_timeout_default: SANDBOX_TIMEOUT_DEFAULT,
            upload_bytes_max: 1 << 30,
            upload_tenant_bytes_max: 8 << 30,
            builds_at_once: 2,
            build_memory_mib_max: 8192,
        }
    }
}

/// What E2B gives on its second version. Its first says 15 s, which none of its own clients ever sees: they
/// say 300. CubeSandbox's newer clients say nothing, in clones too, and would lose what they made.
const SANDBOX_TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);

/// Default limit of a control-plane body. Environment variables of a create travel on to the guest
/// in one control line, and what fits here must fit there.
const API_BODY_BYTES_MAX: usize = 192 * 1024;
const _: () = assert!(API_BODY_BYTES_MAX + 16 * 1024 <= CONTROL_LINE_BYTES_MAX);
