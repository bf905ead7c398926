"""What breaks, and what must not break with it: guests that die, floods, kills, a killed daemon."""

from concurrent.futures import ThreadPoolExecutor

from conftest import PATIENCE_S, api, lab, make, wait_until

SLOW = {"request_timeout": PATIENCE_S}


def status_of(sandbox) -> int:
    return api("GET", f"/sandboxes/{sandbox.sandbox_id}")[0]


def resources() -> dict:
    """What sandboxes use on the host: processes, control groups, files, descriptors, sockets."""
    text = lab(
        """
        daemon=$(pgrep -of '[m]ica serve')
        echo processes $(pgrep -c -x mica-vm || true)
        echo zombies $(ps -eo stat= | grep -c '^Z' || true)
        echo cgroups $(find /sys/fs/cgroup/mica -mindepth 1 -type d | wc -l)
        echo files $(find /var/lib/mica/sandboxes -mindepth 1 | wc -l)
        echo descriptors $(ls /proc/$daemon/fd | wc -l)
        echo sockets $(ls -l /proc/$daemon/fd | grep -c socket: || true)
        """
    )
    return {name: int(count) for name, count in (line.split() for line in text.splitlines())}


def settled(before: dict) -> None:
    """Waits until nothing is left above `before`. Open client connections come and go, so sockets
    and descriptors may differ by a few, never by one for each sandbox."""

    def clean() -> bool:
        now = resources()
        exact = all(now[k] == before[k] for k in ("processes", "zombies", "cgroups", "files"))
        return exact and all(now[k] <= before[k] + 8 for k in ("descriptors", "sockets"))

    wait_until(f"resources are back at {before}", clean)


def run_to_death(sandbox, command: str) -> None:
    sandbox.commands.run(command, background=True, user="root", timeout=0, **SLOW)


def dies(command: str) -> None:
    before = resources()
    bystander, victim = make("base"), make("base")
    try:
        run_to_death(victim, command)
        wait_until("the API answers 404", lambda: status_of(victim) == 404)
        assert victim.is_running(**SLOW) is False
        assert bystander.commands.run("echo fine", timeout=PATIENCE_S, **SLOW).stdout == "fine\n"
    finally:
        bystander.kill(**SLOW)
    settled(before)


def test_a_panic_kills_only_its_own_sandbox():
    dies("echo c > /proc/sysrq-trigger")


def test_a_power_off_kills_only_its_own_sandbox():
    dies("echo o > /proc/sysrq-trigger")


def test_a_reset_kills_only_its_own_sandbox():
    dies("echo b > /proc/sysrq-trigger")


def test_a_console_flood_harms_nobody():
    flooder = make("base")
    try:
        flood = "timeout 20 sh -c 'yes flood > /dev/ttyS0'; echo flooded"
        handle = flooder.commands.run(flood, background=True, user="root", timeout=0, **SLOW)
        assert handle.wait().stdout == "flooded\n"
        assert status_of(flooder) == 200
        memory = int(lab("grep -h VmRSS /proc/$(pgrep -of '[m]ica serve')/status | tr -dc 0-9"))
        assert memory < 512 * 1024, f"the daemon holds {memory} KiB"
    finally:
        flooder.kill(**SLOW)


def test_nothing_is_left_after_fifty_rounds():
    before = resources()

    def round_trip(_):
        sandbox = make("tiny-base")
        assert sandbox.kill(**SLOW) is True

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(round_trip, range(50)))
    settled(before)


def test_killing_a_sandbox_cuts_its_streams():
    sandbox = make("base")
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0, **SLOW)
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(handle.wait)
        assert sandbox.kill(**SLOW) is True
        assert waiting.exception(timeout=60) is not None


def test_a_killed_daemon_cleans_up_when_it_starts_again():
    sandbox = make("base")
    daemon = lab("pgrep -of '[m]ica serve'").strip()
    lab(f"kill -9 {daemon}")

    def restarted() -> bool:
        try:
            return api("GET", "/health")[0] in (200, 204) and lab("pgrep -of '[m]ica serve'").strip() != daemon
        except (OSError, AssertionError):
            return False

    wait_until("a new daemon answers", restarted)
    assert status_of(sandbox) == 404
    counts = resources()
    assert (counts["processes"], counts["cgroups"], counts["files"]) == (0, 0, 0), counts
    after = make("base")
    assert after.commands.run("echo again", timeout=PATIENCE_S, **SLOW).stdout == "again\n"
    after.kill(**SLOW)


def test_a_terminated_daemon_drains():
    sandbox = make("base")
    daemon = lab("pgrep -of '[m]ica serve'").strip()
    lab(f"kill -TERM {daemon}; timeout 60 tail --pid={daemon} -f /dev/null")
    left = "pgrep -x mica-vm | wc -l; find /sys/fs/cgroup/mica -mindepth 1 -type d | wc -l"

    def restarted() -> bool:
        try:
            return api("GET", "/health")[0] in (200, 204)
        except OSError:
            return False

    wait_until("a new daemon answers", restarted)
    assert lab(left).split() == ["0", "0"]
    assert status_of(sandbox) == 404
