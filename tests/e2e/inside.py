"""The lab's host, seen as root: what sandboxes use there, the daemon, its store, power.

Called by the tests of faults and of operations. What is counted is never a test's own state: it is
read from /proc, the control groups and the store.
"""

import os
import signal
import subprocess
import time

from conftest import MICA, PATIENCE_S, api, lab, wait_until

STORE = "/var/lib/mica"
CGROUPS = "/sys/fs/cgroup/mica"

# How long the number of processes has to stay the same before the pool counts as at rest. Making one
# takes part of a second.
REST_S = 3


def resources() -> dict:
    """What sandboxes use on the host: processes, control groups, files, descriptors, sockets."""
    text = lab(
        f"""
        daemon=$(pgrep -of '[m]ica serve')
        echo processes $(pgrep -c -x mica-vm || true)
        echo zombies $(ps -eo stat= | grep -c '^Z' || true)
        echo cgroups $(find {CGROUPS} -mindepth 1 -type d | wc -l)
        echo files $(find {STORE}/sandboxes -mindepth 1 | wc -l)
        echo snapshots $(find {STORE}/snapshots -mindepth 1 | wc -l)
        echo descriptors $(ls /proc/$daemon/fd | wc -l)
        echo sockets $(ls -l /proc/$daemon/fd | grep -c socket: || true)
        """
    )
    return {name: int(count) for name, count in (line.split() for line in text.splitlines())}


def at_rest() -> dict:
    """The same, once the pool neither makes nor buries a process. Processes that wait in the pool are
    part of it: the lab's daemon keeps the same number of them at all times."""
    seen, since = resources(), time.monotonic()
    end = time.monotonic() + 120
    while time.monotonic() < end:
        now = resources()
        if now["processes"] != seen["processes"] or now["cgroups"] != seen["cgroups"]:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since >= REST_S and now["processes"] == now["cgroups"]:
            return now
    raise AssertionError(f"the pool does not come to rest: {seen}")


def settled(before: dict) -> None:
    """Waits until nothing is left above `before`. Open client connections come and go, so sockets
    and descriptors may differ by a few, never by one for each sandbox."""
    exact = ("processes", "zombies", "cgroups", "files", "snapshots")
    now = before

    def clean() -> bool:
        nonlocal now
        now = resources()
        loose = all(now[k] <= before[k] + 8 for k in ("descriptors", "sockets"))
        return loose and all(now[k] == before[k] for k in exact)

    try:
        wait_until("resources are back", clean, 60)
    except AssertionError as error:
        raise AssertionError(f"{error}: {before} before, {now} now") from error


def state_of(sandbox_id: str) -> str | None:
    """`running` or `paused`; None when there is no such sandbox."""
    status, body = api("GET", f"/sandboxes/{sandbox_id}")
    assert status in (200, 404), (status, body)
    return body["state"] if status == 200 else None


def sandboxes() -> dict:
    """Every sandbox's state, by id."""
    found, token = {}, ""
    while True:
        status, page = api("GET", f"/v2/sandboxes?state=running,paused&limit=100{token}")
        assert status == 200, page
        found.update({entry["sandboxID"]: entry["state"] for entry in page})
        if len(page) < 100:
            return found
        raise AssertionError("more than a page of sandboxes in a test")


def group_of(sandbox_id: str) -> str:
    """The control group of its process. Its name is that of the process, drawn before there was a
    sandbox; the sandbox's record has it."""
    return lab(
        f"for group in {CGROUPS}/*/; do "
        f'grep -qaF "$(basename "$group")" {STORE}/sandboxes/{sandbox_id}/record && '
        f'echo "${{group%/}}"; done; true'
    ).strip()


def process_of(sandbox_id: str) -> int:
    """Its VM process."""
    return int(lab(f"head -n 1 {group_of(sandbox_id)}/cgroup.procs"))


def daemon() -> str:
    return lab("pgrep -of '[m]ica serve'").strip()


def answers() -> bool:
    try:
        return api("GET", "/health")[0] in (200, 204)
    except OSError:
        return False


def end_daemon(how: str) -> None:
    """Ends the daemon with a signal, and waits until the lab's supervisor has a new one that answers."""
    lab(
        f"old=$(pgrep -of '[m]ica serve'); kill -{how} $old; "
        "timeout 60 tail --pid=$old -f /dev/null"
    )
    wait_until("a new daemon answers", answers)


def power_off_and_on() -> None:
    """As a person would: the host is asked to switch itself off."""
    subprocess.run([MICA, "lab", "down"], check=True, timeout=PATIENCE_S)
    power_on()


def cut_the_power() -> None:
    """The emulator is killed: what was not on the device is gone."""
    home = os.path.join(
        os.environ.get("MICA_LAB_DIR", "/var/lib/mica-lab"),
        os.environ.get("MICA_LAB_NAME", "default"),
    )
    with open(os.path.join(home, "qemu.pid"), encoding="utf-8") as file:
        emulator = int(file.read())
    os.kill(emulator, signal.SIGKILL)
    wait_until("the emulator is gone", lambda: not os.path.exists(f"/proc/{emulator}"))
    power_on()


def power_on() -> None:
    port = os.environ["E2B_API_URL"].rsplit(":", 1)[1]
    subprocess.run([MICA, "lab", "up", "--port", port], check=True, timeout=PATIENCE_S)
