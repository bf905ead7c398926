"""Where sandboxes are on a host with two memory nodes: `--memory bind` keeps every page on its node.

`MICA_E2E_PLACED` says how many sandboxes are made at once. What is counted is read from /proc of the
lab's host, for every VM process there is, those that wait in the pool included.
"""

import json
import os
import subprocess

import pytest
from conftest import MICA, PATIENCE_S, lab, make, run, wait_until

PLACED = int(os.environ.get("MICA_E2E_PLACED", "12"))

# Of these, so many run a program. Under emulation each takes seconds; the others have touched a few
# thousand pages when they come up.
BUSY_MAX = 12


def cpus(text: str) -> set:
    """A list such as 0-3,8."""
    found = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


@pytest.fixture
def serve_with():
    """Restarts the lab's daemon with options, and as it was afterwards."""
    yield restart_with
    restart_with()


def restart_with(*options):
    words = [MICA, "lab", "restart", "--", *options]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def vm_processes() -> list:
    """Of each VM process: number, lines of numa_maps, and where each of its threads may run."""
    text = lab(
        """
        for pid in $(pgrep -x mica-vm); do
          echo "process $pid"
          cat /proc/$pid/numa_maps 2>/dev/null | sed 's/^/map /' || true
          for task in /proc/$pid/task/*; do
            echo "thread $(cat $task/comm) $(sed -n 's/^Cpus_allowed_list:\\s*//p' $task/status)"
          done 2>/dev/null || true
        done
        """
    )
    found = []
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "process":
            found.append({"pid": int(rest), "maps": [], "threads": []})
        elif kind == "map":
            found[-1]["maps"].append(rest)
        else:
            name, _, allowed = rest.rpartition(" ")
            found[-1]["threads"].append((name, cpus(allowed)))
    # One that ended while it was looked at has nothing.
    return [process for process in found if process["maps"] and process["threads"]]


def pages(line: str) -> dict:
    """Pages by node of one line of numa_maps."""
    counts = (word.split("=") for word in line.split() if word.startswith("N") and "=" in word)
    return {int(node[1:]): int(count) for node, count in counts}


def is_of_the_program(line: str) -> bool:
    """Pages of the program file are shared by all, and lie where they were first read."""
    return "file=" in line and "mica-vm" in line


def node_of(process: dict, nodes: dict) -> int:
    """The one node on whose cores every thread of it may run."""
    found = set()
    for name, allowed in process["threads"]:
        assert allowed <= set(nodes), f"{name} may run outside of the vCPUs' cores"
        found |= {nodes[cpu] for cpu in allowed}
    assert len(found) == 1, f"a process may run on {found}"
    return found.pop()


def guests_map_copies(template: str, nodes: dict) -> bool:
    """Whether guests made now map their node's copy of the template's memory, on both nodes. Where memory
    is bound they wait for it; those of the daemon before may have mapped the file."""
    probes = [make(template) for _ in range(4)]
    try:
        processes = vm_processes()
    finally:
        for probe in probes:
            probe.kill(request_timeout=PATIENCE_S)
    lines = [line for process in processes for line in process["maps"]]
    if any("file=/var/lib/mica/" in line for line in lines):
        return False
    copies = [p for p in processes if any("mica-replica" in line for line in p["maps"])]
    return {node_of(process, nodes) for process in copies} == {0, 1}


def test_bound_sandboxes_have_no_page_on_the_wrong_node(serve_with, tiny):
    serve_with("--memory", "bind")
    plan = json.loads(lab("mica topology --memory bind --json"))["plan"]
    assert plan["memory"] == "bind"
    nodes = {cpu: place["node"] for place in plan["vcpus"] for cpu in place["cpus"]}
    assert set(nodes.values()) == {0, 1}
    wait_until("guests map copies", lambda: guests_map_copies(tiny, nodes), PATIENCE_S)
    sandboxes = [make(tiny) for _ in range(PLACED)]
    try:
        for sandbox in sandboxes[:BUSY_MAX]:
            # Touches memory of its own, and files.
            assert run(sandbox, "head -c 4000000 /dev/zero | md5sum; cat /bin/* > /dev/null")
        processes = vm_processes()
        assert len(processes) >= PLACED
        by_node = {0: 0, 1: 0}
        copies = {0: 0, 1: 0}
        wrong = []
        for process in processes:
            node = node_of(process, nodes)
            by_node[node] += 1
            for line in process["maps"]:
                if is_of_the_program(line):
                    continue
                copies[node] += pages(line).get(node, 0) if "mica-replica" in line else 0
                if any(other != node for other in pages(line)):
                    wrong.append((process["pid"], node, line))
        print(f"VM processes by node: {by_node}; pages of the template's copies: {copies}")
        assert not wrong, wrong[:5]
        assert all(by_node.values()), "creates went to one node only"
        assert all(copies.values()), "guests map their own node's copy"
    finally:
        for sandbox in sandboxes:
            sandbox.kill(request_timeout=PATIENCE_S)
