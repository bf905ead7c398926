//! `mica cert`: a private certificate authority, and a certificate of it for this host.
//!
//! Called by `main`. For hosts whose name no public authority knows. The authority can vouch for this
//! one domain and for loopback, and for nothing else, so trusting it gives away little. Refuses to
//! overwrite a file.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType,
};

use crate::config::checked_domain;

const CA: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const CHAIN: &str = "server.pem";
const KEY: &str = "server.key";

const OWNER_ONLY: u32 = 0o600;
const EVERYBODY_READS: u32 = 0o644;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Clocks of clients may be behind.
const VALID_BEFORE: Duration = DAY;
/// Some clients refuse a certificate of a server that is good for longer.
const SERVER_DAYS: u32 = 825;
const CA_DAYS: u32 = 3650;

/// Where clients find the API when the domain is given without a port.
const DEFAULT_PORT: u16 = 3000;

/// What `mica cert` can be told.
#[derive(Args, Debug)]
pub struct CertArgs {
    /// Domain under which sandboxes are reached, as `mica serve --domain` takes it: NAME or NAME:PORT.
    #[arg(long, value_name = "NAME[:PORT]")]
    domain: String,
    /// Directory for ca.pem, ca.key, server.pem and server.key. Made when it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Makes the files and says what clients need.
///
/// # Errors
/// When a file is there already or cannot be written.
pub fn run(args: &CertArgs) -> Result<()> {
    let domain = checked_domain(&args.domain)?;
    let (name, port) = domain.split_once(':').unwrap_or((&domain, ""));
    let port = port.parse().unwrap_or(DEFAULT_PORT);
    let out = std::path::absolute(&args.out).context("--out")?;
    make(name, &out)?;
    print!("{}", instructions(name, port, &out));
    Ok(())
}

fn instructions(name: &str, port: u16, out: &Path) -> String {
    let at = |file: &str| out.join(file).display().to_string();
    let (ca, chain, key) = (at(CA), at(CHAIN), at(KEY));
    format!(
        "# The host, whose name and whose subdomains must lead clients here:\n\
         #   mica serve --domain {name}:{port} --tls-cert {chain} --tls-key {key}\n\
         # Every client, with a copy of {CA} ({CA_KEY} stays here):\n\
         export E2B_DOMAIN={name}:{port}\n\
         export SSL_CERT_FILE={ca}\n\
         export REQUESTS_CA_BUNDLE={ca}\n\
         export NODE_EXTRA_CA_CERTS={ca}\n"
    )
}

fn make(name: &str, out: &Path) -> Result<()> {
    if !name.contains('.') {
        bail!(
            "--domain: clients refuse a certificate for *.{name}; use a name of two labels, such as \
             sbx.{name}"
        );
    }
    let files = [CA, CA_KEY, CHAIN, KEY].map(|file| out.join(file));
    if let Some(there) = files.iter().find(|file| file.exists()) {
        bail!("{} is there already; move it away or choose another --out", there.display());
    }
    let (ca, ca_key, chain, key) = generate(name).context("cannot make a certificate")?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    write(&files[0], OWNER_ONLY | EVERYBODY_READS, &ca)?;
    write(&files[1], OWNER_ONLY, &ca_key)?;
    write(&files[2], OWNER_ONLY | EVERYBODY_READS, &chain)?;
    write(&files[3], OWNER_ONLY, &key)
}

fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// The authority, its key, the server's certificate and its key, in PEM.
fn generate(name: &str) -> Result<(String, String, String, String), rcgen::Error> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut ca = params(&format!("Mica authority of {name}"), CA_DAYS)?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let names = [name, "localhost"].map(|name| GeneralSubtree::DnsName(name.to_owned()));
    let addresses = loopback.map(|ip| {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(ip, bits))
    });
    ca.name_constraints = Some(NameConstraints {
        permitted_subtrees: names.into_iter().chain(addresses).collect(),
        excluded_subtrees: Vec::new(),
    });
    let ca_key = KeyPair::generate()?;
    let ca_pem = ca.self_signed(&ca_key)?.pem();

    let mut server = params(name, SERVER_DAYS)?;
    server.use_authority_key_identifier_extension = true;
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for name in [name, &format!("*.{name}"), "localhost"] {
        server.subject_alt_names.push(SanType::DnsName(name.try_into()?));
    }
    server.subject_alt_names.extend(loopback.map(SanType::IpAddress));
    let key = KeyPair::generate()?;
    let chain = server.signed_by(&key, &Issuer::from_params(&ca, &ca_key))?.pem();
    Ok((ca_pem, ca_key.serialize_pem(), chain, key.serialize_pem()))
}

fn params(common_name: &str, days: u32) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    params.not_before = (now - VALID_BEFORE).into();
    params.not_after = (now + DAY * days).into();
    Ok(params)
}

/// Certificates for tests.
#[cfg(test)]
pub mod testing {
    use super::*;

    /// A new directory with what `mica cert` makes.
    pub fn made(label: &str) -> PathBuf {
        let out = std::env::temp_dir().join(format!("mica-cert-{}-{label}", std::process::id()));
        drop(std::fs::remove_dir_all(&out));
        make("sbx.test", &out).unwrap();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_made_once_and_keys_are_their_owners() {
        let out = testing::made("files");
        let mode = |file: &str| out.join(file).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(CA_KEY), mode(KEY)), (0o600, 0o600));
        assert_eq!((mode(CA) & 0o400, mode(CHAIN) & 0o400), (0o400, 0o400));
        let before = std::fs::read(out.join(CA)).unwrap();
        std::fs::remove_file(out.join(KEY)).unwrap();
        let error = make("sbx.test", &out).unwrap_err().to_string();
        assert!(error.contains("is there already"), "{error}");
        assert_eq!(std::fs::read(out.join(CA)).unwrap(), before);
        assert!(!out.join(KEY).exists(), "nothing was written");
        std::fs::remove_dir_all(out).unwrap();
    }

    #[test]
    fn a_name_of_one_label_is_refused() {
        let nowhere = Path::new("/nonexistent/certificates");
        let error = make("localhost", nowhere).unwrap_err().to_string();
        assert!(error.contains("sbx.localhost"), "{error}");
    }

    #[test]
    fn clients_are_told_what_they_need() {
        let text = instructions("sbx.test", 3944, Path::new("/c"));
        for line in [
            "export E2B_DOMAIN=sbx.test:3944\n",
            "export SSL_CERT_FILE=/c/ca.pem\n",
            "export NODE_EXTRA_CA_CERTS=/c/ca.pem\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
