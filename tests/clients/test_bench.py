"""`mica bench exec` against a daemon with the stand-in VM: every row, what else takes its report, and a message where
it cannot. And the benchmarks that need no host: the proxy's bound on idle streams, and the registry's report.
"""

import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.request

import pytest
import standin

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"])
WORK = ("run_code", "command", "direct_get", "proxy_get")
OPERATIONS = {f"{work}_{clients}": clients for work in WORK for clients in (1, 10, 100)}
SERVER = "Answers every request with the same few bytes"


@pytest.fixture(scope="module")
def daemon():
    with standin.Daemon(PROGRAMS) as one:
        yield one


def bench(daemon, *options, url=None):
    words = [PROGRAMS / "mica-bench", "exec", "--url", url or daemon.url, "--api-key", daemon.api_key, *options]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)


def mica_bench(*words):
    words = [PROGRAMS / "mica-bench", *words]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=60)


def test_every_operation_has_a_row(daemon, tmp_path):
    ran = bench(daemon, "--calls", "20", "--sandboxes", "4", "--json", tmp_path / "rows")
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "rows").read_text())
    assert (found["format"], found["command"], found["complete"]) == ("mica-bench", "exec", True)
    work = ["run-code", "command", "get"]
    assert found["options"] == {"concurrency": [1, 10, 100], "sandboxes": 4, "calls": 20, "work": work}
    assert found["host"]["cores"] > 0 and found["target"]["daemon_pid"] == daemon.process.pid
    rows = {row["op"]: row for row in found["results"]}
    assert {op: row["clients"] for op, row in rows.items()} == OPERATIONS
    for op, row in rows.items():
        # Each client calls at least once.
        assert row["n"] == row["success"] == max(20, row["clients"]), row
        assert (row["concurrency"], row["failed"], row["errors"]) == (row["clients"], 0, [])
        times = [row[f"{name}_us"] for name in ("min", "p50", "p90", "p95", "p99", "max")]
        assert 0 < times[0] and times == sorted(times) and times[0] <= row["avg_us"] <= times[-1], row
        assert row["per_s"] == row["throughput_per_s"] > 0 and row["wall_us"] > 0 and op in ran.stdout, row
    for clients in (1, 10, 100):
        direct, proxied = (rows[f"{name}_get_{clients}"] for name in ("direct", "proxy"))
        added = proxied["p50_us"] - direct["p50_us"]
        assert abs(proxied["added_us"] - added) < 0.2 and "added_us" not in direct, (proxied, direct)
        assert f"added_us: {proxied['added_us']}" in ran.stdout
    assert SERVER not in subprocess.check_output(["ps", "-eo", "args"], text=True)


def test_the_computation_of_the_report_has_its_figure_beside_it(daemon, tmp_path):
    options = ("-c", "1,10", "--calls", "10", "--sandboxes", "2", "--work", "fibonacci", "-o", tmp_path / "rows")
    ran = bench(daemon, *options)
    assert ran.returncode == 0, ran.stderr
    rows = {row["op"]: row for row in json.loads((tmp_path / "rows").read_text())["results"]}
    assert {op: row["success"] for op, row in rows.items()} == {"fibonacci_1": 10, "fibonacci_10": 10}
    for op, per_s in (("fibonacci_1", 180.3), ("fibonacci_10", 1250.7)):
        seed = rows[op]["seed"]
        assert (seed["of"], seed["hardware"], seed["per_s"]) == ("SoulBox", "other hardware", per_s)


def test_its_report_is_compared_and_drawn(daemon, tmp_path):
    report, worse, page = (tmp_path / name for name in ("report.json", "worse.json", "page.html"))
    ran = bench(daemon, "-c", "1,2", "--calls", "4", "--sandboxes", "2", "-o", report)
    assert ran.returncode == 0, ran.stderr
    assert mica_bench("compare", report, report).returncode == 0
    document = json.loads(report.read_text())
    document["results"][0]["throughput_per_s"] /= 2
    worse.write_text(json.dumps(document))
    compared = mica_bench("compare", report, worse)
    assert compared.returncode == 1 and "FAILED run_code_1: per s went from" in compared.stdout, compared.stdout
    drawn = mica_bench("report", report, "--html", page)
    assert drawn.returncode == 0, drawn.stderr
    for name in ("run code", "command", "proxy get", "direct get"):
        for figure in ("latency", "throughput"):
            assert f"{name}: {figure} against concurrency" in page.read_text()


def forward_slowly(target):
    """A port that leads to `target` as one that QEMU forwards: room for one connection that waits, taken slowly."""
    front = socket.create_server(("127.0.0.1", 0), backlog=1)

    def pump(source, sink):
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve():
        while True:
            try:
                client, _ = front.accept()
            except OSError:
                return
            time.sleep(0.02)
            server = socket.create_connection(target)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return front


