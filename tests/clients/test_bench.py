"""`mica bench exec` against a daemon with the stand-in VM: every row, and a message where it cannot."""

import json
import os
import pathlib
import subprocess
import urllib.request

import pytest
import standin

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"])
OPERATIONS = {f"{work}_{clients}": clients for work in ("run_code", "command") for clients in (1, 10, 100)}


@pytest.fixture(scope="module")
def daemon():
    with standin.Daemon(PROGRAMS) as one:
        yield one


def bench(daemon, *options):
    words = [PROGRAMS / "mica-bench", "exec", "--url", daemon.url, "--api-key", daemon.api_key, *options]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)


def test_every_operation_has_a_row(daemon, tmp_path):
    ran = bench(daemon, "--calls", "20", "--sandboxes", "4", "--json", tmp_path / "rows")
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "rows").read_text())
    rows = {row["op"]: row for row in found["results"]}
    assert {op: row["clients"] for op, row in rows.items()} == OPERATIONS
    for op, row in rows.items():
        # Each client calls at least once.
        assert row["n"] == max(20, row["clients"]), row
        assert 0 < row["p50_us"] <= row["p95_us"] <= row["max_us"], row
        assert row["per_s"] > 0 and op in ran.stdout, row


def test_nothing_stays_and_failures_are_told(daemon):
    wrong = bench(daemon, "--template", "no-such-template")
    assert wrong.returncode == 1 and "gave 404" in wrong.stderr, wrong.stderr
    request = urllib.request.Request(f"{daemon.url}/v2/sandboxes", headers={"X-API-Key": daemon.api_key})
    assert json.load(urllib.request.urlopen(request, timeout=60)) == []
