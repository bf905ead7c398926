"""What ten thousand streams that wait take of the daemon: more than a machine's limit of open files may allow, and
so counted in the lab. A guest has no part in it: the stand-in takes its place."""

import os
import re

from conftest import PATIENCE_S, lab

# 200 MB for all of them.
BYTES_EACH_MAX = 20_000
STREAMS = 10_000
# Each stream takes two threads of the stand-in, of which a sandbox has 64.
SANDBOXES = 400

BENCH = os.path.join(os.environ["MICA_BIN_DIR"], "bench-proxy")


def test_ten_thousand_idle_streams_of_each_kind_take_less_than_200_mb():
    with open(BENCH, "rb") as file:
        program = file.read()
    said = lab(
        "cat >/run/bench-proxy; chmod 755 /run/bench-proxy; ulimit -n; "
        "/run/bench-proxy --mica /opt/mica/bin/mica --standin /opt/mica/bin/standin-vm --requests 10 "
        f"--idle-streams {STREAMS} --sandboxes {SANDBOXES} --idle-bytes-max {BYTES_EACH_MAX}; rm /run/bench-proxy",
        stdin=program,
        timeout_s=3 * PATIENCE_S,
    )
    print(said)
    kinds = dict(re.findall(rf"^{STREAMS} (\w+) .* (\d+)$", said, re.M))
    assert sorted(kinds) == ["KeptAlive", "Response", "Switched"], said
    # Fewer would mean that they were not held.
    assert all(1_000 < int(each) <= BYTES_EACH_MAX for each in kinds.values()), kinds
