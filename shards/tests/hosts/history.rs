//! Random histories of one sandbox, against a model that is an array of bytes.
//!
//! Against the double. The model knows what each frame is full of; of one that was given back it knows
//! nothing until it is written again or a rollback says what it was.

use std::collections::BTreeMap;

use mica_shards::{Host, HostConfig};
use mica_units::SandboxId;
use proptest::prelude::*;

use crate::common::{Bench, FRAMES, base_memory, kill_process, memory, request, tell};
use crate::wait::eventually;

const LIFE: std::time::Duration = std::time::Duration::from_secs(600);

/// Snapshots that a history keeps.
const SNAPSHOTS_MAX: usize = 5;

#[derive(Clone, Debug)]
enum Deed {
    Fill(u32, u32, u8),
    Forget(u32, u32),
    Register(u64),
    Disk(u8),
    Snapshot,
    Rollback(usize),
    PauseAndResume { on_disk: bool },
    CreateFrom(usize),
    Delete(usize),
}

/// Most of them in a small part of memory, so that they meet.
fn any_run() -> impl Strategy<Value = (u32, u32)> {
    let near = (80u32..190, 1u32..40);
    let far = (0..FRAMES, 1u32..900);
    prop_oneof![4 => near, 1 => far].prop_map(|(first, count)| (first, count.min(FRAMES - first)))
}

fn any_deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        6 => (any_run(), 1u8..=255).prop_map(|((first, count), byte)| Deed::Fill(first, count, byte)),
        3 => any_run().prop_map(|(first, count)| Deed::Forget(first, count)),
        1 => any::<u64>().prop_map(Deed::Register),
        1 => any::<u8>().prop_map(Deed::Disk),
        4 => Just(Deed::Snapshot),
        4 => any::<usize>().prop_map(Deed::Rollback),
        2 => any::<bool>().prop_map(|on_disk| Deed::PauseAndResume { on_disk }),
        2 => any::<usize>().prop_map(Deed::CreateFrom),
        1 => any::<usize>().prop_map(Deed::Delete),
    ]
}

/// How a shard learns what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToldBy {
    /// By the kernel, from outside.
    Scan,
    /// By the VM process.
    Log,
    /// Not at all.
    Nobody,
}

/// What the guest should be.
#[derive(Clone, Debug)]
struct Model {
    memory: Vec<Option<u8>>,
    register: u64,
    disk: String,
}

impl Model {
    async fn check(&self, host: &Host, id: SandboxId, what: &str) {
        let found = memory(host, id).await;
        let differs = |frame: &usize| self.memory[*frame].is_some_and(|byte| byte != found[*frame]);
        let frames: Vec<_> = (0..found.len())
            .filter(differs)
            .map(|frame| (frame, found[frame], self.memory[frame]))
            .collect();
        let shown = &frames[..frames.len().min(6)];
        assert!(frames.is_empty(), "{what}: {} frames differ: {shown:?}", frames.len());
        assert_eq!(tell(host, id, "register").await, self.register.to_string(), "{what}");
        assert_eq!(tell(host, id, "disk").await, self.disk, "{what}");
    }
}

struct History {
    host: Host,
    places: crate::common::Places,
    id: SandboxId,
    now: Model,
    snapshots: BTreeMap<String, Model>,
}

impl History {
    fn pick(&self, number: usize) -> Option<(String, Model)> {
        let at = number.checked_rem(self.snapshots.len())?;
        self.snapshots.iter().nth(at).map(|(id, model)| (id.clone(), model.clone()))
    }

    async fn happens(&mut self, deed: &Deed) {
        let (host, id) = (self.host.clone(), self.id);
        let frames = |first: u32, count: u32| first as usize..(first + count) as usize;
        match deed {
            Deed::Fill(first, count, byte) => {
                tell(&host, id, &format!("fill {first} {count} {byte}")).await;
                self.now.memory[frames(*first, *count)].fill(Some(*byte));
            }
            Deed::Forget(first, count) => {
                tell(&host, id, &format!("forget {first} {count}")).await;
                self.now.memory[frames(*first, *count)].fill(None);
            }
            Deed::Register(number) => {
                tell(&host, id, &format!("register {number}")).await;
                self.now.register = *number;
            }
            Deed::Disk(number) => {
                tell(&host, id, &format!("disk is-{number}")).await;
                self.now.disk = format!("is-{number}");
            }
            Deed::Snapshot if self.snapshots.len() < SNAPSHOTS_MAX => {
                let snapshot = host.snapshot(id, None).await.unwrap().id;
                self.snapshots.insert(snapshot, self.now.clone());
            }
            Deed::Snapshot => {}
            Deed::Rollback(number) => {
                let Some((snapshot, model)) = self.pick(*number) else { return };
                host.rollback(id, snapshot).await.unwrap();
                self.now = model;
            }
            Deed::PauseAndResume { on_disk } => {
                host.pause(id).await.unwrap();
                if *on_disk {
                    self.places.pids().into_iter().for_each(kill_process);
                }
                eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
            }
            Deed::CreateFrom(number) => {
                let Some((snapshot, model)) = self.pick(*number) else { return };
                let copy = host.create(request(&snapshot)).await.unwrap().id;
                model.check(&host, copy, "a copy").await;
                host.kill(copy).await.unwrap();
            }
            Deed::Delete(number) => {
                let Some((snapshot, _)) = self.pick(*number) else { return };
                assert!(host.delete_snapshot(&snapshot).await.unwrap());
                self.snapshots.remove(&snapshot);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 40, ..ProptestConfig::with_cases(3) })]

    #[test]
    fn a_sandbox_is_always_what_its_history_made_it(
        deeds in prop::collection::vec(any_deed(), 10..40), capture_budget_mib in 1u32..6,
    ) {
        for told_by in [ToldBy::Scan, ToldBy::Log, ToldBy::Nobody] {
            lives(deeds.clone(), told_by, capture_budget_mib);
        }
    }
}

/// A sandbox of this history is at each time what it should be.
fn lives(deeds: Vec<Deed>, told_by: ToldBy, capture_budget_mib: u32) {
    let bench = Bench::new();
    bench.set_mood(if told_by == ToldBy::Scan { "good" } else { "untracked" });
    let places = bench.clone();
    let log_writes = told_by == ToldBy::Log;
    let config = HostConfig { capture_budget_mib, log_writes, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let memory = base_memory().into_iter().map(Some).collect();
        let now = Model { memory, register: 7, disk: "template".to_owned() };
        let mut history = History { host, places, id, now, snapshots: BTreeMap::new() };
        for (number, deed) in deeds.iter().enumerate() {
            history.happens(deed).await;
            let what = format!("after deed {number}, {deed:?}");
            history.now.check(&history.host, id, &what).await;
        }
        for snapshot in history.snapshots.keys() {
            history.host.delete_snapshot(snapshot).await.unwrap();
        }
    });
    ended.unwrap();
    assert_eq!(bench.leftovers(), crate::common::Leftovers::default());
}
