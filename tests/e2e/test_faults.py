"""What breaks, and what must not break with it: guests that die, floods, kills, limits, a full disk,
a daemon that is killed or told to stop."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PATIENCE_S, api, lab, make, run, wait_until
from inside import (
    CGROUPS,
    STORE,
    at_rest,
    end_daemon,
    group_of,
    process_of,
    sandboxes,
    settled,
    state_of,
)

SLOW = {"request_timeout": PATIENCE_S}


def run_to_death(sandbox, command: str) -> None:
    sandbox.commands.run(command, background=True, user="root", timeout=0, **SLOW)


def is_gone(sandbox) -> bool:
    return state_of(sandbox.sandbox_id) is None


@pytest.mark.parametrize("end", ["panic c", "power-off o", "reset b"])
def test_a_guest_that_ends_takes_only_its_own_sandbox(tiny, end):
    before = at_rest()
    bystander, victim = make(tiny), make(tiny)
    try:
        run_to_death(victim, f"echo {end.split()[1]} > /proc/sysrq-trigger")
        wait_until("the API answers 404", lambda: is_gone(victim))
        assert victim.is_running(**SLOW) is False
        assert run(bystander, "echo fine") == "fine\n"
    finally:
        bystander.kill(**SLOW)
    settled(before)


def test_a_console_flood_harms_nobody(tiny):
    flooder = make(tiny)
    try:
        flood = "timeout 20 sh -c 'yes flood > /dev/ttyS0'; echo flooded"
        handle = flooder.commands.run(flood, background=True, user="root", timeout=0, **SLOW)
        assert handle.wait().stdout == "flooded\n"
        assert state_of(flooder.sandbox_id) == "running"
        memory = int(lab("grep -h VmRSS /proc/$(pgrep -of '[m]ica serve')/status | tr -dc 0-9"))
        assert memory < 512 * 1024, f"the daemon holds {memory} KiB"
    finally:
        flooder.kill(**SLOW)


def test_nothing_is_left_after_fifty_rounds(tiny):
    before = at_rest()

    def round_trip(_):
        sandbox = make(tiny)
        assert sandbox.kill(**SLOW) is True

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(round_trip, range(50)))
    settled(before)


def test_killing_a_sandbox_cuts_its_streams(tiny):
    sandbox = make(tiny)
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0, **SLOW)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(handle.wait)
        assert sandbox.kill(**SLOW) is True
        assert waiting.exception(timeout=60) is not None


def test_a_vm_process_that_is_killed_takes_only_its_sandbox(tiny):
    before = at_rest()
    bystander, victim = make(tiny), make(tiny)
    try:
        lab(f"kill -9 {process_of(victim.sandbox_id)}")
        wait_until("the API answers 404", lambda: is_gone(victim))
        assert run(bystander, "echo fine") == "fine\n"
    finally:
        bystander.kill(**SLOW)
    settled(before)


# Takes memory in steps and keeps it; what it prints last is how far it came.
EATER = """
import sys
kept = []
for step in range(int(sys.argv[1])):
    kept.append(b'x' * (4 << 20))
    print(4 * (step + 1), flush=True)
