"""Snapshot, chain, rollback, clone, fork, pause, resume: real Linux guests, through the unmodified SDK
where it has the call and raw HTTP where it has none. What is checked is what was in memory and on disk."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PATIENCE_S, api, connect, lab, make, run, wait_until
from e2b import Sandbox
from inside import (
    STORE,
    at_rest,
    group_of,
    process_of,
    sandboxes,
    settled,
    state_of,
)

SLOW = {"request_timeout": PATIENCE_S}

# Memory of a process: a number that grows, kept by a shell that tells it over a FIFO. It counts in
# memory alone; what it says last is never on the disk.
KEEPER = """
rm -f /tmp/ask /tmp/told; mkfifo /tmp/ask /tmp/told
setsid sh -c '
  n=0; word=none
  exec 3<>/tmp/ask
  while read -r verb value <&3; do
    n=$((n + 1))
    [ "$verb" = set ] && word=$value
    echo "$word $n" > /tmp/told
  done' > /dev/null 2>&1 < /dev/null &
"""


def keep(sandbox: Sandbox) -> None:
    run(sandbox, KEEPER)


def tell(sandbox: Sandbox, word: str) -> None:
    assert run(sandbox, f"echo set {word} > /tmp/ask; cat /tmp/told").split()[0] == word


def told(sandbox: Sandbox) -> tuple[str, int]:
    """The word in the keeper's memory, and how often it was asked in its life."""
    word, count = run(sandbox, "echo get > /tmp/ask; cat /tmp/told").split()
    return word, int(count)


def snapshot(sandbox: Sandbox) -> str:
    return sandbox.create_snapshot(**SLOW).snapshot_id


def rollback(sandbox: Sandbox, to: str) -> tuple:
    return api("POST", f"/sandboxes/{sandbox.sandbox_id}/rollback", {"snapshotID": to})


def delete(snapshot_id: str) -> None:
    assert Sandbox.delete_snapshot(snapshot_id, **SLOW) is True


@pytest.fixture
def sandbox(tiny):
    """One sandbox of the test's own. What it used is given back."""
    before = at_rest()
    made = make(tiny)
    yield made
    made.kill(**SLOW)
    settled(before)


IDENTITY = """
hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '
cat /proc/sys/kernel/random/uuid; python3 -c 'import uuid; print(uuid.uuid4())'
"""


def test_a_snapshot_is_a_sandbox_to_start_from(sandbox):
    keep(sandbox)
    tell(sandbox, "first")
    run(sandbox, "echo on disk > ~/file; sync; echo not synced > ~/other")
    made = sandbox.create_snapshot(**SLOW, name="of the test")
    assert made.names == ["of the test"]
    listed = sandbox.list_snapshots(**SLOW).next_items()
    assert [entry.snapshot_id for entry in listed] == [made.snapshot_id]
    # It goes on, and what it does now is not in the snapshot.
    word, count = told(sandbox)
    assert word == "first"
    tell(sandbox, "later")
    run(sandbox, "echo later > ~/file; rm ~/other")
    one, two = make(made.snapshot_id), make(made.snapshot_id)
    try:
        for copy in (one, two):
            # The process goes on from where it was: asked as often as then, and once more.
            assert told(copy) == ("first", count)
            assert run(copy, "cat ~/file ~/other") == "on disk\nnot synced\n"
        tell(one, "of-one")
        assert told(two)[0] == "first"
        assert told(sandbox)[0] == "later"
        drawn = [run(each, IDENTITY).split() for each in (sandbox, one, two)]
        for name, values in zip(("host", "machine", "random", "uuid", "uuid4"), zip(*drawn)):
            assert len(set(values)) == 3, (name, values)
        assert [host for host, *_ in drawn] == [s.sandbox_id for s in (sandbox, one, two)]
        for copy in (one, two):
            before, guest, after = time.time(), float(run(copy, "date +%s.%N")), time.time()
            # The emulated host's clock is this machine's.
            assert before - 2 <= guest <= after + 2, (before, guest, after)
    finally:
        for copy in (one, two):
            copy.kill(**SLOW)
        delete(made.snapshot_id)


