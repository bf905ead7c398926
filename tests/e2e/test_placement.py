"""Where sandboxes and the daemon's buffers are on a host with two memory nodes, and what is counted of it.

A dozen sandboxes; endurance/test_placed_many.py makes two hundred. The daemon is restarted with other options
twice: each fixture of one serves the tests after it, in the order of this file.
"""

import os

import pytest
from conftest import PATIENCE_S, api, lab, make, run, wait_until
from inside import daemon, process_of
from placed import (
    BUFFERS_MIB,
    MIB_PAGES,
    base_file,
    buffers,
    check_bound,
    metric,
    node_of,
    nodes_of,
    plan_of,
    put_in_cache,
    read_all_memory,
    restart_with,
    shown,
    vm_processes,
    wrong_lines,
)

PLACED = 12

# How long a look at a sandbox may be away: each has one in half a minute, and the lab is slow.
LOOK_S = 180


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    yield
    restart_with()


@pytest.fixture(scope="module")
def bound():
    """A daemon that binds memory, and the nodes of its vCPUs' cpus."""
    restart_with("--memory", "bind")
    return nodes_of(plan_of("--memory bind"))


@pytest.fixture(scope="module")
def uneven():
    """The same with a shard on node 0 and two on node 1, and no room for copies of templates; its plan."""
    restart_with("--memory", "bind", "--shard-cpus", "0,2-3", "--replica-budget-mib", "1")
    return plan_of("--memory bind --shard-cpus 0,2-3")


@pytest.fixture
def made():
    """Makes sandboxes that go with the test."""
    all_made = []

    def one(template):
        all_made.append(make(template))
        return all_made[-1]

    yield one
    for sandbox in all_made:
        sandbox.kill(request_timeout=PATIENCE_S)


def node_of_sandbox(sandbox, nodes: dict) -> tuple:
    """Its process, and the node that it belongs to."""
    (process,) = vm_processes(str(process_of(sandbox.sandbox_id)))
    return process, node_of(process, nodes)


def counted(what: str, sandbox_id: str) -> float | None:
    return metric("/metrics/sandboxes", f"mica_sandbox_{what}", f'sandbox="{sandbox_id}"')


def test_bound_sandboxes_have_no_page_on_the_wrong_node(bound, tiny):
    check_bound(tiny, PLACED)


def test_a_rollback_maps_its_nodes_copy_and_not_the_file(bound, tiny, made):
    """What lies in the page cache of the other node is not what a guest that goes back gets."""
    box = made(tiny)
    _, node = node_of_sandbox(box, bound)
    snapshots = []
    # In the second snapshot are pages that the first has not; they are written again, so that they are
    # mapped from the second and then from below both.
    for command in ("true", "head -c 4M /dev/urandom > /dev/shm/pages"):
        run(box, command)
        snapshots.append(box.create_snapshot(request_timeout=PATIENCE_S).snapshot_id)
    run(box, "head -c 4M /dev/urandom | dd of=/dev/shm/pages bs=64k conv=notrunc status=none")
    file = base_file(tiny)
    put_in_cache(file, next(cpu for cpu, other in bound.items() if other != node))
    for snapshot in reversed(snapshots):
        status, body = api("POST", f"/sandboxes/{box.sandbox_id}/rollback", {"snapshotID": snapshot})
        assert status == 200, body
    read_all_memory(box)
    process, now = node_of_sandbox(box, bound)
    assert now == node
    wrong = wrong_lines(process, node)
    assert not wrong, wrong[:5]
    mapped = [line for line in process["maps"] if os.path.basename(file) in line]
    assert not mapped, mapped[:5]


def test_time_on_the_wrong_node_is_counted(bound, tiny, made):
    """Threads of a guest's vCPUs are put on the other node's core, where no sandbox of this shard may be."""
    away, near = made(tiny), made(tiny)
    for box in (away, near):
        run(box, "nohup sh -c 'while :; do :; done' > /dev/null 2>&1 &")
    process, node = node_of_sandbox(away, bound)
    other = next(cpu for cpu, of in bound.items() if of != node)
    lab(
        f"""
        for task in /proc/{process["pid"]}/task/*; do
          case $(cat $task/comm) in vcpu-*) taskset -p -c {other} ${{task##*/}};; esac
        done
        """
    )
    elsewhere = lambda: counted("wrong_node_cpu_seconds", away.sandbox_id) or 0  # noqa: E731
    wait_until("its time on the other node is counted", lambda: elsewhere() > 0, LOOK_S)
    state = shown(away.sandbox_id)
    assert state["node"] == node
    assert state["wrong_node_cpu_s"] > 0
    assert metric("/metrics", "mica_vm_wrong_node_cpu_seconds", f'node="{node}"') > 0
    # Its memory is where it was, and a guest that may only run on its own node never ran elsewhere.
    assert state["wrong_node_pages"] == 0
    known = lambda: counted("wrong_node_cpu_seconds", near.sandbox_id) is not None  # noqa: E731
    wait_until("the other was looked at, too", known, LOOK_S)
    assert counted("wrong_node_cpu_seconds", near.sandbox_id) == 0
    assert shown(near.sandbox_id)["wrong_node_cpu_s"] == 0


def test_buffers_lie_on_the_nodes_of_their_shards(uneven):
    shards = {node: sum(s["memory_node"] == node for s in uneven["shards"]) for node in (0, 1)}
    assert shards == {0: 1, 1: 2}
    found = buffers(int(daemon()))
    print(f"I/O buffers, MiB and pages by node: {found}")
    assert sum(length for length, _ in found) == BUFFERS_MIB * sum(shards.values())
    for node, count in shards.items():
        here = sum(where.get(node, 0) for _, where in found)
        pinned = count * BUFFERS_MIB * MIB_PAGES // 2
        assert pinned <= here <= 2 * pinned, f"{here} pages on node {node} for {count} shards"


def test_pages_on_the_wrong_node_are_counted(uneven, tiny, made):
    """Without a copy the file is mapped, and that lies on node 0."""
    nodes = nodes_of(uneven)
    put_in_cache(base_file(tiny), 0)
    boxes = [made(tiny) for _ in range(6)]
    placed = {box.sandbox_id: node_of_sandbox(box, nodes) for box in boxes}
    afar = [sandbox for sandbox, (process, node) in placed.items() if wrong_lines(process, node)]
    print(f"{len(afar)} of {len(boxes)} have pages on a wrong node")
    assert afar and all(placed[sandbox][1] == 1 for sandbox in afar)
    for sandbox in afar:
        count = lambda: counted("wrong_node_pages", sandbox) or 0  # noqa: E731, B023
        wait_until(f"the pages of {sandbox} are counted", lambda: count() > 0, LOOK_S)  # noqa: B023
        assert shown(sandbox)["wrong_node_pages"] > 0
    assert metric("/metrics", "mica_vm_wrong_node_pages", 'node="1"') > 0
