//! `mica bench engine`: every operation on sandboxes at the shard and over HTTP, beside its floor.
//!
//! Called by [`crate::run`]. Needs root, `/dev/kvm` of any kind, cgroup v2 and a directory on a disk; nothing
//! else of a host. Refuses to leave anything behind, and says so with its exit code.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use mica_lab::bench::html::page::page;
use mica_lab::engine::density::{self, Idle, Left};
use mica_lab::engine::dirt::Dirt;
use mica_lab::engine::floor::{Config, Floor};
use mica_lab::engine::http;
use mica_lab::engine::machine;
use mica_lab::engine::memory::{Machine, ours};
use mica_lab::engine::operations::Bench;
use mica_lab::engine::place::{MEMORY, Places, vcpus};
use mica_lab::engine::report::Report;
use mica_lab::engine::series::Book;
use mica_lab::one_vm::find_mica_vm;
use mica_units::Mebibytes;
use serde_json::{Value, json};

use crate::print;

/// Shells that a host keeps where creates are to find one.
const POOL: u32 = 4;
/// Sandboxes of the larger clone.
const CLONES: u32 = 100;

#[derive(Args, Debug)]
pub struct EngineArgs {
    /// A directory to be made for the store, on a file system with direct I/O, and removed at the end.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// The program of the VMs. Default: mica-vm beside this program.
    #[arg(long, value_name = "FILE")]
    vm_program: Option<PathBuf>,
    /// The daemon. Default: mica beside this program.
    #[arg(long, value_name = "FILE")]
    mica: Option<PathBuf>,
    /// Shards of the host.
    #[arg(long, value_name = "N", default_value_t = 1)]
    shards: u16,
    /// Write the report to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a page with plots to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// A few rounds of everything: shows that it works, and no more.
    #[arg(long)]
    quick: bool,
    /// Only these parts, separated by commas.
    #[arg(long, value_name = "PART", value_delimiter = ',', value_enum)]
    only: Vec<Part>,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Creates, pauses, resumes, ends.
    Lives,
    /// Snapshots of every size, and rollbacks.
    Snapshots,
    /// Clones.
    Clones,
    /// 200 sandboxes at a time.
    Density,
    /// Create and kill, again and again.
    Rounds,
    /// Over HTTP.
    Http,
}

/// How often everything is done.
#[derive(Clone, Copy, Debug)]
struct Effort {
    lives: u32,
    misses: u32,
    chains: u32,
    dense: u32,
    large: u32,
    clone_1: u32,
    clone_100: u32,
    flat: u32,
    rounds: u32,
    http: u32,
}

const FULL: Effort = Effort {
    lives: 300,
    misses: 100,
    chains: 80,
    dense: 30,
    large: 12,
    clone_1: 50,
    clone_100: 8,
    flat: 40,
    rounds: 1000,
    http: 200,
};

const QUICK: Effort = Effort {
    lives: 5,
    misses: 3,
    chains: 3,
    dense: 2,
    large: 1,
    clone_1: 2,
    clone_100: 1,
    flat: 3,
    rounds: 20,
    http: 5,
};

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When this machine cannot, or anything fails.
pub fn engine(args: &EngineArgs) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this takes root, as the daemon does");
    let root = args
        .store
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("/var/tmp/mica-bench-{}", std::process::id())));
    let vm_program = args.vm_program.clone().map_or_else(find_mica_vm, Ok)?;
    let places = Places::make(&root, &vm_program, args.shards)?;
    let config = Config { directory: places.floor(), memory: MEMORY, vcpus: vcpus()? };
    let floor = Arc::new(Floor::make(config)?);
    let mut run = Run { args, places, floor, book: Book::default(), idle: None, left: None };
    run.measure(if args.quick { QUICK } else { FULL })?;
    let report = Report {
        host: machine::host(Some(&run.places.store()))?,
        series: run.book.all(),
        idle: run.idle.as_ref(),
        left: run.left.as_ref(),
    };
    print(&report.table())?;
    let document = report.document(&args.options());
    if let Some(path) = &args.output {
        document.write(path)?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, page(std::slice::from_ref(&document)))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

