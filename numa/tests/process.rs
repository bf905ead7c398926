//! Another process's memory: which pages it wrote, its bytes, its descriptors.
//!
//! Run by `cargo test`. Memory of this process plays the guest where it makes no difference; a child,
//! which is this program again, where it does. Needs Linux 6.7 for write tracking, and root.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::on_one;
use mica_numa::arena::Mapping;
use mica_numa::io::{IO_BUF_BYTES, Ring, RingConfig};
use mica_numa::process::{Pagemap, Process, ProcessError, RemoteMemory, RemoteRange, Wanted};
use mica_numa::userfault::Userfault;
use mica_units::FrameRun;
use proptest::prelude::*;
use rustix::process::Pid;

const PAGE: u64 = 4096;
const FRAMES: u32 = 96;

fn memfd(frames: u32, fill: impl Fn(u32) -> u8) -> OwnedFd {
    let file = rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    for frame in 0..frames {
        file.write_all_at(&[fill(frame); 4096], u64::from(frame) * PAGE).unwrap();
    }
    file.into()
}

fn this_process() -> Process {
    Process::open(rustix::process::getpid()).unwrap()
}

fn memory_of(mapping: &Mapping) -> RemoteMemory {
    RemoteMemory::new(mapping.address(), u32::try_from(mapping.bytes() / PAGE).unwrap()).unwrap()
}

fn frames_of(runs: &[FrameRun]) -> Vec<u32> {
    runs.iter().flat_map(|run| run.first()..run.end()).collect()
}

fn find(pagemap: &Pagemap, memory: RemoteMemory, wanted: Wanted) -> Vec<u32> {
    let scan = pagemap.scan(memory, memory.all().unwrap(), wanted, u32::MAX).unwrap();
    assert_eq!(scan.next, None);
    let wrong = scan.runs.windows(2).find(|two| two[0].end() >= two[1].first());
    assert_eq!(wrong, None, "runs are apart and in order");
    frames_of(&scan.runs)
}

/// What a guest may do to a frame.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u32),
    Read(u32),
    Discard(u32),
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..FRAMES).prop_map(Step::Write),
        2 => (0..FRAMES).prop_map(Step::Read),
        2 => (0..FRAMES).prop_map(Step::Discard),
        1 => Just(Step::Look),
    ]
}

/// A frame, as the test knows it.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    own: bool,
    written: bool,
    /// It is its own no longer, but was protected when it was discarded, and so is what comes there until
    /// the next write.
    marked: bool,
}

fn play(mapping: &Mapping, steps: &[Step], tracked: bool) -> Result<(), TestCaseError> {
    let memory = memory_of(mapping);
    let pagemap = this_process().pagemap().unwrap();
    prop_assert!(pagemap.can_track_writes(), "this kernel is older than 6.7");
    let old = this_process().pagemap().unwrap().without_scan();
    let userfault = Userfault::new(Userfault::create().unwrap(), memory).unwrap();
    if tracked {
        userfault.track(memory.all().unwrap()).unwrap();
    }
    let mut known = [Known::default(); FRAMES as usize];
    for step in steps.iter().copied().chain([Step::Look]) {
        match step {
            Step::Write(frame) => {
                mapping.write(u64::from(frame) * PAGE + 9, &[0xee]).unwrap();
                known[frame as usize] = Known { own: true, written: true, marked: false };
            }
            Step::Read(frame) => {
                mapping.read(u64::from(frame) * PAGE + 9, &mut [0]).unwrap();
            }
            Step::Discard(frame) => {
                mapping.discard(u64::from(frame) * PAGE, PAGE).unwrap();
                let it = &mut known[frame as usize];
                let marked = it.marked || it.own && !it.written;
                *it = Known { marked, ..Known::default() };
            }
            Step::Look => {
                look(&pagemap, &old, memory, &mut known, tracked)?;
            }
        }
    }
    Ok(())
}

