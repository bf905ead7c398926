"""Where sandboxes are on a host with two memory nodes.

A dozen sandboxes; endurance/test_placed_many.py makes two hundred.
"""

import os

import pytest
from conftest import PATIENCE_S, api, make, run
from inside import process_of
from placed import (
    base_file,
    check_bound,
    node_of,
    nodes_of,
    plan_of,
    put_in_cache,
    read_all_memory,
    restart_with,
    vm_processes,
    wrong_lines,
)

PLACED = 12


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    yield
    restart_with()


@pytest.fixture(scope="module")
def bound():
    """A daemon that binds memory, and the nodes of its vCPUs' cpus."""
    restart_with("--memory", "bind")
    return nodes_of(plan_of("--memory bind"))


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