def test_a_chain_can_be_gone_back_and_forth_on(sandbox):
    keep(sandbox)
    chain = []
    for word in ("one", "two", "three"):
        tell(sandbox, word)
        run(sandbox, f"echo {word} > ~/synced; sync; echo {word} > ~/cached; echo {word} > /dev/shm/m")
        chain.append((word, told(sandbox)[1], snapshot(sandbox)))
    tell(sandbox, "lost")
    run(sandbox, "echo lost | tee ~/synced ~/cached /dev/shm/m; sync; echo new > ~/new")
    process = process_of(sandbox.sandbox_id)
    try:
        for word, count, kept in [chain[0], chain[2], chain[1], chain[1]]:
            status, body = rollback(sandbox, kept)
            assert (status, body["status"]) == (200, "READY"), body
            assert told(sandbox) == (word, count + 1)
            files = "cat ~/synced ~/cached /dev/shm/m; ls ~"
            assert run(sandbox, files).split() == [word] * 3 + ["cached", "synced"]
        # The disk has it too, not only the guest's cache of it.
        run(sandbox, "echo 3 > /proc/sys/vm/drop_caches", user="root")
        assert run(sandbox, "cat ~/synced ~/cached") == "two\ntwo\n"
        assert process_of(sandbox.sandbox_id) == process, "in the same process"
        assert run(sandbox, "hostname").strip() == sandbox.sandbox_id
        guest = float(run(sandbox, "date +%s.%N"))
        assert abs(time.time() - guest) < 2
        # On from there: a branch of the chain, which itself can be gone back to.
        tell(sandbox, "branch")
        branch = snapshot(sandbox)
        chain.append(("branch", 0, branch))
        assert rollback(sandbox, chain[2][2])[0] == 200
        assert told(sandbox)[0] == "three"
        assert rollback(sandbox, branch)[0] == 200
        assert told(sandbox)[0] == "branch"
    finally:
        for _, _, kept in chain:
            delete(kept)


def test_a_rollback_ends_streams_cleanly_and_new_ones_work(sandbox):
    kept = snapshot(sandbox)
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0, **SLOW)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(handle.wait)
        assert rollback(sandbox, kept)[0] == 200
        # What it waited for has never been: the stream ends, soon and with an error of the SDK's.
        error = waiting.exception(timeout=60)
        assert error is not None
    assert handle.pid not in [p.pid for p in sandbox.commands.list(**SLOW)]
    assert run(sandbox, "echo again") == "again\n"
    sandbox.files.write("/tmp/new", "new", **SLOW)
    assert sandbox.files.read("/tmp/new", **SLOW) == "new"
    delete(kept)


def test_a_rollback_goes_to_its_own_snapshots_alone(sandbox, tiny):
    other = make(tiny)
    foreign = snapshot(other)
    try:
        run(sandbox, "echo mine > /dev/shm/m")
        status, body = rollback(sandbox, foreign)
        assert status == 409, body
        assert foreign in body["message"]
        assert rollback(sandbox, "0" * 20)[0] == 404
        assert run(sandbox, "cat /dev/shm/m") == "mine\n"
    finally:
        other.kill(**SLOW)
        delete(foreign)


def test_a_python_variable_is_rolled_back_and_cloned():
    code = make("code-interpreter-v1")
    copies = []

    def cell(of, text: str) -> str:
        execution = of.run_code(text, timeout=PATIENCE_S, **SLOW)
        assert execution.error is None, execution.error
        return execution.text

    try:
        cell(code, "import threading, time, itertools\nx = [1, 2, 3]\nticks = itertools.count()\n"
             "latest = 0\n"
             "def tick():\n    global latest\n"
             "    while True:\n        latest = next(ticks); time.sleep(0.05)\n"
             "threading.Thread(target=tick, daemon=True).start(); len(x)")
        kept = snapshot(code)
        then = int(cell(code, "latest"))
        cell(code, "x.append('lost'); y = 1; len(x)")
        assert rollback(code, kept)[0] == 200
        assert cell(code, "x, 'y' in dir()") == "([1, 2, 3], False)"
        copies.append(make(kept))
        copies[0] = type(code).connect(copies[0].sandbox_id, timeout=3600, **SLOW)
        for each in (code, copies[0]):
            # Its thread goes on, from about where it was.
            now = int(cell(each, "latest"))
            time_enough = lambda e=each, n=now: int(cell(e, "latest")) > n  # noqa: E731
            wait_until("the thread goes on", time_enough)
        assert cell(copies[0], "x") == "[1, 2, 3]"
        assert int(cell(copies[0], "latest")) != then
        delete(kept)
    finally:
        for each in (code, *copies):
            each.kill(**SLOW)


