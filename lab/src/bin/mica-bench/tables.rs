//! `mica bench TABLE`: runs one table against a host, prints it, and writes the reports that were asked for.
//!
//! Called by [`crate::run`]. Refuses to leave anything on the host, also when the run fails or is interrupted;
//! its exit code says whether every request was answered well.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use clap::Args;
use mica_lab::bench::cube;
use mica_lab::bench::daemon::{Daemon, is_local};
use mica_lab::bench::document::Document;
use mica_lab::bench::host::{Address, Host};
use mica_lab::bench::html::page::page;
use mica_lab::bench::table::{Show, Table};
use mica_lab::bench::tables::Measure;
use mica_lab::engine::machine;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::print;

/// Where the host is, and what a run leaves.
#[derive(Args, Debug)]
pub struct Common {
    /// The host. Default: $`E2B_API_URL`, or $`CUBE_API_URL`.
    #[arg(long, alias = "api-url", value_name = "URL", env = "E2B_API_URL")]
    url: Option<String>,
    /// One of its keys. Default: $`E2B_API_KEY`, or $`CUBE_API_KEY`.
    #[arg(long, value_name = "KEY", env = "E2B_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What sandboxes are made of.
    #[arg(
        short,
        long,
        value_name = "NAME",
        env = "CUBE_TEMPLATE_ID",
        default_value = "code-interpreter-v1"
    )]
    template: String,
    /// Write the report to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a page with plots to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print CubeSandbox's tables, as Markdown, and nothing else.
    #[arg(long)]
    cube_table: bool,
    /// Print no line of names above the table.
    #[arg(long)]
    no_header: bool,
}

impl Common {
    fn address(&self) -> Result<Address> {
        let url = self.url.clone().or_else(|| std::env::var("CUBE_API_URL").ok());
        let key = self.api_key.clone().or_else(|| std::env::var("CUBE_API_KEY").ok());
        Ok(Address {
            url: url.context("say where the host is: --url http://HOST:3000, or $E2B_API_URL")?,
            api_key: key.context("say one of its keys: --api-key, or $E2B_API_KEY")?,
            template: self.template.clone(),
        })
    }
}

/// Set by the first SIGINT or SIGTERM; the second one ends the program at once.
///
/// # Errors
/// When signals cannot be caught.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_default(signal, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

/// Runs a table, cleans up after it, and writes what was asked for.
///
/// # Errors
/// When the host cannot be measured, something stays, or a request failed.
pub fn run(measure: &dyn Measure, common: &Common) -> Result<()> {
    let host = Host::new(common.address()?, stop_flag()?)?;
    let show = match (common.cube_table, common.no_header) {
        (true, _) => Show::Nothing,
        (false, true) => Show::Rows,
        (false, false) => Show::HeadAndRows,
    };
    let mut table = Table::new(show);
    let measured = measure.measure(&host, &mut table);
    let cleaned = host.clean();
    if common.cube_table {
        print(&cube::tables(&table.rows, !common.no_header))?;
    }
    let document = document(measure, &host, &table, measured.is_ok())?;
    // A table of CubeSandbox's is pasted as it is.
    if !common.cube_table && !common.no_header {
        print(&format!("\n{}", machine::text(&document.0["host"])))?;
    }
    if let Some(path) = &common.output {
        document.write(path)?;
    }
    if let Some(path) = &common.html {
        let page = page(std::slice::from_ref(&document));
        std::fs::write(path, page).with_context(|| format!("write {}", path.display()))?;
    }
    measured?;
    cleaned.context("remove what the run made")?;
    let failed = table.failed();
    ensure!(failed == 0, "{failed} requests failed, in {} rows", table.rows.len());
    Ok(())
}

fn document(
    measure: &dyn Measure,
    host: &Host,
    table: &Table,
    is_complete: bool,
) -> Result<Document> {
    let mut document = Document::new(measure.name(), &measure.options(), &table.rows);
    document.0["complete"] = json!(is_complete);
    document.0["notes"] = json!(table.notes);
    let daemon = Daemon::find(host.socket).ok();
    let store = daemon.and_then(|daemon| machine::store_of(daemon.pid));
    // The machine of the clients; the host may be another, and then its disks are not to be seen.
    document.0["host"] = machine::host(store.as_deref())?;
    document.0["target"] = json!({
        "url": host.address.url,
        "template": host.address.template,
        "is_local": is_local(host.socket.ip()),
        "daemon_pid": daemon.map(|daemon| daemon.pid),
        "daemon_memory_bytes": daemon.and_then(Daemon::memory_bytes),
        "template_info": template(host),
    });
    Ok(document)
}

/// What the API tells of the template: its processors, memory and disk.
fn template(host: &Host) -> Value {
    let path = format!("/templates/{}", host.address.template);
    let found = host.get(&path).ok().and_then(|body| serde_json::from_slice::<Value>(&body).ok());
    let Some(found) = found else { return Value::Null };
    let build = found["builds"].get(0).unwrap_or(&found);
    json!({
        "cpu_count": build["cpuCount"], "memory_mb": build["memoryMB"],
        "disk_mb": build["diskSizeMB"], "envd_version": build["envdVersion"],
    })
}

/// Runs a table on another host, shows nothing, and gives its rows, without the phases of the host.
///
/// # Errors
/// When the host cannot be measured, or something stays.
pub fn quietly(measure: &dyn Measure, address: &Address, stop: &Arc<AtomicBool>) -> Result<Table> {
    let host = Host::new(address.clone(), Arc::clone(stop))?;
    let mut table = Table::of_requests_alone();
    let measured = measure.measure(&host, &mut table);
    let cleaned = host.clean();
    measured?;
    cleaned.context("remove what the run made")?;
    Ok(table)
}
