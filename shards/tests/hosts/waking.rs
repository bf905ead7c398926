//! How long sandboxes live, and what wakes the paused ones.
//!
//! Against the double.

use std::time::{Duration, Instant, SystemTime};

use mica_shards::{
    ConnectError, CreateRequest, Host, HostConfig, Lifecycle, LogSource, NEVER, OnTimeout, Usage,
    Visitor, rt,
};
use mica_units::SandboxId;

use crate::common::{Bench, kill_process, port, request};
use crate::wait::eventually;

const CLIENT: Visitor = Visitor::Client(None);

fn pausing(auto_resume: bool) -> CreateRequest {
    CreateRequest { on_timeout: OnTimeout::Pause, auto_resume, ..request("agent") }
}

async fn is_paused(host: &Host, id: SandboxId) -> bool {
    host.get(id).await.is_ok_and(|info| info.state == Lifecycle::Paused)
}

/// How much longer it lives, in whole seconds.
async fn seconds_left(host: &Host, id: SandboxId) -> u64 {
    let end = host.get(id).await.unwrap().end_at.unwrap();
    let left = end.duration_since(SystemTime::now()).unwrap_or_default();
    (left + Duration::from_millis(500)).as_secs()
}

#[test]
fn a_visitor_wakes_a_paused_sandbox_if_that_was_wished_for() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let deaf = host.create(pausing(false)).await.unwrap().id;
        host.pause(deaf).await.unwrap();
        let refused = host.visit(deaf, port(7), CLIENT).await.unwrap_err();
        assert_eq!(refused, ConnectError::IsPaused(deaf));
        host.kill(deaf).await.unwrap();

        let wish = CreateRequest { timeout: Duration::from_secs(20), ..pausing(true) };
        let id = host.create(wish).await.unwrap().id;
        for on_disk in [false, true] {
            host.pause(id).await.unwrap();
            if on_disk {
                let pids = places.pids();
                pids.into_iter().for_each(kill_process);
                eventually("it is on disk alone", async || places.cgroups().is_empty()).await;
            }
            let by_host = host.connect(id, port(7)).await.unwrap_err();
            assert_eq!(by_host, ConnectError::IsPaused(id), "the host's own use wakes nothing");
            // All at once, from both shards' point of view one resume.
            let visits: Vec<_> = (0..8)
                .map(|_| {
                    let host = host.clone();
                    rt::spawn(async move { host.visit(id, port(7), CLIENT).await.map(drop) })
                })
                .collect();
            for visit in visits {
                assert_eq!(visit.join().await, Some(Ok(())));
            }
            assert!(!is_paused(&host, id).await);
            let left = seconds_left(&host, id).await;
            assert!((295..=300).contains(&left), "the least of a woken one: {left}");
        }
        let resumes = host.logs(id).await.unwrap();
        let resumes = resumes.iter().filter(|line| line.text == "resumed").count();
        assert_eq!(resumes, 2, "each time one");
    });
}

#[test]
fn a_sandbox_that_cannot_be_woken_says_so_and_stays_paused() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.set_mood("good");
    let config = HostConfig { boot_deadline: Duration::from_millis(1500), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = host.create(pausing(true)).await.unwrap().id;
        host.pause(id).await.unwrap();
        places.pids().into_iter().for_each(kill_process);
        eventually("it is on disk alone", async || places.cgroups().is_empty()).await;
        places.set_mood("bad-restore");
        let failed = host.visit(id, port(7), CLIENT).await.unwrap_err();
        assert!(matches!(&failed, ConnectError::NotWoken { sandbox, .. } if *sandbox == id));
        assert!(is_paused(&host, id).await);
        places.set_mood("good");
        host.visit(id, port(7), CLIENT).await.unwrap();
        host.kill(id).await.unwrap();
    });
    ended.unwrap();
}

#[test]
fn one_that_lives_by_its_requests_ends_when_they_stay_away() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let life = Duration::from_millis(900);
        let wish = CreateRequest { timeout: life, idle: true, ..request("agent") };
        let id = host.create(wish).await.unwrap().id;
        let began = Instant::now();
        let mut used = began;
        while began.elapsed() < 3 * life {
            host.visit(id, port(7), CLIENT).await.unwrap();
            used = Instant::now();
            rt::time::sleep(Duration::from_millis(100)).await;
        }
        // The host's own use is none.
        while used.elapsed() < life.mul_f64(0.8) {
            host.connect(id, port(7)).await.unwrap();
            rt::time::sleep(Duration::from_millis(100)).await;
        }
        eventually("it ends", async || host.get(id).await.is_err()).await;
        let late = used.elapsed();
        assert!(late >= life.mul_f64(0.95) && late < life + Duration::from_secs(1), "{late:?}");
    });
}

#[test]
fn ends_are_extended_set_and_taken_away() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        host.extend(id, Duration::from_secs(60)).await.unwrap();
        assert!(seconds_left(&host, id).await > 500, "an extension never shortens");
        host.extend(id, Duration::from_secs(900)).await.unwrap();
        assert!((895..=900).contains(&seconds_left(&host, id).await));
        host.set_timeout(id, NEVER).await.unwrap();
        assert_eq!(host.get(id).await.unwrap().end_at, None);
        host.extend(id, Duration::from_secs(60)).await.unwrap();
        assert_eq!(host.get(id).await.unwrap().end_at, None, "and never ends what has no end");
        host.pause(id).await.unwrap();
        let (woken, _) = host.ensure_running(id, Duration::from_secs(60)).await.unwrap();
        assert_eq!(woken.end_at, None, "nor does a resume");
        let began = Instant::now();
        host.set_timeout(id, Duration::from_millis(1500)).await.unwrap();
        eventually("it ends", async || host.get(id).await.is_err()).await;
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(1500) && took < Duration::from_millis(2500));
        let gone = host.extend(id, Duration::from_secs(9)).await;
        assert!(gone.is_err());
        let never = CreateRequest { timeout: NEVER, ..request("agent") };
        assert_eq!(host.create(never).await.unwrap().end_at, None);
    });
}

#[test]
fn what_happened_is_kept_and_so_is_what_was_used() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let snapshot = host.snapshot(id, None).await.unwrap().id;
        host.rollback(id, snapshot.clone()).await.unwrap();
        host.pause(id).await.unwrap();
        host.ensure_running(id, Duration::from_secs(60)).await.unwrap();
        let lines = host.logs(id).await.unwrap();
        assert!(lines.is_sorted_by_key(|line| line.at));
        let events = lines.into_iter().filter(|line| line.source == LogSource::Host);
        let events: Vec<String> = events.map(|line| line.text).collect();
        let [created, rest @ ..] = &events[..] else { panic!("no events") };
        assert!(created.starts_with("created from template "), "{created}");
        let expected = [
            format!("snapshot {snapshot} made"),
            format!("rolled back to snapshot {snapshot}"),
            "paused".to_owned(),
            "resumed".to_owned(),
        ];
        assert_eq!(rest, expected);

        assert!(host.usages(id, None).await.unwrap().is_empty());
        for at_unix_s in 0..200 {
            let usage = Usage { at_unix_s, cpu_count: 2, ..Usage::default() };
            let kept = host.usages(id, Some(usage)).await.unwrap();
            assert_eq!(kept.last(), Some(&usage));
            assert!(kept.len() <= 120, "it is bounded");
        }
        assert_eq!(host.usages(id, None).await.unwrap()[0].at_unix_s, 80);
        host.kill(id).await.unwrap();
        assert!(host.delete_snapshot(&snapshot).await.unwrap());
        assert!(host.logs(id).await.is_err() && host.usages(id, None).await.is_err());
    });
}
