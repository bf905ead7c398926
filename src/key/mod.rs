//! `mica key`: makes, lists and revokes API keys.
//!
//! Called by the command line; a daemon that runs sees the change within a second. Refuses to show a
//! key a second time: only its hash is kept.

pub mod book;
pub mod database;
pub mod file;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use mica_http::{ApiKey, KeyLimits};
use mica_units::TenantId;
use rustix::rand::{GetRandomFlags, getrandom};

use database::KeyRecord;

/// Makes, lists and revokes API keys.
#[derive(Args, Debug)]
pub struct KeyArgs {
    /// The key database; `mica serve` looks for `keys.json` beside its key file.
    #[arg(long, value_name = "FILE", global = true, default_value = "/etc/mica/keys.json")]
    key_db: PathBuf,
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Subcommand, Debug)]
enum KeyCommand {
    /// Make a key and print it. It is shown this once.
    Create {
        /// Whose sandboxes and snapshots it opens. Tenants see nothing of one another.
        #[arg(long, value_name = "NAME", default_value_t)]
        tenant: TenantId,
        /// Most sandboxes of this key at one time, running and paused. Default: as many as the host runs.
        #[arg(long, value_name = "N")]
        sandboxes_max: Option<u32>,
        /// Sandboxes that this key may make in a second, 0.5 for one every two seconds; as many as one
        /// second gives may come at once. Default: any.
        #[arg(long, value_name = "R")]
        creates_per_second: Option<f64>,
        /// What the list calls it.
        #[arg(long, value_name = "TEXT", default_value = "")]
        name: String,
    },
    /// List the keys: id, tenant, name, when they were made, limits.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a key back. Its sandboxes stay: they are its tenant's.
    Revoke {
        /// The id that the list shows.
        id: String,
    },
}

/// Does what was asked.
///
/// # Errors
/// Says what is wrong and what to change.
pub fn run(args: KeyArgs) -> Result<()> {
    let path = args.key_db;
    match args.command {
        KeyCommand::Create { tenant, sandboxes_max, creates_per_second, name } => {
            if tenant.as_str() == mica_shards::BUILD_TENANT {
                bail!("the tenant {tenant} is the host's own; give yours another name");
            }
            let key = random_key()?;
            let since = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock")?;
            let record = KeyRecord {
                hash: key.hash(),
                tenant,
                name,
                created_unix_s: since.as_secs(),
                limits: KeyLimits { sandboxes_max, creates_per_second },
            };
            database::update(&path, |keys| {
                keys.push(record.clone());
                Ok(())
            })?;
            eprintln!("key {} of tenant {}; it is not shown again", record.id(), record.tenant);
            let mut out = std::io::stdout();
            writeln!(out, "{}", key.reveal()).context("print the key")
        }
        KeyCommand::List { json } => {
            let keys = database::read(&path)?;
            let text = if json { database::listed(&keys)? } else { table(&keys) };
            let mut out = std::io::stdout();
            writeln!(out, "{text}").context("print the list")
        }
        KeyCommand::Revoke { id } => database::update(&path, |keys| {
            let before = keys.len();
            keys.retain(|record| record.id() != id);
            if keys.len() == before {
                bail!("no key has the id {id:?}; `mica key list` shows them");
            }
            Ok(())
        }),
    }
}

/// A new key.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn random_key() -> Result<ApiKey> {
    let mut random = [0; 20];
    let filled = getrandom(&mut random, GetRandomFlags::empty())?;
    if filled != random.len() {
        bail!("the kernel gave {filled} random bytes instead of {}", random.len());
    }
    Ok(ApiKey::from_random(random))
}

fn table(keys: &[KeyRecord]) -> String {
    let mut text = format!(
        "{:<12}  {:<16}  {:<20}  {:>13}  {:>9}  NAME",
        "ID", "TENANT", "CREATED", "SANDBOXES MAX", "CREATES/S"
    );
    for key in keys {
        let number = |limit: Option<String>| limit.unwrap_or_else(|| "-".to_owned());
        text += &format!(
            "\n{:<12}  {:<16}  {:<20}  {:>13}  {:>9}  {}",
            key.id(),
            key.tenant.as_str(),
            mica_http::rfc3339(UNIX_EPOCH + std::time::Duration::from_secs(key.created_unix_s)),
            number(key.limits.sandboxes_max.map(|most| most.to_string())),
            number(key.limits.creates_per_second.map(|rate| rate.to_string())),
            key.name
        );
    }
    text
}