def copies_of(sandbox: Sandbox, verb: str, count: int) -> list[Sandbox]:
    status, body = api("POST", f"/sandboxes/{sandbox.sandbox_id}/{verb}", {"count": count})
    assert status == 201, body
    return [connect(entry["sandboxID"]) for entry in body]


def are_copies(copies: list[Sandbox], word: str, source: Sandbox) -> None:
    assert len({copy.sandbox_id for copy in (*copies, source)}) == len(copies) + 1
    for number, copy in enumerate(copies):
        assert told(copy)[0] == word
        assert run(copy, "cat ~/file; hostname") == f"{word}\n{copy.sandbox_id}\n"
        tell(copy, f"copy-{number}")
        run(copy, f"echo copy-{number} > ~/file")
    for number, copy in enumerate(copies):
        assert told(copy)[0] == f"copy-{number}"
        assert run(copy, "cat ~/file") == f"copy-{number}\n"
    assert told(source)[0] == word
    assert run(source, "cat ~/file") == f"{word}\n"


def test_three_clones_and_their_source_go_on_apart(sandbox):
    keep(sandbox)
    tell(sandbox, "cloned")
    run(sandbox, "echo cloned > ~/file")
    copies = copies_of(sandbox, "clone", 3)
    try:
        are_copies(copies, "cloned", sandbox)
        assert api("GET", f"/snapshots?sandboxID={sandbox.sandbox_id}") == (200, [])
    finally:
        for copy in copies:
            copy.kill(**SLOW)


def test_forks_of_the_sdk(sandbox):
    keep(sandbox)
    tell(sandbox, "forked")
    run(sandbox, "echo forked > ~/file")
    forks = sandbox.fork(count=2, timeout=3600, **SLOW)
    try:
        assert all(isinstance(fork, Sandbox) for fork in forks), forks
        are_copies(forks, "forked", sandbox)
    finally:
        for fork in forks:
            fork.kill(**SLOW)


def test_a_clone_of_the_sdks_own_making(sandbox):
    """Snapshot, N creates, and the snapshot deleted at once while they live."""
    keep(sandbox)
    tell(sandbox, "shared")
    run(sandbox, "echo shared > ~/file")
    kept = snapshot(sandbox)
    with ThreadPoolExecutor(max_workers=3) as pool:
        copies = list(pool.map(make, [kept] * 3))
    try:
        assert api("DELETE", f"/templates/{kept}") == (204, None)
        assert api("POST", "/v2/sandboxes", {"templateID": kept})[0] == 404
        assert lab(f"ls {STORE}/snapshots").split().count(kept) == 0
        are_copies(copies, "shared", sandbox)
        # They can have snapshots of their own, on layers whose first owner is gone.
        own = snapshot(copies[0])
        copy = make(own)
        assert told(copy)[0] == "copy-0"
        copy.kill(**SLOW)
        delete(own)
    finally:
        for copy in copies:
            copy.kill(**SLOW)


def test_pause_resume_and_connect(sandbox):
    keep(sandbox)
    tell(sandbox, "paused")
    run(sandbox, "echo synced > ~/file; sync; echo cached > ~/other")
    _, count = told(sandbox)
    process = process_of(sandbox.sandbox_id)
    assert sandbox.pause(**SLOW) is True
    assert state_of(sandbox.sandbox_id) == "paused", "at the first look"
    assert sandbox.pause(**SLOW) is False
    for verb, body in [("snapshots", {}), ("clone", {"count": 1}), ("rollback", {"snapshotID": "0" * 20})]:
        status, told_why = api("POST", f"/sandboxes/{sandbox.sandbox_id}/{verb}", body)
        assert status == 409, (verb, told_why)
    assert sandbox.is_running(**SLOW) is False
    status, body = api("POST", f"/sandboxes/{sandbox.sandbox_id}/resume", {"timeout": 3600})
    assert (status, body["sandboxID"]) == (201, sandbox.sandbox_id)
    assert state_of(sandbox.sandbox_id) == "running"
    assert told(sandbox) == ("paused", count + 1)
    assert run(sandbox, "cat ~/file ~/other; hostname") == f"synced\ncached\n{sandbox.sandbox_id}\n"
    assert process_of(sandbox.sandbox_id) == process, "memory was not wanted: it only stood still"
    assert abs(time.time() - float(run(sandbox, "date +%s.%N"))) < 2
    status, body = api("POST", f"/sandboxes/{sandbox.sandbox_id}/resume", {"timeout": 3600})
    assert status == 409, body
    # Its process goes away while it waits: it comes back from the disk.
    assert sandbox.pause(**SLOW) is True
    lab(f"kill -9 {process}; timeout 60 tail --pid={process} -f /dev/null")
    assert state_of(sandbox.sandbox_id) == "paused"
    sandbox.connect(timeout=3600, **SLOW)
    assert state_of(sandbox.sandbox_id) == "running"
    assert process_of(sandbox.sandbox_id) != process
    assert told(sandbox) == ("paused", count + 2)
    assert run(sandbox, "cat ~/file ~/other") == "synced\ncached\n"
    # And again, on the layers that the pauses made.
    tell(sandbox, "again")
    assert sandbox.pause(**SLOW) is True
    sandbox.connect(timeout=3600, **SLOW)
    assert told(sandbox)[0] == "again"


