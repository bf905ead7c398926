"""Pauses and snapshots that keep the disk alone: a real Linux guest boots from what was written."""

import pytest
from conftest import PATIENCE_S, api, lab, make, run, wait_until
from e2b import Sandbox
from inside import STORE, at_rest, daemon, end_daemon, process_of, settled, state_of

SLOW = {"request_timeout": PATIENCE_S}


@pytest.fixture
def sandbox(tiny):
    """One sandbox of the test's own. What it used is given back."""
    before = at_rest()
    made = make(tiny, envs={"COLOUR": "green"}, metadata={"of": "the test"})
    yield made
    made.kill(**SLOW)
    settled(before)


def boot_id(sandbox: Sandbox) -> str:
    return run(sandbox, "cat /proc/sys/kernel/random/boot_id").strip()


def write(sandbox: Sandbox, word: str) -> None:
    """A file that nobody syncs, something that only memory has, and a process."""
    run(sandbox, f"echo {word} > ~/file; echo {word} > /dev/shm/m")
    run(sandbox, "setsid sleep 98765 > /dev/null 2>&1 < /dev/null & echo started")
    assert "sleep 98765" in processes(sandbox)


def processes(sandbox: Sandbox) -> str:
    return run(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def pause(sandbox: Sandbox, memory: bool = False) -> None:
    path = f"/sandboxes/{sandbox.sandbox_id}"
    assert api("POST", f"{path}/pause", {"memory": memory})[0] == 204
    status, body = api("GET", path)
    assert (status, body["state"]) == (200, "paused")
    assert body["pauseMode"] == ("full" if memory else "filesystem")


def has_booted(sandbox: Sandbox, word: str) -> str:
    """That it is the same sandbox, with its disk and nothing of its memory. Its boot's id."""
    assert run(sandbox, "cat ~/file") == f"{word}\n"
    assert run(sandbox, "ls /dev/shm") == ""
    assert "sleep 98765" not in processes(sandbox)
    about = run(sandbox, 'hostname; echo "$COLOUR $E2B_SANDBOX_ID"')
    assert about == f"{sandbox.sandbox_id}\ngreen {sandbox.sandbox_id}\n"
    status, body = api("GET", f"/sandboxes/{sandbox.sandbox_id}")
    assert (status, body["state"], body["metadata"]) == (200, "running", {"of": "the test"})
    return boot_id(sandbox)


def test_what_is_paused_without_memory_boots_with_its_files(sandbox):
    path = f"/sandboxes/{sandbox.sandbox_id}"
    boots = [boot_id(sandbox)]
    status, kept = api("POST", f"{path}/snapshots", {})
    assert status == 201, kept
    write(sandbox, "first")
    pause(sandbox)
    layers = f"find {STORE}/sandboxes/{sandbox.sandbox_id} -name 'memory.*'"
    assert lab(layers) == "", "its memory is given back"
    # A new daemon finds it as it is.
    before = daemon()
    end_daemon("KILL")
    assert daemon() != before
    assert state_of(sandbox.sandbox_id) == "paused"
    status, body = api("POST", f"{path}/resume", {"timeout": 3600})
    assert (status, body["sandboxID"]) == (201, sandbox.sandbox_id), body
    boots.append(has_booted(sandbox, "first"))
    # What has booted is kept, and put back, like anything else.
    write(sandbox, "second")
    status, second = api("POST", f"{path}/snapshots", {})
    assert status == 201, second
    copy = make(second["snapshotID"])
    assert boot_id(copy) == boots[-1]
    assert run(copy, "cat ~/file /dev/shm/m") == "second\nsecond\n"
    assert "sleep 98765" in processes(copy)
    copy.kill(**SLOW)
    run(sandbox, "echo lost | tee ~/file /dev/shm/m")
    assert api("POST", f"{path}/rollback", second)[0] == 200
    assert run(sandbox, "cat ~/file /dev/shm/m") == "second\nsecond\n"
    pause(sandbox, memory=True)
    pid = process_of(sandbox.sandbox_id)
    lab(f"kill -9 {pid}; timeout 60 tail --pid={pid} -f /dev/null")
    sandbox.connect(timeout=3600, **SLOW)
    assert boot_id(sandbox) == boots[-1]
    assert run(sandbox, "cat ~/file /dev/shm/m") == "second\nsecond\n"
    # The time before all that had another memory.
    assert api("POST", f"{path}/rollback", kept)[0] == 200
    assert boot_id(sandbox) == boots[0]
    assert run(sandbox, "cat ~/file || echo none") == "none\n"
    assert len(set(boots)) == len(boots)
    for each in (kept, second):
        assert Sandbox.delete_snapshot(each["snapshotID"], **SLOW) is True


def test_what_is_made_from_a_snapshot_without_memory_boots_with_its_files(sandbox):
    first = boot_id(sandbox)
    write(sandbox, "word")
    status, made = api("POST", f"/sandboxes/{sandbox.sandbox_id}/snapshots", {"memory": False})
    assert status == 201, made
    assert lab(f"find {STORE}/snapshots/{made['snapshotID']} -name 'memory.*'") == ""
    # What it is of goes on with all that it has.
    assert boot_id(sandbox) == first
    assert run(sandbox, "cat ~/file /dev/shm/m") == "word\nword\n"
    assert "sleep 98765" in processes(sandbox)
    copies = [make(made["snapshotID"], envs={"COLOUR": "red"}) for _ in range(2)]
    boots = {first}
    for copy in copies:
        assert run(copy, "cat ~/file") == "word\n"
        assert run(copy, "ls /dev/shm") == ""
        assert "sleep 98765" not in processes(copy)
        about = run(copy, 'hostname; echo "$COLOUR $E2B_SANDBOX_ID"; grep ^127.0.1.1 /etc/hosts')
        assert about == f"{copy.sandbox_id}\nred {copy.sandbox_id}\n127.0.1.1 {copy.sandbox_id}\n"
        boots.add(boot_id(copy))
        run(copy, "echo of-the-copy > ~/file")
    assert len(boots) == 3
    assert run(sandbox, "cat ~/file") == "word\n"
    # A copy is one like any other.
    pause(copies[0], memory=True)
    copies[0].connect(timeout=3600, **SLOW)
    assert run(copies[0], "cat ~/file") == "of-the-copy\n"
    assert boot_id(copies[0]) in boots
    for copy in copies:
        assert copy.kill(**SLOW) is True
    assert Sandbox.delete_snapshot(made["snapshotID"], **SLOW) is True


def test_a_memory_that_is_not_wanted_is_dropped(sandbox):
    first = boot_id(sandbox)
    write(sandbox, "word")
    # Nobody tells its agent to write: what is on the disk by now is what there is.
    run(sandbox, "sync")
    pause(sandbox, memory=True)
    connect = f"/v2/sandboxes/{sandbox.sandbox_id}/connect"
    status, body = api("POST", connect, {"timeout": 3600, "memory": False})
    assert (status, body["sandboxID"]) == (201, sandbox.sandbox_id), body
    assert has_booted(sandbox, "word") != first


def test_a_time_that_is_over_ends_in_such_a_pause_if_that_was_wished_for(tiny):
    before = at_rest()
    wish = {"templateID": tiny, "timeout": 3600, "autoPause": True, "autoPauseMemory": False}
    status, made = api("POST", "/v2/sandboxes", {**wish, "envVars": {"COLOUR": "green"}})
    assert status == 201, made
    sandbox = Sandbox.connect(made["sandboxID"], timeout=3600, **SLOW)
    first = boot_id(sandbox)
    write(sandbox, "word")
    sandbox.set_timeout(1, **SLOW)
    wait_until("it is paused", lambda: state_of(sandbox.sandbox_id) == "paused")
    sandbox.connect(timeout=3600, **SLOW)
    assert run(sandbox, "cat ~/file") == "word\n"
    assert boot_id(sandbox) != first
    assert sandbox.kill(**SLOW) is True
    settled(before)