"""


def test_a_guest_that_fills_its_memory_stays_within_guest_and_64_mib(tiny):
    before = at_rest()
    full, bystander = make(tiny), make(tiny)
    try:
        full.files.write("/tmp/eater.py", EATER, **SLOW)
        # More than the guest has: its own kernel ends the eater, and only that.
        greedy = "python3 /tmp/eater.py 100 > /tmp/eaten; tail -n 1 /tmp/eaten"
        eaten_mib = int(run(full, greedy))
        assert 100 <= eaten_mib < 256, eaten_mib
        group = group_of(full.sandbox_id)
        limit, peak = (int(lab(f"cat {group}/memory.{name}")) for name in ("max", "peak"))
        assert limit == (256 + 64) << 20
        assert eaten_mib << 20 <= peak <= limit
        events = dict(line.split() for line in lab(f"cat {group}/memory.events").splitlines())
        assert events["oom_kill"] == "0", events
        assert run(full, "echo fine") == run(bystander, "echo fine") == "fine\n"
    finally:
        for sandbox in (full, bystander):
            sandbox.kill(**SLOW)
    settled(before)


def test_a_vm_process_cannot_have_more_than_its_limit(tiny):
    """The limit is lowered by hand below what the guest may touch: as if the process itself, taken
    over, wanted more than guest and 64 MiB."""
    before = at_rest()
    victim, bystander = make(tiny), make(tiny)
    try:
        group = group_of(victim.sandbox_id)
        now = int(lab(f"cat {group}/memory.current"))
        # The kill is counted where it outlives the sandbox: in the group above.
        kills = f"sed -n 's/^oom_group_kill //p' {CGROUPS}/memory.events"
        killed_before = int(lab(kills))
        lab(f"echo {now + (16 << 20)} > {group}/memory.max")
        victim.files.write("/tmp/eater.py", EATER, **SLOW)
        run_to_death(victim, "python3 /tmp/eater.py 40")
        wait_until("the sandbox is gone", lambda: is_gone(victim))
        assert int(lab(kills)) == killed_before + 1
        assert run(bystander, "echo fine") == "fine\n"
    finally:
        bystander.kill(**SLOW)
    settled(before)


def fill_the_store() -> None:
    """Takes every block that is free: in pieces that get smaller, until the smallest does not fit."""
    lab(
        f"""
        n=0
        for size in 1G 64M 4M 256K 16K 4K; do
            while fallocate -l $size {STORE}/filler.$n 2>/dev/null; do n=$((n + 1)); done
            rm -f {STORE}/filler.$n
        done
        """,
        timeout_s=PATIENCE_S,
    )


def test_a_full_disk_refuses_and_harms_nothing(tiny):
    before = at_rest()
    sandbox = make(tiny)
    try:
        run(sandbox, "echo kept > ~/kept; sync")
        path = f"/sandboxes/{sandbox.sandbox_id}/snapshots"
        try:
            fill_the_store()
            for _ in range(2):
                status, body = api("POST", path, {})
                assert (status, body["code"]) == (507, 507), (status, body)
            status, body = api("POST", f"/sandboxes/{sandbox.sandbox_id}/pause", {})
            assert status == 507, (status, body)
            status, body = api("POST", "/v2/sandboxes", {"templateID": tiny, "timeout": 60})
            assert status == 507, (status, body)
            assert state_of(sandbox.sandbox_id) == "running"
            assert run(sandbox, "cat ~/kept") == "kept\n"
        finally:
            lab(f"rm -f {STORE}/filler.*")
        # What was refused left nothing, and works now.
        assert api("GET", f"/snapshots?sandboxID={sandbox.sandbox_id}") == (200, [])
        assert run(sandbox, "echo more >> ~/kept; sync; cat ~/kept") == "kept\nmore\n"
        snapshot = sandbox.create_snapshot(**SLOW)
        copy = make(snapshot.snapshot_id)
        assert run(copy, "cat ~/kept") == "kept\nmore\n"
        assert copy.kill(**SLOW) is True
        assert type(sandbox).delete_snapshot(snapshot.snapshot_id, **SLOW) is True
    finally:
        sandbox.kill(**SLOW)
    settled(before)


def test_a_killed_daemon_is_followed_by_one_that_takes_over(tiny):
    before = at_rest()
    running, paused = make(tiny), make(tiny)
    try:
        ids = (running.sandbox_id, paused.sandbox_id)
        run(running, "echo of the time before > ~/file; sync")
        run(paused, "echo paused > /dev/shm/file")
        count = "sh -c 'n=0; while :; do n=$((n+1)); echo $n > /dev/shm/n; sleep 0.1; done'"
        counter = running.commands.run(count, background=True, timeout=0, **SLOW)
        paused.pause(**SLOW)
        stream = running.commands.connect(counter.pid, timeout=0, **SLOW)
        process = process_of(running.sandbox_id)
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = pool.submit(stream.wait)
            end_daemon("KILL")
            assert waiting.exception(timeout=60) is not None, "a stream of the old daemon ends"
        assert sandboxes() == {ids[0]: "running", ids[1]: "paused"}
        assert process_of(running.sandbox_id) == process, "it was not touched"
        assert run(running, "cat ~/file") == "of the time before\n"
        # The same process still counts, and can be heard again.
        assert counter.pid in [p.pid for p in running.commands.list(**SLOW)]
        first = int(run(running, "cat /dev/shm/n"))
        wait_until("it goes on counting", lambda: int(run(running, "cat /dev/shm/n")) > first)
        again = running.commands.connect(counter.pid, timeout=0, **SLOW)
        assert again.kill() is True
        # A paused one is where it was, its process too.
        paused.connect(timeout=3600, **SLOW)
        assert run(paused, "cat /dev/shm/file") == "paused\n"
    finally:
        for sandbox in (running, paused):
            assert sandbox.kill(**SLOW) is True
    settled(before)


def test_a_daemon_that_is_told_to_stop_ends_what_runs_and_keeps_what_is_paused(tiny):
    before = at_rest()
    running, paused = make(tiny), make(tiny)
    run(paused, "echo paused > /dev/shm/file")
    paused.pause(**SLOW)
    end_daemon("TERM")
    assert sandboxes() == {paused.sandbox_id: "paused"}
    assert is_gone(running)
    begun = time.monotonic()
    paused.connect(timeout=3600, **SLOW)
    resumed_s = time.monotonic() - begun
    uptime_s = float(run(paused, "cat /proc/uptime").split()[0])
    assert resumed_s < uptime_s, "it was booted, not resumed"
    assert run(paused, "cat /dev/shm/file") == "paused\n"
    assert paused.kill(**SLOW) is True
    settled(before)