def test_a_paused_sandbox_can_be_killed(tiny):
    before = at_rest()
    sandbox = make(tiny)
    assert sandbox.pause(**SLOW) is True
    assert sandbox.kill(**SLOW) is True
    assert state_of(sandbox.sandbox_id) is None
    assert sandbox.kill(**SLOW) is False
    settled(before)


def test_a_sandbox_whose_time_is_over_pauses_if_that_was_wished(tiny):
    before = at_rest()
    sandbox = make(tiny, lifecycle={"on_timeout": "pause"})
    keep(sandbox)
    tell(sandbox, "waiting")
    sandbox.set_timeout(1, **SLOW)
    wait_until("it is paused", lambda: state_of(sandbox.sandbox_id) == "paused")
    sandbox.connect(timeout=3600, **SLOW)
    assert told(sandbox)[0] == "waiting"
    assert sandbox.kill(**SLOW) is True
    settled(before)


def test_of_operations_at_the_same_time_one_is_refused(sandbox):
    keep(sandbox)
    tell(sandbox, "whole")
    path = f"/sandboxes/{sandbox.sandbox_id}"
    # Enough that the first takes a while.
    run(sandbox, "head -c 16M /dev/urandom > /dev/shm/much")
    made = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        for verb in ("snapshots", "pause"):
            asked = [pool.submit(api, "POST", f"{path}/{verb}", {}) for _ in range(4)]
            answers = [each.result() for each in asked]
            statuses = sorted(status for status, _ in answers)
            if verb == "snapshots":
                made += [body["snapshotID"] for status, body in answers if status == 201]
                assert statuses.count(201) + statuses.count(409) == 4, answers
                assert {201, 409} == set(statuses), answers
            else:
                assert statuses == [204, 409, 409, 409], answers
    assert api("POST", f"{path}/resume", {"timeout": 3600})[0] == 201
    assert told(sandbox)[0] == "whole"
    listed = api("GET", f"/snapshots?sandboxID={sandbox.sandbox_id}")[1]
    assert sorted(entry["snapshotID"] for entry in listed) == sorted(made)
    for each in made:
        delete(each)


def layer_bytes(snapshot_id: str) -> int:
    """Length of the newest layer of a snapshot: what it holds itself."""
    newest = f"ls -t {STORE}/snapshots/{snapshot_id}/memory.* | head -n 1"
    return int(lab(f"stat -c %s $({newest})"))


TOUCHED_MIB = 128

TOUCH = """
import mmap, sys
size = int(sys.argv[1]) << 20
said = open('/tmp/said', 'w', buffering=1)
area = mmap.mmap(-1, size)
for page in range(0, size, 4096):
    area[page:page + 8] = page.to_bytes(8, 'little')
print('touched', file=said)
input()
area.close()
print('freed', file=said)
input()
"""