impl EngineArgs {
    /// What it was asked to do, for the report.
    fn options(&self) -> Value {
        let name = |part: &Part| part.to_possible_value().map(|value| value.get_name().to_owned());
        let only: Vec<_> = self.only.iter().filter_map(name).collect();
        json!({ "shards": self.shards, "quick": self.quick, "only": only })
    }
}

/// One run of the program.
struct Run<'a> {
    args: &'a EngineArgs,
    places: Places,
    floor: Arc<Floor>,
    book: Book,
    idle: Option<Idle>,
    left: Option<Left>,
}

impl Run<'_> {
    fn wants(&self, part: Part) -> bool {
        self.args.only.is_empty() || self.args.only.contains(&part)
    }

    fn measure(&mut self, effort: Effort) -> Result<()> {
        if self.wants(Part::Lives) {
            self.on_host(POOL, async move |bench| bench.lives(effort.lives).await)?;
            self.on_host(0, async move |bench| bench.misses(effort.misses).await)?;
        }
        if self.wants(Part::Snapshots) {
            self.on_host(POOL, async move |bench| snapshots(bench, effort).await)?;
        }
        if self.wants(Part::Clones) {
            self.on_host(POOL, async move |bench| {
                bench.clones("clone_1", 1, effort.clone_1).await
            })?;
            self.on_host(CLONES + POOL, async move |bench| {
                bench.clones("clone_100", CLONES as usize, effort.clone_100).await
            })?;
        }
        if self.wants(Part::Density) {
            let empty = Machine::now(&ours()?)?;
            let idle =
                self.on_host(POOL, async move |bench| bench.density(empty, effort.flat).await)?;
            self.idle = Some(idle);
        }
        if self.wants(Part::Rounds) {
            let places = (self.places.store(), self.places.cgroup.clone());
            let left = self.on_host(POOL, async move |bench| {
                density::rounds(&bench.host, bench.shells, effort.rounds, places).await
            })?;
            self.left = Some(left);
        }
        if self.wants(Part::Http) {
            let mica = self.args.mica.clone().map_or_else(|| beside("mica", "--mica"), Ok)?;
            http::creates(&self.places, &mica, &self.floor, &mut self.book, effort.http)?;
        }
        Ok(())
    }

    /// Runs a part on a host of its own that keeps `pool` shells on each shard.
    fn on_host<T: Send + 'static>(
        &mut self,
        pool: u32,
        work: impl AsyncFnOnce(&mut Bench<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let floor = Arc::clone(&self.floor);
        let shells = u64::from(pool) * u64::from(self.args.shards);
        let (done, book) = self.places.on_host(pool, move |host| async move {
            let mut bench = Bench { host, floor: &floor, shells, book: Book::default() };
            let done = work(&mut bench).await?;
            Ok((done, bench.book))
        })?;
        self.book.append(book);
        Ok(done)
    }
}

async fn snapshots(bench: &mut Bench<'_>, effort: Effort) -> Result<()> {
    let size = Mebibytes::new;
    let Effort { chains, dense, large, .. } = effort;
    bench.chains(chains).await?;
    bench.snapshots("snapshot_7mb_dense", size(7), Dirt::Dense, dense).await?;
    bench.snapshots("snapshot_64mb", size(64), Dirt::Scattered, large).await?;
    bench.snapshots("snapshot_64mb_dense", size(64), Dirt::Dense, large).await?;
    bench.snapshots("snapshot_256mb", size(256), Dirt::Scattered, large).await?;
    bench.snapshots("snapshot_256mb_dense", size(256), Dirt::Dense, large).await
}

pub fn beside(name: &str, option: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("find this program")?;
    let path = this.with_file_name(name);
    ensure!(Path::is_file(&path), "there is no {}; use {option}", path.display());
    Ok(path)
}
