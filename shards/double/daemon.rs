//! A daemon for the test that kills one: makes sandboxes, says so, and waits.
//!
//! Called by `main`. Refuses to end by itself.

use std::path::PathBuf;
use std::time::Duration;

use mica_numa::{PlanConfig, Reserved, Shards, StopSignal, plan, topology};
use mica_shards::{CreateRequest, HostConfig};

pub fn run(store: &str, cgroup: &str, program: &str, count: usize) {
    let wish = PlanConfig { shards: Shards::Total(1), reserved: Reserved::PerNode(0) };
    let plan = plan(&topology::read().unwrap(), &wish).unwrap();
    let config = HostConfig {
        store_root: PathBuf::from(store),
        vm_program: PathBuf::from(program),
        cgroup_root: PathBuf::from(cgroup),
        cgroup_limits_required: false,
        uid_first: 40_000,
        sandboxes_max: 100,
        console_bytes: 8192,
        boot_deadline: Duration::from_secs(20),
    };
    mica_shards::run(&plan, config, StopSignal::new().unwrap(), move |host, stop| async move {
        for _ in 0..count {
            let request = CreateRequest {
                template: "agent".to_owned(),
                timeout: Duration::from_secs(3600),
                secure: false,
                metadata: std::collections::BTreeMap::new(),
                env_vars: std::collections::BTreeMap::new(),
            };
            host.create(request).await.unwrap();
        }
        println!("ready");
        stop.stopped().await;
    })
    .unwrap();
}
