//! What the front end may be told, and the bounds it keeps.
//!
//! Called by `src/`, which fills it from the command line. Refuses to read the environment.

use std::net::SocketAddr;
use std::time::Duration;

use mica_wire::guest::CONTROL_LINE_BYTES_MAX;

use crate::keys::KeyRing;

/// The longest life a sandbox may be given.
const SANDBOX_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Configuration of the front end, the same on every shard.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Where every shard listens (`SO_REUSEPORT`). The port is not 0.
    pub listen: SocketAddr,
    /// The domain under which `{port}-{id}.DOMAIN` reaches a sandbox. `None`: any domain does, and
    /// clients are told none.
    pub domain: Option<String>,
    /// Who may use the control plane.
    pub keys: KeyRing,
    /// The bounds.
    pub limits: Limits,
}

/// Bounds on what a client may make this host hold or wait for.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections of one shard at a time. More are answered 503 and closed.
    pub connections_max: usize,
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            head_bytes_max: 64 * 1024,
            head_fields_max: 100,
            head_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(15),
            body_bytes_max: API_BODY_BYTES_MAX,
            idle_timeout: Duration::from_secs(620),
            connect_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(10),
            sandbox_timeout_max: SANDBOX_TIMEOUT_MAX,
        }
    }
}

/// Default limit of a control-plane body. Environment variables of a create travel on to the guest
/// in one control line, and what fits here must fit there.
const API_BODY_BYTES_MAX: usize = 192 * 1024;
const _: () = assert!(API_BODY_BYTES_MAX + 16 * 1024 <= CONTROL_LINE_BYTES_MAX);
