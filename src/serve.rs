//! `mica serve`: from a checked configuration to a running host, and down again.
//!
//! Called by `main`. Refuses to start where a sandbox could not: no usable KVM, an address that is
//! taken, a key file that is open to others.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use mica_numa::facts::KvmKind;
use mica_shards::StopSignal;
use mica_storage::Reflink;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};

use crate::config::ServeArgs;
use crate::key::book::KeyBook;
use crate::{helper, signals, topology};

/// How often, and how long between, an address is tried that is in use.
const BIND_TRIES_MAX: u32 = 20;
const BIND_REST: Duration = Duration::from_millis(50);

/// Runs the host until a signal.
///
/// # Errors
/// Says what is wrong and what to change.
pub fn run(args: ServeArgs) -> Result<()> {
    let mut config = args.parse()?;
    if let Some(why) = unusable_kvm(config.needs_usable_kvm)? {
        return in_the_lab(&why, config.http.listen.port());
    }
    config.http.listen = free_address(config.http.listen)?;
    config.http.tls = config.tls.load()?;
    if let Some(tls) = &mut config.http.tls {
        tls.listen = tls.listen.map(free_address).transpose()?;
    }
    let book = KeyBook::open(config.keys.clone(), config.http.keys.clone(), !config.open)?;
    config.host.accounts = book.accounts();
    book.keep()?;
    let plan = topology::planned(&config.plan)?;
    let stop = StopSignal::new().context("cannot make the stop signal")?;
    signals::stop_on_signals(stop.clone())?;
    check_clones(&config.host.store_root)?;
    let _awake = config.cpu_latency.hold(&mut config.host)?;
    tracing::info!(
        url = format!("http://{}", config.http.listen),
        keys = %config.keys.file.display(),
        key_database = %config.keys.database.display(),
        open = config.open,
        "starting\n{plan}"
    );

    // A front end that cannot come up stops all shards, and this is where it says why.
    let failure: Arc<OnceLock<String>> = Arc::default();
    let http = config.http;
    let served = AllServed::new(plan.seats.len())?;
    let serve = {
        let failure = Arc::clone(&failure);
        move |host, stop: StopSignal| {
            let (http, failure, served) = (http.clone(), Arc::clone(&failure), served.clone());
            async move {
                let part = Part(served.clone());
                if let Err(error) = mica_http::serve(host, http, stop.clone()).await {
                    failure.get_or_init(|| format!("{:#}", anyhow!(error)));
                    stop.stop();
                }
                drop(part);
                served.everywhere.stopped().await;
            }
        }
    };
    mica_shards::run(&plan, config.host, stop, serve)?;
    if let Some(why) = failure.get() {
        bail!("{why}");
    }
    tracing::info!("stopped");
    Ok(())
}

/// Says at start what a create and a snapshot will cost here.
fn check_clones(store: &Path) -> Result<()> {
    std::fs::create_dir_all(store).with_context(|| format!("cannot make {}", store.display()))?;
    match mica_storage::reflink_support(store)? {
        Reflink::Clones => tracing::info!(store = %store.display(), "disks are cloned"),
        Reflink::Copies => tracing::warn!(
            store = %store.display(),
            "this file system does not clone files: every create and snapshot copies a disk. Use XFS \
             or btrfs; `mica pool create` makes an XFS on a loop device"
        ),
    }
    Ok(())
}

/// A shard that returns from serving ends its sandboxes, and streams into them may still be served
/// on other shards. So each waits until all have drained.
#[derive(Clone)]
struct AllServed {
    serving: Arc<AtomicUsize>,
    everywhere: StopSignal,
}

impl AllServed {
    fn new(shards: usize) -> Result<Self> {
        let everywhere = StopSignal::new().context("cannot make the drain signal")?;
        Ok(Self { serving: Arc::new(AtomicUsize::new(shards)), everywhere })
    }
}

/// One shard's part. Given back when it has drained, and also when it panics.
struct Part(AllServed);

impl Drop for Part {
    fn drop(&mut self) {
        if self.0.serving.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.everywhere.stop();
        }
    }
}

/// Why this machine cannot be the host, if it cannot.
fn unusable_kvm(needs_usable_kvm: bool) -> Result<Option<KvmKind>> {
    let kind = KvmKind::detect().context("cannot read /proc/cpuinfo")?;
    if kind.runs_linux() || !needs_usable_kvm {
        tracing::info!("{kind}");
        return Ok(None);
    }
    Ok(Some(kind))
}

/// Says why, and becomes the lab: the same port, an emulated host behind it.
fn in_the_lab(why: &KvmKind, port: u16) -> Result<()> {
    eprintln!("{why}.\nRunning in the lab instead: an emulated host, about 24 times slower.");
    let words = ["lab".into(), "serve".into(), "--port".into(), port.to_string().into()];
    helper::become_helper(&words)
}

/// Every shard shares the address, so a second daemon of the same user could share it too. Binding
/// it alone first finds that out, and turns port 0 into the one that all shards use. Without
/// listening: a client that connects now must be refused, not taken and dropped.
fn free_address(wanted: SocketAddr) -> Result<SocketAddr> {
    let family = if wanted.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC;
    let alone = socket_with(family, SocketType::STREAM, flags, None).context("no socket")?;
    // Connections of an earlier daemon that are still closing are no reason to wait.
    sockopt::set_socket_reuseaddr(&alone, true)?;
    let mut tries = 0;
    let mut bound = bind(&alone, &wanted);
    // The kernel closes the sockets of a killed daemon's rings a moment after its death.
    while bound == Err(Errno::ADDRINUSE) && tries < BIND_TRIES_MAX {
        tries += 1;
        std::thread::sleep(BIND_REST);
        bound = bind(&alone, &wanted);
    }
    bound.with_context(|| format!("cannot listen on {wanted}; choose another with --listen"))?;
    Ok(getsockname(&alone)?.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_address_that_is_taken_is_told_and_port_0_becomes_a_port() {
        let any = "127.0.0.1:0".parse().unwrap();
        let free = free_address(any).unwrap();
        assert_ne!(free.port(), 0);
        let taken = TcpListener::bind(free).unwrap();
        let error = free_address(free).unwrap_err().to_string();
        assert!(error.contains("--listen"), "{error}");
        drop(taken);
        assert_eq!(free_address(free).unwrap(), free);
    }
}