fn look(
    pagemap: &Pagemap,
    old: &Pagemap,
    memory: RemoteMemory,
    known: &mut [Known],
    tracked: bool,
) -> Result<(), TestCaseError> {
    let those = |what: fn(&Known) -> bool| -> Vec<u32> {
        (0..).zip(&*known).filter(|(_, it)| what(it)).map(|(frame, _)| frame).collect()
    };
    let anonymous = find(pagemap, memory, Wanted::Anonymous);
    prop_assert_eq!(&anonymous, &find(old, memory, Wanted::Anonymous));
    let (least, most) = (those(|it| it.own), those(|it| it.own || it.marked));
    prop_assert!(least.iter().all(|frame| anonymous.contains(frame)), "{:?}", least);
    prop_assert!(anonymous.iter().all(|frame| most.contains(frame)), "{:?}", most);
    let resident = find(pagemap, memory, Wanted::Resident);
    prop_assert_eq!(&resident, &find(old, memory, Wanted::Resident));
    prop_assert!(least.iter().all(|frame| resident.contains(frame)));
    if tracked {
        let written = those(|it| it.own && it.written);
        let looked = find(pagemap, memory, Wanted::AnonymousWritten { rearm: false });
        prop_assert_eq!(&looked, &written);
        let rearmed = find(pagemap, memory, Wanted::AnonymousWritten { rearm: true });
        prop_assert_eq!(&rearmed, &written);
        prop_assert_eq!(find(pagemap, memory, Wanted::AnonymousWritten { rearm: true }), []);
        known.iter_mut().for_each(|it| it.written = false);
    } else {
        let all = memory.all().unwrap();
        let refused = pagemap.scan(memory, all, Wanted::AnonymousWritten { rearm: true }, u32::MAX);
        prop_assert!(matches!(refused, Err(ProcessError::NotTracked)), "{:?}", refused);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_found_of_a_layer_is_what_was_written(
        steps in proptest::collection::vec(step(), 1..80),
        tracked: bool,
    ) {
        let layer = memfd(FRAMES, |_| 1);
        let mapping = Mapping::private(&layer, u64::from(FRAMES) * PAGE).unwrap();
        play(&mapping, &steps, tracked)?;
    }

    #[test]
    fn what_is_found_of_empty_memory_is_what_was_written(
        steps in proptest::collection::vec(step(), 1..80),
        tracked: bool,
    ) {
        let mapping = Mapping::anonymous(u64::from(FRAMES) * PAGE).unwrap();
        play(&mapping, &steps, tracked)?;
    }
}

/// More runs than one ioctl returns, in parts, with and without write protection.
#[test]
fn long_scans_go_on_where_they_stopped() {
    let frames = 3 * 4096;
    let layer = memfd(1, |_| 1);
    rustix::fs::ftruncate(&layer, u64::from(frames) * PAGE).unwrap();
    let mapping = Mapping::private(&layer, u64::from(frames) * PAGE).unwrap();
    let memory = memory_of(&mapping);
    let userfault = Userfault::new(Userfault::create().unwrap(), memory).unwrap();
    userfault.track(memory.all().unwrap()).unwrap();
    // Every other one: as many runs as there can be.
    let odd: Vec<u32> = (0..frames).filter(|frame| frame % 2 == 1).collect();
    for frame in &odd {
        mapping.write(u64::from(*frame) * PAGE, b"w").unwrap();
    }
    let pagemap = this_process().pagemap().unwrap();
    let old = this_process().pagemap().unwrap().without_scan();
    assert_eq!(find(&pagemap, memory, Wanted::Anonymous), odd);
    assert_eq!(find(&old, memory, Wanted::Anonymous), odd);
    for (pagemap, wanted) in [
        (&old, Wanted::Anonymous),
        (&pagemap, Wanted::Anonymous),
        (&pagemap, Wanted::AnonymousWritten { rearm: true }),
    ] {
        let (mut found, mut first) = (Vec::new(), 0);
        while let Some(within) = FrameRun::new(first, frames - first) {
            let scan = pagemap.scan(memory, within, wanted, 1000).unwrap();
            assert!(scan.frames() <= 1000);
            found.extend(frames_of(&scan.runs));
            let Some(next) = scan.next else { break };
            assert!(next > first);
            first = next;
        }
        assert_eq!(found, odd);
    }
    assert_eq!(find(&pagemap, memory, Wanted::AnonymousWritten { rearm: false }), []);
    mapping.write(u64::from(frames - 1) * PAGE, b"w").unwrap();
    mapping.write(6 * PAGE, b"w").unwrap();
    let address = mapping.address();
    let found = on_one(move || async move {
        let memory = RemoteMemory::new(address, frames).unwrap();
        let pagemap = this_process().pagemap().unwrap();
        let written = Wanted::AnonymousWritten { rearm: true };
        frames_of(&pagemap.scan_all(memory, written).await.unwrap())
    });
    assert_eq!(found, [6, frames - 1]);
    let outside = FrameRun::new(frames, 1).unwrap();
    let refused = pagemap.scan(memory, outside, Wanted::Anonymous, 1);
    assert!(matches!(refused, Err(ProcessError::Range)));
}

/// What the next test starts. Says where its memory is, and does what it is told until its input ends.
#[test]
#[ignore = "it is the child of the next tests"]
fn child() {
    let layer = memfd(FRAMES, |frame| u8::try_from(frame).unwrap());
    let mapping = Mapping::private(&layer, u64::from(FRAMES) * PAGE).unwrap();
    println!("child {} {}", mapping.address(), layer.as_raw_fd());
    let mut mapping = Some(mapping);
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match (words.as_slice(), &mapping) {
            (["write", frame, byte], Some(mapping)) => {
                let frame: u64 = frame.parse().unwrap();
                mapping.write(frame * PAGE, &[byte.parse().unwrap(); 4096]).unwrap();
            }
            (["unmap"], _) => mapping = None,
            other => panic!("{other:?}"),
        }
        println!("child done");
    }
}

struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    process: Process,
    memory: RemoteMemory,
    layer: i32,
}

impl Guest {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "child"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let said = answer(&mut output);
        let mut numbers = said.split(' ').map(|word| word.parse::<u64>().unwrap());
        let memory = RemoteMemory::new(numbers.next().unwrap(), FRAMES).unwrap();
        let layer = i32::try_from(numbers.next().unwrap()).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let process = Process::open(pid).unwrap();
        Self { child, input, output, process, memory, layer }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.input.as_mut().unwrap(), "{what}").unwrap();
        assert_eq!(answer(&mut self.output), "done");
    }

    fn end(&mut self) {
        self.input = None;
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }
}

/// The next line that is the child's, and not the test harness's.
fn answer(output: &mut impl BufRead) -> String {
    loop {
        let mut line = String::new();
        assert!(output.read_line(&mut line).unwrap() > 0, "the child is gone");
        // The harness writes "test child ... " in front of the first.
        if let Some((_, said)) = line.rsplit_once("child ")
            && !said.starts_with("...")
        {
            return said.trim().to_owned();
        }
    }
}

#[test]
fn a_childs_pages_are_found_and_copied() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 2 }).unwrap();
        let mut guest = Guest::start();
        guest.tell("write 3 200");
        guest.tell("write 4 201");
        guest.tell("write 90 202");
        let pagemap = guest.process.pagemap().unwrap();
        let memory = guest.memory;
        let dirty = pagemap.scan_all(memory, Wanted::Anonymous).await.unwrap();
        assert_eq!(frames_of(&dirty), [3, 4, 90]);
        let mut buffer = ring.buffer().await;
        guest.process.read_frames(memory, &dirty, &mut buffer).unwrap();
        let pages: Vec<_> = buffer.bytes().chunks(4096).map(|page| (page[0], page[4095])).collect();
        assert_eq!(pages, [(200, 200), (201, 201), (202, 202)]);
        // Behind what is there; clean pages too, and more ranges than one call takes.
        let rest: Vec<_> = (0..FRAMES).filter_map(|frame| FrameRun::new(frame, 1)).collect();
        guest.process.read_frames(memory, &rest, &mut buffer).unwrap();
        assert_eq!(buffer.len() as u64, (3 + u64::from(FRAMES)) * PAGE);
        assert_eq!((buffer.bytes()[3 * 4096], buffer.bytes()[(3 + 5) * 4096]), (0, 5));
        let words: Vec<_> = (0..3000u64)
            .map(|word| RemoteRange {
                address: memory.range(rest[20]).unwrap().address + word,
                bytes: u64::from(word % 3 != 0),
            })
            .collect();
        buffer.clear();
        guest.process.read(&words, &mut buffer).unwrap();
        assert_eq!((buffer.len(), buffer.bytes()[0], buffer.bytes()[1999]), (2000, 20, 20));

        guest.process.write(memory.range(rest[7]).unwrap().address + 5, &[99; 5000]).unwrap();
        let dirty = pagemap.scan_all(memory, Wanted::Anonymous).await.unwrap();
        assert_eq!(frames_of(&dirty), [3, 4, 7, 8, 90]);
        guest.end();
        drop(buffer);
        ring.close().await;
    });
}

