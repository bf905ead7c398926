"""Sandboxes restored from one saved state: what must differ between them, and what must be right at
once. The unmodified E2B SDK, real Linux guests."""

import json
import time

import pytest
from conftest import PATIENCE_S, lab, make, wait_until

SLOW = {"request_timeout": PATIENCE_S}

# Only names that the warm kernel has imported before it was saved, or asks the system for.
DRAWN = """
import json, os, random, secrets, uuid
import numpy
print(json.dumps({
    "random": random.random(),
    "numpy": numpy.random.rand(),
    "urandom": os.urandom(16).hex(),
    "secrets": secrets.token_hex(16),
    "uuid": str(uuid.uuid4()),
    "env": os.environ["E2B_SANDBOX_ID"],
    "own": os.environ.get("OWN"),
}))
"""

NAMES = """
hostname; cat /etc/machine-id; cat /run/e2b/.E2B_SANDBOX_ID; echo
printenv E2B_SANDBOX_ID; printenv OWN; head -c 16 /dev/urandom | od -An -tx1
grep -c 127.0.1.1 /etc/hosts; getent hosts "$(hostname)"; sudo -n id -un
"""


def cell(sandbox, code: str) -> str:
    execution = sandbox.run_code(code, timeout=PATIENCE_S, **SLOW)
    assert execution.error is None, execution.error
    return "".join(execution.logs.stdout)


def command(sandbox, line: str) -> str:
    return sandbox.commands.run(line, timeout=PATIENCE_S, **SLOW).stdout


class Clone:
    """A sandbox of the interpreter's template, and how long the client waited for it."""

    def __init__(self, own: str):
        begun = time.monotonic()
        self.sandbox = make("code-interpreter-v1", envs={"OWN": own})
        self.create_s = time.monotonic() - begun
        self.own = own
        self.uptime_s = float(command(self.sandbox, "cat /proc/uptime").split()[0])
        self.age_s = time.monotonic() - begun


@pytest.fixture(scope="module")
def clones():
    made = []
    try:
        for own in ("it's \"one\" $HOME", "two\nlines"):
            made.append(Clone(own))
        yield made
    finally:
        for clone in made:
            clone.sandbox.kill(**SLOW)


def test_they_were_running_before_they_were_made(clones):
    for clone in clones:
        # Its clock since boot is that of the saved state: boot, services, the warm kernel. A create
        # that booted the guest would have taken that long.
        saved_s = clone.uptime_s - clone.age_s
        assert saved_s > 0, "the guest is younger than its sandbox: it was booted, not restored"
        assert clone.create_s < saved_s / 4, (clone.create_s, saved_s)


def test_random_numbers_and_environment_differ_in_the_warm_kernel(clones):
    drawn = [json.loads(cell(clone.sandbox, DRAWN)) for clone in clones]
    one, two = drawn
    for name in one:
        assert one[name] != two[name], name
    for clone, values in zip(clones, drawn, strict=True):
        assert values["env"] == clone.sandbox.sandbox_id
        assert values["own"] == clone.own


def test_the_first_cell_is_the_first(clones):
    sandbox = make("code-interpreter-v1")
    try:
        execution = sandbox.run_code("_, Out, 6*7", timeout=PATIENCE_S, **SLOW)
        assert execution.execution_count == 1
        assert execution.text == "('', {}, 42)"
    finally:
        sandbox.kill(**SLOW)


def test_names_and_identity_differ_for_commands(clones):
    told = []
    for clone in clones:
        lines = command(clone.sandbox, NAMES).splitlines()
        sandbox_id = clone.sandbox.sandbox_id
        host, machine_id, file_id, env_id = lines[:4]
        assert host == file_id == env_id == sandbox_id
        assert len(machine_id) == 32 and int(machine_id, 16) > 0
        own = clone.own.split("\n")
        assert lines[4 : 4 + len(own)] == own
        drawn, hosts, entry, user = lines[4 + len(own) :]
        assert hosts == "1"
        assert entry.split() == ["127.0.1.1", sandbox_id]
        assert user == "root"
        told.append((host, machine_id, drawn))
    for one, two in zip(*told, strict=True):
        assert one != two


def test_the_wall_clock_is_the_hosts(clones):
    def host() -> float:
        return float(lab("date +%s.%N"))

    for clone in clones:
        for guest in (
            lambda c=clone: command(c.sandbox, "date +%s.%N"),
            lambda c=clone: cell(c.sandbox, "import time; print(time.time())"),
        ):
            # The guest reads its clock between the two readings of its host's. It is late by what the
            # agent took to hear the time: seconds, where a guest is emulated on a busy machine. What
            # was never told the time is late by the age of the snapshot.
            before, told, after = host(), float(guest()), host()
            assert before - 10 <= told <= after + 2, (before, told, after)


def test_a_process_of_one_is_not_in_the_other(clones):
    one, two = (clone.sandbox for clone in clones)
    cell(one, "x = 'of one'; open('/tmp/of-one', 'w').write(x)")
    assert cell(two, "import os; print('x' in dir(), os.path.exists('/tmp/of-one'))") == (
        "False False\n"
    )
    handle = one.commands.run("sleep 3600", background=True, **SLOW)
    wait_until(
        "the process is listed",
        lambda: handle.pid in [p.pid for p in one.commands.list(**SLOW)],
    )
    assert not [p for p in two.commands.list(**SLOW) if "sleep 3600" in " ".join(p.args)]
    assert one.commands.kill(handle.pid, **SLOW)
