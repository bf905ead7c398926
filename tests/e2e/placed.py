"""Where VM processes are on a host with two memory nodes, read from /proc of the lab's host.

Called by the tests of placement. What is counted is of every VM process that there is, those that wait in
the pool included.
"""

import base64
import json
import os
import re
import struct
import subprocess
import time
import urllib.request

from conftest import MICA, PATIENCE_S, api, lab, make, run, template_folder, wait_until

STORE = "/var/lib/mica"

# A shard's I/O buffers: `--io-buffers` of them, 32 unless it is told otherwise, of a MiB each. Half of them are
# pinned when it starts.
BUFFERS_MIB = 32
MIB_PAGES = 256

# Of many sandboxes, so many run a program. Under emulation each takes seconds; the others have touched a
# few thousand pages when they come up.
BUSY_MAX = 12


def cpus(text: str) -> set:
    """A list such as 0-3,8."""
    found = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def restart_with(*options):
    words = [MICA, "lab", "restart", "--", *options]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def plan_of(*options) -> dict:
    return json.loads(lab(f"mica topology --json {' '.join(options)}"))["plan"]


def nodes_of(plan: dict) -> dict:
    """The node of each cpu that runs vCPUs."""
    nodes = {cpu: place["node"] for place in plan["vcpus"] for cpu in place["cpus"]}
    assert set(nodes.values()) == {0, 1}
    return nodes


def vm_processes(among: str = "$(pgrep -x mica-vm)") -> list:
    """Of each VM process: number, lines of numa_maps, and where each of its threads may run. One program
    reads all of them: under emulation to start one takes a tenth of a second."""
    text = lab(
        f"""
        pids="{among}"
        grep -s -H '' $(printf '/proc/%s/numa_maps ' $pids) || true
        grep -s -H -E '^(Name|Cpus_allowed_list):' $(printf '/proc/%s/task/*/status ' $pids) || true
        """
    )
    found: dict = {}
    for line in text.splitlines():
        file, _, rest = line.partition(":")
        words = file.split("/")
        # /proc/PID/numa_maps, or /proc/PID/task/THREAD/status.
        process = found.setdefault(int(words[2]), {"pid": int(words[2]), "maps": [], "threads": []})
        if words[-1] == "numa_maps":
            process["maps"].append(rest)
            continue
        name, _, value = rest.partition(":")
        if name == "Name":
            process["threads"].append((value.strip(), set()))
        else:
            process["threads"][-1] = (process["threads"][-1][0], cpus(value))
    # One that ended while it was looked at has nothing.
    return [process for process in found.values() if process["maps"] and process["threads"]]


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
    if any(f"file={STORE}/" in line for line in lines):
        return False
    copies = [p for p in processes if any("mica-replica" in line for line in p["maps"])]
    return {node_of(process, nodes) for process in copies} == {0, 1}


def wrong_lines(process: dict, node: int) -> list:
    """What it maps that has pages on another node than this."""
    own = (line for line in process["maps"] if not is_of_the_program(line))
    return [line for line in own if any(other != node for other in pages(line))]


def base_file(template: str) -> str:
    """The file of a template's memory."""
    return lab(f"ls {STORE}/snapshots/{os.path.basename(template_folder(template))}/memory.*").strip()


def put_in_cache(file: str, cpu: int) -> None:
    """Has the page cache hold all of a file, on the node of this cpu. Where nobody maps it."""
    lab(f"sync; echo 1 > /proc/sys/vm/drop_caches; taskset -c {cpu} cat {file} > /dev/null")


def read_all_memory(sandbox) -> None:
    """Has the guest read every page that it has, those that are free included."""
    head = run(sandbox, "head -c 65536 /proc/kcore | base64 -w 0", user="root")
    head = base64.b64decode(head)
    (offset,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    ranges = []
    for number in range(count):
        kind, _, at, _, physical, length = struct.unpack_from("<IIQQQQ", head, offset + number * size)
        # Where something is that is no memory, there is no physical address.
        if kind == 1 and physical < 1 << 46:
            ranges.append((at, length))
    assert ranges, "the guest's kernel shows no memory"
    for at, length in ranges:
        flags = f"iflag=skip_bytes,count_bytes skip={at} count={length}"
        run(sandbox, f"dd if=/proc/kcore of=/dev/null bs=1M status=none {flags}", user="root")


def metric(path: str, name: str, label: str) -> float | None:
    """The sum of the samples of a metric that have this label; None where there is none."""
    request = urllib.request.Request(
        os.environ["E2B_API_URL"] + path, headers={"X-API-Key": os.environ["E2B_API_KEY"]}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    values = re.findall(rf"^{name}{{(?:[^}}]*,)?{label}(?:,[^}}]*)?}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


def shown(sandbox_id: str) -> dict:
    """What /ui/state says of a sandbox."""
    status, state = api("GET", "/ui/state")
    assert status == 200, state
    return next(entry for entry in state["sandboxes"] if entry["id"] == sandbox_id)


def buffers(pid: int) -> list:
    """Of each mapping of I/O buffers of the daemon: its length in MiB, and pages by node. They are what it keeps
    from children and wants in huge pages. Two that lie side by side may be one mapping."""
    maps = lab(f"cat /proc/{pid}/numa_maps; echo; cat /proc/{pid}/smaps")
    by_node, _, mappings = maps.partition("\n\n")
    where = {int(line.split()[0], 16): pages(line) for line in by_node.splitlines()}
    found = []
    for line in mappings.splitlines():
        if begins := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in begins.groups())
        elif line.startswith("VmFlags:") and {"dc", "hg"} <= set(line.split()):
            found.append(((end - start) >> 20, where[start]))
    return found


def check_bound(template: str, count: int) -> None:
    """So many sandboxes at once, on a daemon that binds memory: no page of any VM process is on a node
    that is not its own, and each maps its own node's copy of the template."""
    nodes = nodes_of(plan_of("--memory bind"))
    wait_until("guests map copies", lambda: guests_map_copies(template, nodes), PATIENCE_S)
    begun = time.monotonic()
    sandboxes = []
    try:
        while len(sandboxes) < count:
            sandboxes.append(make(template))
            # While there are few: it touches memory of its own, and files.
            if len(sandboxes) <= BUSY_MAX:
                assert run(sandboxes[-1], "head -c 4000000 /dev/zero | md5sum; cat /bin/* > /dev/null")
        made_s = time.monotonic() - begun
        processes = vm_processes()
        assert len(processes) >= count
        seen, copies, wrong = {0: 0, 1: 0}, {0: 0, 1: 0}, []
        by_node = {0: 0, 1: 0}
        for process in processes:
            node = node_of(process, nodes)
            by_node[node] += 1
            wrong += [(process["pid"], node, line) for line in wrong_lines(process, node)]
            for line in process["maps"]:
                if is_of_the_program(line):
                    continue
                seen[node] += sum(pages(line).values())
                copies[node] += pages(line).get(node, 0) if "mica-replica" in line else 0
        print(f"{count} sandboxes made in {made_s:.0f} s; VM processes by node: {by_node}")
        print(f"pages looked at by node: {seen}; of them of the template's copies: {copies}")
        print(lab("grep -H MemFree /sys/devices/system/node/node*/meminfo"))
        assert not wrong, wrong[:5]
        assert all(by_node.values()), "creates went to one node only"
        assert all(copies.values()), "guests map their own node's copy"
    finally:
        for sandbox in sandboxes:
            sandbox.kill(request_timeout=PATIENCE_S)