def test_a_port_with_room_for_one_is_enough(daemon):
    host, port = daemon.url.removeprefix("http://").split(":")
    with forward_slowly((host, int(port))) as front:
        url = f"http://127.0.0.1:{front.getsockname()[1]}"
        ran = bench(daemon, "--calls", "10", "--sandboxes", "4", url=url)
    assert ran.returncode == 0, ran.stderr


def test_nothing_stays_and_failures_are_told(daemon):
    wrong = bench(daemon, "--template", "no-such-template")
    assert wrong.returncode == 1 and "gave 404" in wrong.stderr, wrong.stderr
    request = urllib.request.Request(f"{daemon.url}/v2/sandboxes", headers={"X-API-Key": daemon.api_key})
    assert json.load(urllib.request.urlopen(request, timeout=60)) == []


def test_idle_streams_are_held_to_a_bound():
    words = [
        *(PROGRAMS / "bench-proxy", "--mica", PROGRAMS / "mica", "--standin", PROGRAMS / "standin-vm"),
        *("--requests", "10", "--sandboxes", "2", "--idle-streams", "100", "--idle-bytes-max"),
    ]

    def held_to(most):
        ran = [*words, most]
        return subprocess.run(list(map(str, ran)), capture_output=True, text=True, check=False, timeout=120)

    over = held_to(1)
    assert over.returncode == 1 and "idle streams take too much: KeptAlive" in over.stderr, over.stderr
    # The others are measured all the same.
    assert "100 Switched" in over.stdout, over.stdout
    within = held_to(1 << 20)
    assert within.returncode == 0, within.stderr
    words[words.index("--idle-streams") + 1] = "0"
    nothing = held_to(1)
    assert nothing.returncode == 1 and "--idle-streams above 0" in nothing.stderr, nothing.stderr


def test_what_the_proxy_adds_is_held_to_a_bound():
    words = [
        *(PROGRAMS / "bench-proxy", "--mica", PROGRAMS / "mica", "--standin", PROGRAMS / "standin-vm"),
        *("--requests", "100", "--added-us-max"),
    ]

    def held_to(most):
        ran = [*words, most]
        return subprocess.run(list(map(str, ran)), capture_output=True, text=True, check=False, timeout=120)

    over = held_to("0.001")
    assert over.returncode == 1 and "the proxy adds" in over.stderr and "0.001 may be" in over.stderr, over.stderr
    within = held_to("1000000")
    assert within.returncode == 0 and "through the proxy" in within.stdout, within.stderr


def test_the_registrys_report_is_as_the_engines_and_is_compared(tmp_path):
    report, worse, page = (tmp_path / name for name in ("report.json", "worse.json", "page.html"))
    ran = mica_bench("registry", "--batches", "3", "-o", report)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(report.read_text())
    assert (found["format"], found["version"], found["command"]) == ("mica-bench", 1, "registry")
    assert (found["options"], found["complete"]) == ({"batches": 3, "rounds": 9}, True) and found["host"]["cores"] > 0
    rows = {row["op"]: row for row in found["results"]}
    assert len(rows) == 11
    for op, row in rows.items():
        assert (row["n"], row["success"], row["failed"], row["errors"]) == (3, 3, 0, []), row
        # A choice takes nothing of the allocator; of anything else that is not counted.
        of_choices = "Allocate" in op and "Parallel" not in op
        assert row["allocations"] == (0 if of_choices else None) and len(row["of_rounds"]) == 3, row
        times = [row[f"{name}_ns"] for name in ("min", "p50", "p90", "p95", "p99", "max")]
        assert 0 < times[0] and times == sorted(times) and times[0] <= row["avg_ns"] <= times[-1], row
        seed = row["seed"]
        assert (seed["of"], seed["hardware"]) == ("Fast Sandbox", "other hardware") and seed["avg_ns"] > 0
        assert op in ran.stdout
    assert rows["BenchmarkRegistryAllocate"]["seed"]["avg_ns"] == 1312
    by_its_old_name = mica_bench("registry", "--batches", "1", "--json", worse)
    assert by_its_old_name.returncode == 0 and json.loads(worse.read_text())["options"]["batches"] == 1
    same = mica_bench("compare", report, report)
    assert same.returncode == 0 and "BenchmarkRegistryRelease" in same.stdout, same.stderr
    rows["BenchmarkRegistryRelease"]["p95_ns"] *= 2
    worse.write_text(json.dumps(found))
    compared = mica_bench("compare", report, worse)
    assert compared.returncode == 1, compared.stdout
    assert "FAILED BenchmarkRegistryRelease: p95 went from" in compared.stdout, compared.stdout
    assert mica_bench("report", report, "--html", page).returncode == 0
    assert "BenchmarkParallelAllocate" in page.read_text()
