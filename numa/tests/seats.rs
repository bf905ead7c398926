//! Executors on this machine's cores: pinning, mailboxes, blocking threads, timers, sockets, stop.
//!
//! Run by `cargo test`. Needs io_uring; one core is enough, two seats may share it.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use common::on_one;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use mica_numa::mailbox::{Returned, mailbox};
use mica_numa::plan::VcpuCores;
use mica_numa::rt::{self, net, time};
use mica_numa::seat::{SeatError, run_all};
use mica_numa::{Plan, PlanConfig, ShardSeat, Shards, StopSignal, plan, topology};
use mica_units::ShardId;

/// Two seats, on two cores where there are two.
fn two_seats() -> Plan {
    let topology = topology::read().unwrap();
    let wish = PlanConfig { shards: Shards::Total(2), ..PlanConfig::default() };
    plan(&topology, &wish).unwrap_or_else(|_| {
        let core = topology.nodes[0].cores[0].cpu();
        let seat = |index| ShardSeat::new(ShardId::new(index), core, 0);
        let vcpus = VcpuCores::new(0, vec![core], true);
        Plan { seats: vec![seat(0), seat(1)], vcpus: vec![vcpus], ..Plan::default() }
    })
}

fn one_seat() -> Plan {
    let mut plan = two_seats();
    plan.seats.truncate(1);
    plan
}

#[test]
fn seats_are_pinned_and_blocking_threads_are_not_with_them() {
    let plan = two_seats();
    let stop = StopSignal::new().unwrap();
    let seen = run_all(&plan, vec![(), ()], &stop, |seat, ()| async move {
        let here = rustix::thread::sched_getaffinity(None).unwrap();
        let there = rt::blocking(|| rustix::thread::sched_getaffinity(None).unwrap()).await;
        (seat, here, there.unwrap())
    })
    .unwrap();
    for (seat, here, there) in seen {
        assert_eq!(here.count(), 1);
        assert!(here.is_set(seat.core as usize));
        let vcpus = plan.vcpus.iter().find(|v| v.node == seat.node).unwrap();
        assert_eq!(there.count() as usize, vcpus.cpus.len());
        assert!(vcpus.cpus.iter().all(|cpu| there.is_set(*cpu as usize)));
    }
}

#[test]
fn messages_cross_between_executors() {
    const ROUNDS: u32 = 1_000;
    let (to_first, first) = mailbox::<u32>(8).unwrap();
    let (to_second, second) = mailbox::<u32>(8).unwrap();
    let inputs = vec![(first, to_second), (second, to_first)];
    let stop = StopSignal::new().unwrap();
    let sums = run_all(&two_seats(), inputs, &stop, |seat, (mailbox, other)| async move {
        let mut inbox = mailbox.attach();
        if seat.shard.index() == 0 {
            other.send(0).unwrap();
        }
        let mut sum = 0u64;
        while let Some(number) = inbox.next().await {
            sum += u64::from(number);
            if number < ROUNDS {
                other.send(number + 1).unwrap();
            }
            if number + 1 >= ROUNDS {
                break;
            }
        }
        sum
    })
    .unwrap();
    assert_eq!(sums.iter().sum::<u64>(), (0..=u64::from(ROUNDS)).sum());
}

#[test]
fn a_full_or_closed_mailbox_gives_the_message_back() {
    let (post, mailbox) = mailbox::<u8>(1).unwrap();
    post.send(1).unwrap();
    assert_eq!(post.send(2), Err(Returned::Full(2)));
    drop(mailbox);
    assert_eq!(post.send(3), Err(Returned::Closed(3)));
}

#[test]
fn blocking_work_does_not_stop_timers_and_survives_a_panic() {
    let (ticks, slow, panicked) = on_one(|| async {
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let work = rt::spawn(async move { rt::blocking(move || wait.recv().is_ok()).await });
        let mut ticks = 0;
        for _ in 0..10 {
            time::sleep(Duration::from_millis(1)).await;
            ticks += 1;
        }
        release.send(()).unwrap();
        let slow = work.join().await.unwrap();
        let panicked = rt::blocking(|| -> u8 { panic!("a job may panic") }).await;
        (ticks, slow, panicked)
    });
    assert_eq!(ticks, 10);
    assert_eq!(slow, Ok(true));
    assert_eq!(panicked, Err(rt::BlockingError::Panicked));
}

#[test]
fn no_result_is_lost_where_more_is_asked_than_may_wait() {
    let done = on_one(|| async {
        // All in one turn of the executor, so that results pile up before it takes any.
        let jobs: Vec<_> = (0..6_000).map(|_| rt::spawn(rt::blocking(|| ()))).collect();
        let mut done = 0;
        for job in jobs {
            match time::timeout(Duration::from_secs(10), job.join()).await {
                Ok(Some(Ok(()))) => done += 1,
                Ok(Some(Err(rt::BlockingError::Full))) => {}
                other => panic!("{other:?}"),
            }
        }
        done
    });
    assert!(done >= 4_096, "only {done} were done");
}