#[test]
fn what_is_not_there_is_an_error_and_shows_nothing() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 1 }).unwrap();
        let mut guest = Guest::start();
        let (process, memory) = (&guest.process, guest.memory);
        let all = [memory.all().unwrap()];
        let mut buffer = ring.buffer().await;
        let last = FrameRun::new(FRAMES - 1, 2).unwrap();
        assert!(matches!(
            process.read_frames(memory, &[last], &mut buffer),
            Err(ProcessError::Range)
        ));
        let larger = RemoteMemory::new(memory.range(all[0]).unwrap().address, 1 << 20).unwrap();
        let much = FrameRun::new(0, 257).unwrap();
        assert!(matches!(
            process.read_frames(larger, &[much], &mut buffer),
            Err(ProcessError::Range)
        ));
        assert!(buffer.is_empty());

        // A page at address 0 is nobody's. What was copied before it is there.
        let first = memory.range(FrameRun::new(1, 1).unwrap()).unwrap();
        let nothing = RemoteRange { address: 0, bytes: 4096 };
        let refused = process.read(&[first, nothing, first], &mut buffer);
        assert!(matches!(refused, Err(ProcessError::Unreadable { address: 0 })), "{refused:?}");
        assert_eq!((buffer.len(), buffer.bytes()[0]), (4096, 1));
        assert!(matches!(this_process().write(0, b"x"), Err(ProcessError::Denied)));
        assert!(matches!(process.write(0, b"x"), Err(ProcessError::Unreadable { address: 0 })));

        assert!(matches!(process.getfd(100_000), Err(ProcessError::Kernel { .. })));
        let layer = process.getfd(guest.layer).unwrap();
        let mut byte = [0];
        File::from(layer).read_exact_at(&mut byte, 17 * PAGE).unwrap();
        assert_eq!(byte, [17]);

        guest.tell("unmap");
        buffer.clear();
        let refused = guest.process.read_frames(memory, &all, &mut buffer);
        assert!(matches!(refused, Err(ProcessError::Unreadable { .. })), "{refused:?}");
        let pagemap = guest.process.pagemap().unwrap();
        assert_eq!(pagemap.scan_all(memory, Wanted::Resident).await.unwrap(), []);
        guest.end();
        gone(&guest, &pagemap, &ring).await;
        assert_eq!(buffer.len(), 0);
        drop(buffer);
        ring.close().await;
    });
}

async fn gone(guest: &Guest, pagemap: &Pagemap, ring: &Ring) {
    let (process, memory) = (&guest.process, guest.memory);
    let all = [memory.all().unwrap()];
    // The buffer of the caller is the only one; this one is the next.
    assert!(ring.try_buffer().is_none());
    assert!(matches!(process.write(1 << 20, b"x"), Err(ProcessError::Gone)));
    assert!(matches!(process.getfd(0), Err(ProcessError::Gone)));
    assert!(matches!(process.pagemap(), Err(ProcessError::Gone)));
    let scan = pagemap.scan(memory, all[0], Wanted::Anonymous, 1);
    assert!(matches!(scan, Err(ProcessError::Gone)), "{scan:?}");
    assert!(process.as_fd().as_raw_fd() > 0);
    assert!(matches!(Process::open(process.pid()), Err(ProcessError::Gone)));
}

/// The figures that a snapshot rests on, printed: `cargo test --release -- --nocapture figures`.
#[test]
fn figures_of_scan_and_copy() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 8 }).unwrap();
        let frames = 1u32 << 19;
        let layer = memfd(1, |_| 1);
        rustix::fs::ftruncate(&layer, u64::from(frames) * PAGE).unwrap();
        let mapping = Mapping::private(&layer, u64::from(frames) * PAGE).unwrap();
        let memory = memory_of(&mapping);
        let userfault = Userfault::new(Userfault::create().unwrap(), memory).unwrap();
        userfault.track(memory.all().unwrap()).unwrap();
        // 7 MiB in pieces of 28 KiB, all over 2 GiB.
        let mut written = 0u64;
        for piece in 0..256u64 {
            for page in 0..7 {
                mapping.write((piece * 2048 + page) * PAGE, &[1; 64]).unwrap();
                written += 1;
            }
        }
        let pagemap = this_process().pagemap().unwrap();
        let now = std::time::Instant::now;
        let start = now();
        let wanted = Wanted::AnonymousWritten { rearm: true };
        let runs = pagemap.scan_all(memory, wanted).await.unwrap();
        let scanned = start.elapsed();
        assert_eq!(frames_of(&runs).len() as u64, written);
        let start = now();
        let again = pagemap.scan_all(memory, wanted).await.unwrap();
        let rescanned = start.elapsed();
        assert_eq!(again, []);
        let start = now();
        let batch = u32::try_from(IO_BUF_BYTES / 4096).unwrap();
        let mut copied = 0;
        for batch in mica_numa::process::batches(&runs, batch) {
            let mut buffer = ring.buffer().await;
            this_process().read_frames(memory, &batch, &mut buffer).unwrap();
            copied += buffer.len() as u64;
        }
        let copying = start.elapsed();
        assert_eq!(copied, written * PAGE);
        println!(
            "scan and re-arm {scanned:?}, scan of nothing {rescanned:?}, copy of 7 MiB {copying:?}"
        );
        ring.close().await;
    });
}
