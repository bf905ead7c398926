//! A daemon for the tests that kill one: does what each line of its standard input says.
//!
//! Called by `main`. Answers a line by one of its own, `ok …` or `no …`, behind the line's number; each
//! line is a task, so that one can be under way when the daemon is killed. Refuses to end by itself: the
//! line `stop` ends it as an operator would.

use std::path::PathBuf;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use mica_numa::{PlanConfig, Shards, StopSignal, plan, rt, topology};
use mica_shards::{CreateRequest, Host, HostConfig};
use mica_storage::FlattenLimits;
use mica_units::{GuestPort, SandboxId};

/// The life of every sandbox.
const LIFE: Duration = Duration::from_secs(3600);

pub fn run(options: &[&str]) {
    let [store, cgroup, program, keep, on_demand_over_mib, writes] = options else {
        panic!("not six of {options:?}")
    };
    let wish = PlanConfig { shards: Shards::Total(1), ..PlanConfig::default() };
    let plan = plan(&topology::read().unwrap(), &wish).unwrap();
    let config = HostConfig {
        cgroup_limits_required: false,
        uid_first: 40_000,
        sandboxes_max: 100,
        console_bytes: 8192,
        boot_deadline: Duration::from_secs(20),
        pool_floor: 0,
        pool_ceiling: 0,
        keep_sandboxes: *keep == "keep",
        capture_budget_mib: 4,
        io_buffers: 8,
        replica_budget_mib: 0,
        on_demand_over_mib: on_demand_over_mib.parse().unwrap(),
        log_writes: *writes == "log",
        flatten: FlattenLimits::default(),
        memory_reserve_mib: 0,
        ..HostConfig::new(PathBuf::from(store), PathBuf::from(program), PathBuf::from(cgroup))
    };
    mica_shards::run(&plan, config, StopSignal::new().unwrap(), move |host, _| async move {
        println!("ready");
        for number in 0.. {
            let line = rt::blocking(|| {
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).unwrap();
                line
            });
            let line = line.await.unwrap();
            let line = line.trim().to_owned();
            if line.is_empty() || line == "stop" {
                break;
            }
            let host = host.clone();
            rt::spawn(async move {
                match obey(&host, &line).await {
                    Ok(said) => println!("{number} ok {said}"),
                    Err(error) => println!("{number} no {error}"),
                }
            })
            .detach();
        }
    })
    .unwrap();
}

async fn obey(host: &Host, line: &str) -> Result<String, Box<dyn std::error::Error>> {
    let words: Vec<&str> = line.splitn(3, ' ').collect();
    let id = |text: &str| text.parse::<SandboxId>();
    let done = |()| "done".to_owned();
    match words[..] {
        ["create", template] => Ok(host.create(request(template)).await?.id.to_string()),
        ["snapshot", sandbox] => Ok(host.snapshot(id(sandbox)?, None).await?.id),
        ["snapshot-disk", sandbox] => Ok(host.snapshot_disk(id(sandbox)?, None).await?.id),
        ["rollback", sandbox, to] => Ok(done(host.rollback(id(sandbox)?, to.to_owned()).await?)),
        ["pause", sandbox] => Ok(done(host.pause(id(sandbox)?).await?)),
        ["pause-to-disk", sandbox] => Ok(done(host.pause_to_disk(id(sandbox)?).await?)),
        ["resume", sandbox] => Ok(host.resume(id(sandbox)?, LIFE, None).await?.id.to_string()),
        ["kill", sandbox] => Ok(done(host.kill(id(sandbox)?).await?)),
        ["clone", sandbox, count] => {
            let made = host.clone_sandbox(id(sandbox)?, count.parse()?, None).await?;
            Ok(made.iter().map(|info| info.id.to_string()).collect::<Vec<_>>().join(" "))
        }
        ["tell", sandbox, text] => {
            let mut stream = host.connect(id(sandbox)?, GuestPort::new(16)?).await?;
            stream.write_all(format!("{text}\n").as_bytes()).await?;
            let mut said = String::new();
            stream.read_to_string(&mut said).await?;
            Ok(said)
        }
        _ => Err(format!("unknown line {line:?}").into()),
    }
}

fn request(template: &str) -> CreateRequest {
    CreateRequest::new(template, LIFE)
}
