//! Inboxes that stay awake for what comes soon: nothing is lost where nobody rings, and nothing else waits.
//!
//! Run by `cargo test`. Needs io_uring.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use common::on_one;
use futures_lite::AsyncReadExt as _;
use mica_numa::mailbox::{Post, mailbox};
use mica_numa::rt::{self, net, time};

const PATIENCE: Duration = Duration::from_secs(30);

/// Sends so many numbers from a thread of its own, some at once, some far apart, most about as long apart as
/// a watch lasts: whether it is awake, goes to sleep or sleeps when they come is left to chance.
fn send_unevenly(post: Post<u32>, count: u32) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for number in 0..count {
            let gap = Duration::from_micros(u64::from(number.wrapping_mul(2_654_435_761) >> 23));
            let until = Instant::now() + gap;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            post.send(number).unwrap();
        }
    })
}

#[test]
fn an_inbox_that_watches_misses_nothing_when_it_falls_asleep() {
    const COUNT: u32 = 5_000;
    let got = on_one(|| async {
        let (post, inbox) = mailbox(COUNT as usize).unwrap();
        let mut inbox = inbox.attach().watching(Duration::from_micros(200));
        let sender = send_unevenly(post, COUNT);
        let mut got = Vec::new();
        while got.len() < COUNT as usize {
            got.push(time::timeout(PATIENCE, inbox.next()).await.unwrap().unwrap());
        }
        sender.join().unwrap();
        got
    });
    assert_eq!(got, (0..COUNT).collect::<Vec<_>>());
}

#[test]
fn a_lookout_and_the_inbox_together_get_every_message_once() {
    const COUNT: u32 = 5_000;
    let mut got = on_one(|| async {
        let (post, inbox) = mailbox(COUNT as usize).unwrap();
        let mut inbox = inbox.attach();
        let lookout = inbox.lookout();
        let sender = send_unevenly(post, COUNT);
        let got = std::rc::Rc::new(RefCell::new(Vec::new()));
        let owner = std::rc::Rc::clone(&got);
        let task = rt::spawn(async move {
            while let Some(number) = inbox.next().await {
                owner.borrow_mut().push(number);
            }
        });
        let begun = Instant::now();
        while got.borrow().len() < COUNT as usize {
            assert!(begun.elapsed() < PATIENCE, "{} came", got.borrow().len());
            let take = |number| got.borrow_mut().push(number);
            lookout.watch(Duration::from_micros(50), take, || false).await;
            time::sleep(Duration::from_micros(100)).await;
        }
        sender.join().unwrap();
        task.end().await;
        got.take()
    });
    got.sort_unstable();
    assert_eq!(got, (0..COUNT).collect::<Vec<_>>());
}

#[test]
fn sockets_and_timers_go_on_while_somebody_watches() {
    let (ticked, read) = on_one(|| async {
        let (_post, inbox) = mailbox::<u32>(1).unwrap();
        let lookout = inbox.attach().lookout();
        let (mut far, near) = UnixStream::pair().unwrap();
        let (ticked, read) = (std::rc::Rc::new(Cell::new(0)), std::rc::Rc::new(Cell::new(0)));
        let (ticks, reads) = (std::rc::Rc::clone(&ticked), std::rc::Rc::clone(&read));
        let reader = rt::spawn(async move {
            near.set_nonblocking(true).unwrap();
            let mut near = net::UnixStream::from_fd(near.into());
            let mut byte = [0];
            while near.read(&mut byte).await.unwrap() > 0 {
                reads.set(reads.get() + 1);
            }
        });
        let ticker = rt::spawn(async move {
            loop {
                time::sleep(Duration::from_millis(1)).await;
                ticks.set(ticks.get() + 1);
                far.write_all(&[1]).unwrap();
            }
        });
        // Less than the 100 ms after which glommio would look at its rings by itself, and ended early: it is
        // the limit, not the measure.
        let enough = || read.get() >= 5;
        lookout.watch(Duration::from_millis(90), |_| {}, enough).await;
        let seen = (ticked.get(), read.get());
        ticker.end().await;
        reader.end().await;
        seen
    });
    assert!(ticked >= 5 && read >= 5, "{ticked} ticks and {read} bytes while it watched");
}

#[test]
fn a_watch_that_is_dropped_has_taken_what_came() {
    let (taken, next) = on_one(|| async {
        let (post, inbox) = mailbox::<u32>(4).unwrap();
        let mut inbox = inbox.attach();
        let lookout = inbox.lookout();
        let taken = RefCell::new(Vec::new());
        {
            let take = |number| taken.borrow_mut().push(number);
            let mut watch = pin!(lookout.watch(PATIENCE, take, || false));
            let mut context = Context::from_waker(Waker::noop());
            assert!(matches!(watch.as_mut().poll(&mut context), Poll::Pending));
            // Nobody is rung for: the watch is awake.
            thread::spawn(move || post.send(1).map(|()| post))
                .join()
                .unwrap()
                .unwrap()
                .send(2)
                .unwrap();
        }
        (taken.take(), time::timeout(Duration::from_millis(20), inbox.next()).await)
    });
    assert_eq!(taken, [1, 2]);
    // The sender is gone, or nothing more came.
    assert!(matches!(next, Ok(None) | Err(time::Elapsed)), "{next:?}");
}
