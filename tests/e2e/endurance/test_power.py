"""The host is switched off and on again, and its power is cut: what was acknowledged is still there.

The store is the lab's emulated NVMe drive, which lives through `mica lab down` and `up`; memory,
root file system and programs of the host do not.
"""

from conftest import PATIENCE_S, api, lab, make, run, wait_until
from e2b import Sandbox
from inside import STORE, answers, at_rest, cut_the_power, power_off_and_on, sandboxes, settled

SLOW = {"request_timeout": PATIENCE_S}


def mark(sandbox: Sandbox, word: str) -> None:
    """On disk, in the page cache, and in memory alone."""
    run(sandbox, f"echo {word} > ~/synced; sync; echo {word} > ~/cached; echo {word} > /dev/shm/memory")


def marks(sandbox: Sandbox) -> set[str]:
    return set(run(sandbox, "cat ~/synced ~/cached /dev/shm/memory").split())


def test_what_was_acknowledged_survives_the_host(tiny):
    # A daemon holds shells for the templates that there were when it started, and for those that it made
    # something of since: the one before may know some that are gone.
    lab("kill -9 $(pgrep -of '[m]ica serve')")
    wait_until("a daemon answers", answers)
    assert make(tiny).kill(**SLOW) is True
    before = at_rest()
    one, two, lost = make(tiny), make(tiny), make(tiny)
    for sandbox, word in ((one, "one"), (two, "two")):
        mark(sandbox, word)
        sandbox.pause(**SLOW)
    boot = lab("cat /proc/sys/kernel/random/boot_id")

    power_off_and_on()
    assert lab("cat /proc/sys/kernel/random/boot_id") != boot
    # What ran has ended with its host; what was paused has not.
    assert sandboxes() == {one.sandbox_id: "paused", two.sandbox_id: "paused"}
    one.connect(timeout=3600, **SLOW)
    assert marks(one) == {"one"}

    # Without warning, at once after the answers: only what is on the device counts.
    mark(one, "kept")
    kept = one.create_snapshot(**SLOW).snapshot_id
    mark(one, "lost")
    one.pause(**SLOW)
    boot = lab("cat /proc/sys/kernel/random/boot_id")
    cut_the_power()
    assert lab("cat /proc/sys/kernel/random/boot_id") != boot
    assert sandboxes() == {one.sandbox_id: "paused", two.sandbox_id: "paused"}
    for sandbox, word in ((two, "two"), (one, "lost")):
        sandbox.connect(timeout=3600, **SLOW)
        assert marks(sandbox) == {word}
    # Its chain goes on where it was.
    status, body = api("POST", f"/sandboxes/{one.sandbox_id}/rollback", {"snapshotID": kept})
    assert status == 200, body
    assert marks(one) == {"kept"}
    copy = make(kept)
    assert marks(copy) == {"kept"}

    # A directory without a manifest, as a power cut in the middle of a snapshot leaves it.
    torn = f"{STORE}/snapshots/{'z' * 20}"
    lab(f"mkdir {torn}; head -c 1M /dev/zero > {torn}/memory.{'y' * 20}; sync {STORE}")
    two.pause(**SLOW)
    cut_the_power()
    assert "z" * 20 not in lab(f"ls {STORE}/snapshots")
    assert sandboxes() == {two.sandbox_id: "paused"}
    assert lost.kill(**SLOW) is False
    assert two.kill(**SLOW) is True
    assert Sandbox.delete_snapshot(kept, **SLOW) is True
    settled(before)
