"""Where sandboxes are on a host with two memory nodes.

A dozen sandboxes; endurance/test_placed_many.py makes two hundred.
"""

import pytest
from placed import check_bound, nodes_of, plan_of, restart_with

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


def test_bound_sandboxes_have_no_page_on_the_wrong_node(bound, tiny):
    check_bound(tiny, PLACED)
