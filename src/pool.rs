//! `mica pool`: a file system that can clone files, for machines whose own cannot.
//!
//! Called by the command line. Refuses to delete a pool unless it is told that the data may go.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use mica_storage::{POOL_BYTES_MIN, Pool, PoolCreated, PoolInfo, pools};

/// Makes, lists and removes pools.
#[derive(Args, Debug)]
pub struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

#[derive(Subcommand, Debug)]
enum PoolCommand {
    /// Make an XFS image with room for SIZE and mount it on a directory, usually that of the store.
    /// Does only what is missing, so it can run at every start of the machine.
    Create {
        /// How large, for example 20G.
        #[arg(long)]
        size: Size,
        #[command(flatten)]
        place: Place,
    },
    /// List the pools that are mounted.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Unmount a pool and delete its image.
    Remove {
        #[command(flatten)]
        place: Place,
        /// Delete all that is in it.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Args, Debug)]
struct Place {
    /// Where it is mounted.
    #[arg(long, value_name = "DIR")]
    path: PathBuf,
    /// The image; by default the file beside the directory with `.img` added to its name.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
}

impl Place {
    fn pool(&self) -> Result<Pool> {
        Ok(Pool::at(&self.path, self.image.as_deref())?)
    }
}

/// A number of bytes, written as `512M`, `20G` or `1T` (powers of 1024), or as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a size such as 512M, 20G or 1T");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text.get(digits.len()..).unwrap_or_default() {
            "" => 0,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(wrong()),
        };
        let count: u64 = digits.parse().map_err(|_| wrong())?;
        let bytes = count.checked_mul(1 << shift).ok_or_else(wrong)?;
        if bytes < POOL_BYTES_MIN {
            return Err(format!("{text} is less than the smallest pool, 300M"));
        }
        Ok(Self(bytes))
    }
}

/// Runs one `mica pool` command.
///
/// # Errors
/// With what to change, as the store says it.
pub fn run(args: &PoolArgs) -> Result<()> {
    match &args.command {
        PoolCommand::Create { size, place } => create(*size, &place.pool()?),
        PoolCommand::List { json } => list(*json),
        PoolCommand::Remove { place, yes } => {
            let pool = place.pool()?;
            if !yes {
                bail!(
                    "this deletes {} with all that is in it; say --yes if it may go",
                    pool.image().display()
                );
            }
            pool.remove()?;
            println!("removed {}", pool.image().display());
            Ok(())
        }
    }
}

fn create(size: Size, pool: &Pool) -> Result<()> {
    let (mount, image) = (pool.mount().display(), pool.image().display());
    match pool.create(size.0)? {
        PoolCreated::Made => println!("made {image} and mounted it on {mount}"),
        PoolCreated::Mounted => println!("mounted {image}, which was there, on {mount}"),
        PoolCreated::AlreadyThere => println!("{image} is mounted on {mount} already"),
    }
    Ok(())
}

fn list(json: bool) -> Result<()> {
    let found = pools()?;
    if json {
        let rows: Vec<_> = found.iter().map(row).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    print!("{}", table(&found));
    Ok(())
}

fn row(pool: &PoolInfo) -> serde_json::Value {
    serde_json::json!({
        "path": pool.mount,
        "image": pool.image,
        "bytes": pool.bytes,
        "freeBytes": pool.free_bytes,
    })
}

fn table(pools: &[PoolInfo]) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let shown = |path: &Path| path.display().to_string();
    let mut text = format!("{:<32} {:>12} {:>12}  {}\n", "PATH", "SIZE", "FREE", "IMAGE");
    for pool in pools {
        let (path, image) = (shown(&pool.mount), shown(&pool.image));
        let (size, free) = (mib(pool.bytes), mib(pool.free_bytes));
        text.push_str(&format!("{path:<32} {size:>12} {free:>12}  {image}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_not() {
        for (text, bytes) in [
            ("512M", 512u64 << 20),
            ("20G", 20 << 30),
            ("20GiB", 20 << 30),
            ("1T", 1 << 40),
            ("314572800", 300 << 20),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "G", "1K", "299M", "-5G", "1.5G", "20 G", "99999999T", "20Gé"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn pools_are_shown_as_a_table_and_as_json() {
        let pool = PoolInfo {
            mount: "/var/lib/mica".into(),
            image: "/var/lib/mica.img".into(),
            bytes: 20 << 30,
            free_bytes: 5 << 30,
        };
        let text = table(std::slice::from_ref(&pool));
        assert!(text.contains("20480 MiB     5120 MiB  /var/lib/mica.img"), "{text}");
        assert_eq!(table(&[]).lines().count(), 1);
        assert_eq!(row(&pool)["freeBytes"], 5u64 << 30);
    }
}