#[test]
fn a_timeout_drops_what_takes_too_long() {
    let (late, early) = on_one(|| async {
        let late = time::timeout(Duration::from_millis(5), std::future::pending::<()>()).await;
        let early = time::timeout(Duration::from_secs(60), async { 7 }).await;
        (late, early)
    });
    assert_eq!((late, early), (Err(time::Elapsed), Ok(7)));
}

#[test]
fn tcp_carries_bytes_and_two_listeners_share_a_port() {
    let text = on_one(|| async {
        let listener = net::TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let second = net::TcpListener::bind(address).unwrap();
        drop(second);
        let server = rt::spawn(async move {
            let mut stream = listener.accept().await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            text
        });
        let mut client = net::TcpStream::connect(address).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.close().await.unwrap();
        server.join().await.unwrap()
    });
    assert_eq!(text, "hello");
}

#[test]
fn readiness_is_seen_on_descriptors_that_are_not_sockets() {
    let order = on_one(|| async {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut order = Vec::new();
        let early = time::timeout(Duration::from_millis(5), rt::readable(&reader)).await;
        order.push(early.is_err());
        writer.write_all(b"x").unwrap();
        rt::readable(&reader).await.unwrap();
        let mut byte = [0];
        order.push((&reader).read(&mut byte).unwrap() == 1);
        rt::writable(&writer).await.unwrap();
        let filled: OwnedFd = writer.into();
        rustix::io::ioctl_fionbio(&filled, true).unwrap();
        while rustix::io::write(&filled, &[0; 4096]).is_ok() {}
        let full = time::timeout(Duration::from_millis(5), rt::writable(&filled)).await;
        order.push(full.is_err());
        order
    });
    assert_eq!(order, [true, true, true]);
}

#[test]
fn a_stream_that_is_always_ready_does_not_hold_up_the_others() {
    let ticks = on_one(|| async {
        let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stop = std::sync::Arc::clone(&done);
        let flood = std::thread::spawn(move || {
            let piece = vec![0; 1 << 16];
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && far.write_all(&piece).is_ok()
            {
            }
        });
        let mut near = net::UnixStream::from_fd(near.into());
        // One byte at a time: there is always a next one.
        let reader = rt::spawn(async move {
            let mut byte = [0];
            while near.read(&mut byte).await.is_ok_and(|length| length == 1) {}
        });
        let begun = Instant::now();
        let mut ticks = 0;
        while ticks < 5 && begun.elapsed() < Duration::from_secs(20) {
            time::sleep(Duration::from_millis(1)).await;
            ticks += 1;
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.end().await;
        flood.join().unwrap();
        ticks
    });
    assert_eq!(ticks, 5);
}

#[test]
fn a_packet_socket_is_read_packet_by_packet() {
    let sizes = on_one(|| async {
        use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let mut near = net::UnixStream::from_fd(near);
        let mut sizes = Vec::new();
        let mut buffer = [0; 64];
        send(&far, b"one", SendFlags::empty()).unwrap();
        send(&far, b"second", SendFlags::empty()).unwrap();
        sizes.push(near.read(&mut buffer).await.unwrap());
        sizes.push(near.read(&mut buffer).await.unwrap());
        drop(far);
        sizes.push(near.read(&mut buffer).await.unwrap());
        sizes
    });
    assert_eq!(sizes, [3, 6, 0]);
}

#[test]
fn a_stop_signal_reaches_every_seat_and_a_panic_gives_it() {
    let stop = StopSignal::new().unwrap();
    let signal = stop.clone();
    let begun = Instant::now();
    let ended = run_all(&two_seats(), vec![false, true], &stop, move |_, last| {
        let signal = signal.clone();
        async move {
            if last {
                time::sleep(Duration::from_millis(10)).await;
                signal.stop();
            }
            signal.stopped().await;
            signal.is_stopped()
        }
    });
    assert_eq!(ended.unwrap(), [true, true]);
    assert!(begun.elapsed() < Duration::from_secs(20));

    let stop = StopSignal::new().unwrap();
    let signal = stop.clone();
    let ended = run_all(&two_seats(), vec![false, true], &stop, move |_, panics| {
        let signal = signal.clone();
        async move {
            assert!(!panics, "this seat panics on purpose");
            signal.stopped().await;
        }
    });
    assert!(matches!(ended, Err(SeatError::Panicked(1))), "{ended:?}");
}

#[test]
fn a_core_that_is_not_there_is_an_error() {
    let mut plan = one_seat();
    plan.seats[0].core = 1_000_000;
    let stop = StopSignal::new().unwrap();
    let ended = run_all(&plan, vec![()], &stop, |_, ()| async {});
    assert!(matches!(ended, Err(SeatError::Pin { shard: 0, core: 1_000_000 })), "{ended:?}");
}
