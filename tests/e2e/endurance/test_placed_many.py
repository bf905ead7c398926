"""Two hundred sandboxes at once under `--memory bind`, on two memory nodes: no page on the wrong one.

What test_placement.py shows with a dozen. `MICA_E2E_PLACED` makes it more or fewer.
"""

import os

import pytest
from placed import check_bound, restart_with

PLACED = int(os.environ.get("MICA_E2E_PLACED", "200"))

# Each takes a few seconds to make and to end.
LONGEST_S = 7200


@pytest.mark.timeout(LONGEST_S)
def test_two_hundred_bound_sandboxes_have_no_page_on_the_wrong_node(tiny):
    restart_with("--memory", "bind")
    try:
        check_bound(tiny, PLACED)
    finally:
        restart_with()
