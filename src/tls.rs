//! The certificate of `mica serve`: read at start, and again when it changes.
//!
//! Called by `mica serve` with `--tls-cert`. Every handshake takes the certificate of that moment, so a
//! renewed one needs no restart. Refuses a key that others may read, and keeps the old certificate
//! when the new one does not work.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use mica_http::Tls;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use signal_hook::consts::SIGHUP;
use signal_hook::iterator::Signals;

/// Chains are a few kilobytes; a longer file is some other file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Everybody's read and write permissions.
const EVERYBODY: u32 = 0o006;

/// What `mica serve` can be told about TLS.
#[derive(Args, Debug, Clone)]
pub struct TlsArgs {
    /// Certificate chain in PEM. The port of --listen then takes TLS beside plain HTTP. Read again on
    /// SIGHUP and when the file changes. `mica cert` makes one.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// One more address and port, for TLS alone.
    #[arg(long, value_name = "ADDR:PORT", requires = "tls_cert")]
    tls_listen: Option<SocketAddr>,
}

impl TlsArgs {
    /// Where TLS alone is listened for.
    pub fn listen(&self) -> Option<SocketAddr> {
        self.tls_listen
    }

    /// Reads the certificate, and starts to look after it.
    ///
    /// # Errors
    /// Says which file to mend.
    pub fn load(&self) -> Result<Option<Tls>> {
        let (Some(chain), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        // The daemon may not keep its working directory.
        let files = Files {
            chain: std::path::absolute(chain).context("--tls-cert")?,
            key: std::path::absolute(key).context("--tls-key")?,
        };
        let seen = files.stamps();
        let certificates = Arc::new(Certificates::new(files.load()?));
        watch(Arc::clone(&certificates), files, seen)?;
        Ok(Some(Tls::new(certificates, self.tls_listen)?))
    }
}

/// What handshakes are given.
#[derive(Debug)]
struct Certificates(RwLock<Arc<CertifiedKey>>);

impl Certificates {
    fn new(first: CertifiedKey) -> Self {
        Self(RwLock::new(Arc::new(first)))
    }

    fn replace(&self, next: CertifiedKey) {
        // One assignment: a panic leaves nothing half done.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Where a certificate is.
#[derive(Debug)]
struct Files {
    chain: PathBuf,
    key: PathBuf,
}

/// What tells one content of a file from another.
type Stamp = Option<(u64, u64, SystemTime)>;

impl Files {
    fn load(&self) -> Result<CertifiedKey> {
        let in_chain = || format!("{} is not a certificate chain in PEM", self.chain.display());
        let text = read(&self.chain)?;
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .with_context(in_chain)?;
        if chain.is_empty() {
            bail!("{}", in_chain());
        }
        let mode = std::fs::metadata(&self.key).with_context(|| cannot_read(&self.key))?.mode();
        if mode & EVERYBODY != 0 {
            let path = self.key.display();
            bail!("{path} is a private key and open to everybody; run `chmod 600 {path}`");
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .with_context(|| format!("{} is not a private key in PEM", self.key.display()))?;
        CertifiedKey::from_der(chain, key, &default_provider()).with_context(|| {
            let (chain, key) = (self.chain.display(), self.key.display());
            format!("{key} is not the key of {chain}, or of a kind that is not supported")
        })
    }

    fn stamps(&self) -> [Stamp; 2] {
        [&self.chain, &self.key].map(|path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.ino(), metadata.len(), metadata.modified().ok()?))
        })
    }
}

fn cannot_read(path: &Path) -> String {
    format!("cannot read {}", path.display())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = File::open(path).with_context(|| cannot_read(path))?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut text).with_context(|| cannot_read(path))?;
    Ok(text)
}

/// Reads the files again on SIGHUP and when they change, for as long as the process lives.
fn watch(certificates: Arc<Certificates>, files: Files, seen: [Stamp; 2]) -> Result<()> {
    let mut signals = Signals::new([SIGHUP]).context("cannot handle SIGHUP")?;
    let (hung_up, told) = mpsc::channel();
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
    };
    let forward = move || {
        for _ in signals.forever() {
            if hung_up.send(()).is_err() {
                return;
            }
        }
    };
    spawn("hang-ups", Box::new(forward)).context("cannot start a thread for SIGHUP")?;
    let look = move || look_after(&certificates, &files, seen, &told);
    spawn("certificates", Box::new(look)).context("cannot start a thread for certificates")
}

fn look_after(certs: &Certificates, files: &Files, mut seen: [Stamp; 2], told: &Receiver<()>) {
    loop {
        let asked = match told.recv_timeout(LOOK_EVERY) {
            Ok(()) => true,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let now = files.stamps();
        if !asked && now == seen {
            continue;
        }
        seen = now;
        match files.load() {
            Ok(next) => {
                certs.replace(next);
                tracing::info!(chain = %files.chain.display(), "read the certificate again");
            }
            // Also in the middle of a renewal, between the two files: the next look mends it.
            Err(error) => {
                tracing::error!("keeping the old certificate: {error:#}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cert::testing::made;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_chain_and_its_key_are_read_and_others_refused_with_a_reason() {
        let (one, two) = (made("tls-one"), made("tls-two"));
        let files = |chain: &Path, key: &Path| Files { chain: chain.into(), key: key.into() };
        let (chain, key) = (one.join("server.pem"), one.join("server.key"));
        assert_eq!(files(&chain, &key).load().unwrap().cert.len(), 1);
        let why = |files: Files| format!("{:#}", files.load().unwrap_err());
        assert!(why(files(&chain, &two.join("server.key"))).contains("is not the key of"));
        assert!(why(files(&key, &key)).contains("certificate chain"));
        assert!(why(files(&chain, &chain)).contains("everybody"), "a chain is for everybody");
        assert!(why(files(&one.join("none"), &key)).contains("cannot read"));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(why(files(&chain, &key)).contains("chmod 600"));
        for directory in [one, two] {
            std::fs::remove_dir_all(directory).unwrap();
        }
    }

    #[test]
    fn a_changed_file_has_another_stamp() {
        let directory = made("tls-stamp");
        let files =
            Files { chain: directory.join("server.pem"), key: directory.join("server.key") };
        let before = files.stamps();
        assert_eq!(before, files.stamps());
        let text = std::fs::read(&files.chain).unwrap();
        let beside = directory.join("new");
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(beside, &files.chain).unwrap();
        assert_ne!(before, files.stamps());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