def test_memory_that_the_guest_freed_is_not_in_the_next_snapshot(sandbox):
    sandbox.files.write("/tmp/touch.py", TOUCH, **SLOW)
    first = snapshot(sandbox)
    group = group_of(sandbox.sandbox_id)

    def used() -> int:
        return int(lab(f"sed -n 's/^anon //p' {group}/memory.stat"))

    before = used()
    handle = sandbox.commands.run(
        f"python3 /tmp/touch.py {TOUCHED_MIB}", background=True, stdin=True, timeout=0, **SLOW
    )
    said = lambda: run(sandbox, "cat /tmp/said || true")  # noqa: E731
    wait_until("it is touched", lambda: said() == "touched\n")
    touched = used() - before
    assert touched > TOUCHED_MIB << 20
    sandbox.commands.send_stdin(handle.pid, "\n", **SLOW)
    wait_until("it is freed", lambda: said() == "touched\nfreed\n")
    # The guest reports what is free in pieces of 2 MiB; what lies scattered stays.
    wait_until("most of it is given back", lambda: used() - before < touched / 2)
    freed = snapshot(sandbox)
    size = layer_bytes(freed)
    assert size < touched * 0.6, f"{size >> 20} MiB, after {touched >> 20} MiB were touched"
    # The same without the free: all of it is there.
    sandbox.commands.run(
        f"python3 /tmp/touch.py {TOUCHED_MIB}", background=True, stdin=True, timeout=0, **SLOW
    )
    wait_until("it is touched again", lambda: said() == "touched\n")
    full = snapshot(sandbox)
    assert layer_bytes(full) > TOUCHED_MIB << 20
    # What is kept of both is right.
    for kept, words in ((freed, "touched\nfreed\n"), (full, "touched\n")):
        copy = make(kept)
        assert run(copy, "cat /tmp/said") == words
        copy.kill(**SLOW)
    for each in (first, freed, full):
        delete(each)


MAPPINGS = """
for pid in $(cat %s/*/cgroup.procs); do
  awk -v pid=$pid '
    /^[0-9a-f]+-[0-9a-f]+ / { name = $6; inode = $4 ":" $5 }
    name ~ /memory\\./ || name ~ /memfd/ { if (/^(Size|Rss|Shared_Clean|Private_Clean|Private_Dirty|Shared_Dirty):/) sum[inode " " name " " $1] += $2 }
    END { for (key in sum) print pid, key, sum[key] }' /proc/$pid/smaps
done
"""


def shared_memory() -> dict:
    """Of every VM process: the files that lie under its guest's memory, with what smaps says of them
    in KiB."""
    processes: dict = {}
    for line in lab(MAPPINGS % "/sys/fs/cgroup/mica").splitlines():
        pid, inode, _, field, kib = line.split()
        entry = processes.setdefault(int(pid), {}).setdefault(inode, {})
        entry[field.rstrip(":")] = entry.get(field.rstrip(":"), 0) + int(kib)
    return processes


def test_twenty_clones_share_the_memory_they_start_from(sandbox):
    nodes = int(lab("ls -d /sys/devices/system/node/node[0-9]* | wc -l"))
    run(sandbox, "head -c 8M /dev/urandom > /dev/shm/much")
    status, body = api("POST", f"/sandboxes/{sandbox.sandbox_id}/clone", {"count": 20})
    assert status == 201, body
    ids = [entry["sandboxID"] for entry in body]
    try:
        groups = lab(
            "for id in " + " ".join(ids) + f"; do for group in {'/sys/fs/cgroup/mica'}/*/; do "
            f'grep -qaF "$(basename "$group")" {STORE}/sandboxes/$id/record && '
            'head -n 1 "$group/cgroup.procs"; done; done; true'
        )
        pids = [int(pid) for pid in groups.split()]
        assert len(set(pids)) == 20
        seen = {pid: files for pid, files in shared_memory().items() if pid in pids}
        users: dict = {}
        for files in seen.values():
            for inode, fields in files.items():
                users.setdefault(inode, []).append(fields)
        # Of what they start from, the base and what was written since, one inode for every node; and
        # no other file of any length: console and exchange are each process's own, and small.
        images = {inode for inode, all_ in users.items() if len(all_) > 1}
        assert 2 <= len(images) <= 2 * nodes, {inode: len(all_) for inode, all_ in users.items()}
        own_kib = [f["Size"] for inode in set(users) - images for f in users[inode]]
        assert max(own_kib) < 32 << 10
        for pid in pids:
            mapped = [fields for inode, fields in seen[pid].items() if inode in images]
            assert len(mapped) == 2
            clean_kib = sum(f["Shared_Clean"] + f["Private_Clean"] for f in mapped)
            shared_kib = sum(f["Shared_Clean"] for f in mapped)
            assert shared_kib > 1024, (pid, mapped)
            assert shared_kib > 0.9 * clean_kib, (pid, mapped)
            # Only what it wrote itself is its own.
            own_kib = sum(f["Private_Dirty"] for f in mapped)
            assert own_kib < sum(f["Size"] for f in mapped) / 4, (pid, mapped)
    finally:
        with ThreadPoolExecutor(max_workers=4) as pool:
            ended = pool.map(lambda each: api("DELETE", f"/sandboxes/{each}")[0], ids)
            assert set(ended) == {204}
    assert set(sandboxes()) == {sandbox.sandbox_id}
