"""Every table of `mica bench` once through, with tiny counts, against a daemon with the stand-in VM: its rows are
there, its counts are right, and nothing is left on the host. And what is made of the reports: the gate, the page,
two daemons in turns.
"""

import html.parser
import json
import os
import pathlib
import signal
import subprocess
import time
import urllib.request

import pytest
import standin

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"])
PERCENTILES = ("min_us", "p50_us", "p90_us", "p95_us", "p99_us", "max_us")
# Options, and the rows that must come of them: operation and case, and how many times it is measured.
TABLES = {
    "create": (
        ["-c", "1,3", "-n", "2,6", "-w", "1", "-t", "base"],
        {("create", "c=1"): 2, ("create", "c=3"): 6},
    ),
    "create -m create-delete": (
        ["-c", "2", "-n", "4", "-w", "0", "-m", "create-delete", "-t", "base"],
        {("create", "c=2"): 4, ("delete", "c=2"): 4},
    ),
    "density --after code": (
        ["--live", "1,2", "-c", "2", "--reserve", "64", "--settle", "0.2", "--after", "code"],
        {("density_after_code", f"live={n}"): made for n, made in ((0, 0), (1, 1), (2, 1))},
    ),
    "density": (
        ["--live", "2,3", "-c", "2", "--reserve", "64", "--settle", "0.2", "-t", "base"],
        {("density", "live=0"): 0, ("density", "live=2"): 2, ("density", "live=3"): 1},
    ),
    "snapshot": (
        ["-c", "1,2", "-n", "2", "-s", "0", "-t", "base"],
        {("snapshot", "c=1"): 2, ("snapshot", "c=2"): 4},
    ),
    "dirty": (
        ["-d", "0,2", "-n", "1", "-s", "0", "-t", "base", "--store", "STORE"],
        {(op, f"d={size}"): 1 for size in (0, 2) for op in ("snapshot_dirty", "create_from_dirty")},
    ),
    "from-snapshot": (["-c", "2", "-n", "2", "-s", "0", "-t", "base"], {("from_snapshot", "c=2"): 4}),
    "rollback": (["-c", "1,2", "-n", "1", "-s", "0", "-t", "base"], {("rollback", f"c={n}"): n for n in (1, 2)}),
    "rollback --dirty": (
        ["-c", "1,2", "-n", "1", "-s", "0", "-d", "1", "-t", "base"],
        {("rollback", f"c={n} d=1"): n for n in (1, 2)},
    ),
    "clone": (
        ["-n", "1,3", "-c", "1,2", "--rounds", "1", "-s", "0", "-t", "base"],
        {
            ("clone", "n=1 c=1"): 1,
            ("clone_request", "n=1"): 1,
            ("clone", "n=3 c=2"): 3,
            ("clone_request", "n=3"): 1,
        },
    ),
    "clone --dirty": (
        ["-n", "1", "-c", "1", "--rounds", "1", "-s", "0", "-d", "1", "-t", "base", "--way", "client"],
        {("clone", "n=1 c=1 d=1"): 1},
    ),
    "pause-resume": (
        ["-c", "1,2", "-n", "2", "-s", "0", "-t", "base"],
        {(op, f"c={n}"): 2 * n for op in ("pause", "resume") for n in (1, 2)},
    ),
    "languages": (
        ["-l", "python,bash,r,go,java", "-n", "1", "--cells", "2"],
        {
            (f"{op}_{language}", ""): counts
            for language in ("python", "bash")
            # Memory has bytes, and no times.
            for op, counts in (("cold_hello", 1), ("first_hello", 1), ("hello", 2), ("fibonacci", 2), ("memory", 0))
        },
    ),
    "load-levels --request get": (
        ["-r", "5,20", "--seconds", "1", "--request", "get", "--sandboxes", "2", "-c", "4", "-t", "base"],
        {("load", "5/s"): 5, ("load", "20/s"): 20},
    ),
    "load-levels --request execute": (
        ["-r", "10", "--seconds", "1", "--request", "execute", "--sandboxes", "2", "-c", "4"],
        {("load", "10/s"): 10},
    ),
}


# What SoulBox's figures are called wherever they are shown: nobody measured them.
TARGET = "stated target, not measured; other hardware"
# What the reports say of a row, and whose it is: one of the figures that are printed beside the row.
SEEDS = {
    ("create", "c=1"): ("CubeSandbox", "avg_ms", 47.8),
    ("snapshot", "c=1"): ("CubeSandbox", "wall_avg_ms", 49.8),
    ("snapshot_dirty", "d=0"): ("CubeSandbox", "avg_ms", 45.7),
    ("create_from_dirty", "d=0"): ("CubeSandbox", "avg_ms", 64.8),
    ("rollback", "c=1"): ("CubeSandbox", "wall_avg_ms", 81.6),
    ("pause", "c=1"): ("CubeSandbox", "wall_avg_ms", 558.4),
    ("resume", "c=1"): ("CubeSandbox", "wall_avg_ms", 41.8),
    ("clone", "n=1 c=1"): ("CubeSandbox", "wall_avg_ms", 219.6),
    ("density_after_code", "live=1"): ("SoulBox", "total_mb", 128.0),
    ("cold_hello_python", ""): ("SoulBox", "p95_ms", 120.0),
    ("memory_python", ""): ("SoulBox", "overhead_mb", 32.0),
    ("load", "10/s"): ("SoulBox", "cpu_percent", 8.0),
}
# Tables whose work is none that a report has figures of: another size, another request.
WITHOUT_SEEDS = ("create -m create-delete", "rollback --dirty", "clone --dirty", "load-levels --request get")
# What the daemon goes through in what a row times, and in nothing else that its rounds do.
RESTORE = ["layers", "pool", "ready", "route", "run", "state"]
SNAPSHOT = ["commit", "copy", "freeze", "scan", "sync", "write"]
PHASES = {
    "create": ("create", RESTORE),
    "from_snapshot": ("restore", RESTORE),
    "create_from_dirty": ("restore", RESTORE),
    "clone": ("restore", RESTORE),
    "clone_request": ("clone", ["copies", "snapshot"]),
    "snapshot": ("snapshot", SNAPSHOT),
    "snapshot_dirty": ("snapshot", SNAPSHOT),
    "pause": ("pause", SNAPSHOT),
    "resume": ("resume", ["layers", "pool", "ready", "run", "state"]),
    "rollback": ("rollback", ["freeze", "plan", "ready", "run", "state"]),
}
# Whether this machine, which is the stand-in's guest, has them is not known here.
OPTIONAL_LANGUAGES = ("r", "go", "java")
# Plots that a table's page must have.
PLOTS = {
    "create": "create: latency against concurrency",
    "dirty": "snapshot time against dirty memory",
    "density": "memory against live sandboxes",
    "density --after code": "memory against live sandboxes, after code",
    "snapshot": "what the daemon spends the time of one on",
}


@pytest.fixture(scope="module")
def daemon():
    with standin.Daemon(PROGRAMS) as one:
        yield one


def start(daemon, *words):
    words = [PROGRAMS / "mica-bench", *words, "--url", daemon.url, "--api-key", daemon.api_key]
    return subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=daemon.directory
    )


def bench(daemon, *words):
    process = start(daemon, *words)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def ask(daemon, path):
    request = urllib.request.Request(f"{daemon.url}{path}", headers={"X-API-Key": daemon.api_key})
    return json.load(urllib.request.urlopen(request, timeout=60))


def nothing_is_left(daemon):
    assert ask(daemon, "/v2/sandboxes?state=running,paused") == []
    assert ask(daemon, "/snapshots") == []
    assert not list(pathlib.Path("/dev/shm").glob("mica-bench-*"))


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_its_rows_and_leaves_nothing(daemon, tmp_path, table):
    options, wanted = TABLES[table]
    options = [daemon.directory / "store" if word == "STORE" else word for word in options]
    report, page = tmp_path / "report.json", tmp_path / "page.html"
    code, out, error = bench(daemon, table.split()[0], *options, "-o", report, "--html", page)
    assert code == 0, error
    found = json.loads(report.read_text())
    assert (found["format"], found["version"], found["complete"]) == ("mica-bench", 1, True)
    assert found["host"]["cores"] > 0 and found["target"]["is_local"] is True
    assert found["target"]["daemon_pid"] == daemon.process.pid
    rows = {(row["op"], row["case"]): row for row in found["results"]}
    optional = {key for key in rows if key[0].rpartition("_")[2] in OPTIONAL_LANGUAGES}
    assert {key: row["success"] for key, row in rows.items() if key not in optional} == wanted
    for (op, case), row in rows.items():
        assert (row["n"], row["failed"], row["errors"]) == (row["success"], 0, []), row
        assert op in out and case in out
        if row["n"]:
            times = [row[name] for name in PERCENTILES]
            assert times[0] > 0 and times == sorted(times), row
            assert times[0] <= row["avg_us"] <= times[-1], row
            assert 0 <= row["stddev_us"] <= times[-1] - times[0], row
            assert row["wall_us"] > 0 and row["throughput_per_s"] > 0, row
        phases = row.get("phases", [])
        spent = sorted((phase["operation"], phase["phase"]) for phase in phases)
        operation, names = PHASES.get(op, (None, []))
        assert spent == [(operation, name) for name in names], row
        assert all(phase["avg_us"] >= 0 and phase["count"] >= row["success"] for phase in phases), row
    if table in WITHOUT_SEEDS:
        assert all(row["seed"] is None for row in rows.values()), rows
    else:
        seeds(rows, out, page.read_text())
    check(table, rows, out)
    well_formed(page.read_text())
    if table in PLOTS:
        assert f"<figcaption>{PLOTS[table]}</figcaption>" in page.read_text()
    nothing_is_left(daemon)


def seeds(rows, out, page):
    """The figures of reports, in the rows, in what is printed and on the page."""
    for key, (of, name, figure) in SEEDS.items():
        if key not in rows:
            continue
        seed = rows[key]["seed"]
        assert (seed["of"], seed["hardware"], seed[name]) == (of, "other hardware", figure), key
        words = [key[0], *key[1].split()]
        line = next(line for line in out.splitlines() if line.split()[: len(words)] == words)
        standing = TARGET if of == "SoulBox" else "other hardware"
        assert seed["standing"] == standing, key
        whose = f"{of} ({TARGET}): " if of == "SoulBox" else f"{of}: "
        assert whose in line and whose in page, line
        # All that are published, and not one of them alone.
        figures = {name: value for name, value in seed.items() if not isinstance(value, str)}
        assert figures[name] == figure and all(
            f"{value:g} {name.replace('_', ' ')}" in line.split(whose)[1] for name, value in figures.items()
        ), line


def check(table, rows, out):
    """What only one table has."""
    if table.split()[0] == "create":
        for row in (row for (op, _), row in rows.items() if op == "create"):
            daemon_us, vms_us = (row[f"{who}_cpu_us_per_create"] for who in ("daemon", "vms"))
            # To start a VM process and an agent takes more than a moment.
            assert daemon_us > 0 and vms_us > 100, row
            assert abs(row["cpu_us_per_create"] - daemon_us - vms_us) < 0.2, row
    if table == "density":
        assert all(row["mem_available_bytes"] > 0 for row in rows.values())
        assert [row["sandboxes"] for row in rows.values()] == [0, 2, 3]
        assert all(isinstance(rows["density", f"live={n}"]["bytes_per_sandbox"], int) for n in (2, 3))
    if table == "dirty":
        snapshot = rows["snapshot_dirty", "d=2"]
        # The stand-in's memory is not its agent's: the snapshot holds a few pages that it writes itself.
        assert snapshot["dirty_mb"] == 2 and snapshot["snapshot_bytes"] > 0
    if table == "languages":
        for language in OPTIONAL_LANGUAGES:
            of_it = [rows[f"{op}_{language}", ""] for op in ("cold_hello", "first_hello", "hello", "fibonacci")]
            has_it = of_it[1]["success"] == 1
            assert [row["success"] for row in of_it] == ([1, 1, 2, 2] if has_it else [0] * 4), of_it
            # No row is without figures and without a reason.
            for row in (*of_it, rows[f"memory_{language}", ""]):
                assert ("missing" not in row) if has_it else (row["missing"] and row["seed"] is None), row
        memory = rows["memory_python", ""]
        assert memory["sandboxes"] == 1 and memory["bytes_before"] > 0
        assert memory["bytes_overhead"] == memory["bytes"] - memory["bytes_before"]
        cold, first = (rows[f"{op}_hello_python", ""]["p50_us"] for op in ("cold", "first"))
        assert cold > first
    if table.split()[0] == "load-levels":
        for row in rows.values():
            assert row["daemon_cpu_percent"] >= 0 and row["daemon_cpu_us_per_request"] > 0
            for name in ("cpu_percent", "cpu_us_per_request", "idle_percent"):
                both = row[f"daemon_{name}"] + row[f"vms_{name}"]
                # Each is rounded by itself.
                assert abs(row[name] - both) < (0.2 if name.endswith("request") else 0.02), (name, row)
                for shown in (name, f"daemon_{name}", f"vms_{name}"):
                    assert f"  {shown}: {row[shown]}" in out, (shown, out)
            if table.endswith("execute"):
                # A kernel that computes is not the daemon's work.
                assert row["vms_cpu_us_per_request"] > 100, row
            # A request cannot take less than from when it was sent.
            assert row["p50_us"] >= row["service_p50_us"]
            assert 0.7 < row["wall_us"] / 1e6 < 5


class Tags(html.parser.HTMLParser):
    """Fails where an element is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, _):
        self.open.append(tag)

    def handle_startendtag(self, tag, _):
        """Opens nothing."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "<script" not in page and "src=" not in page


def test_cube_table_is_markdown_and_nothing_else(daemon):
    options = ["-c", "1", "-n", "2", "-w", "0", "-t", "base", "--cube-table"]
    code, out, error = bench(daemon, "create", *options)
    assert code == 0, error
    lines = [line for line in out.splitlines() if line]
    assert lines[0] == "Create from template:"
    assert lines[1].startswith("| Concurrency | Requests | avg | min | p95 | max |")
    assert lines[3].startswith("| 1 | 2 | ") and len(lines) == 4
    code, out, _ = bench(daemon, "create", *options, "--no-header")
    assert code == 0 and out.startswith("| 1 | 2 | ")


def test_failures_are_told_and_nothing_stays(daemon, tmp_path):
    code, _, error = bench(daemon, "create", "-c", "1", "-n", "1", "-t", "no-such-template")
    assert code == 1 and "gave 404" in error, error
    # Without a warm-up each failure is counted.
    report = tmp_path / "report.json"
    words = ["-c", "2", "-n", "3", "-w", "0", "-t", "no-such-template", "-o", report]
    code, out, error = bench(daemon, "create", *words)
    assert code == 1 and "3 requests failed" in error and "gave 404" in out, error
    [row] = json.loads(report.read_text())["results"]
    assert (row["n"], row["success"], row["failed"], row["p50_us"]) == (3, 0, 3, None)
    assert sum(one["count"] for one in row["errors"]) == 3
    nothing_is_left(daemon)


def test_a_run_that_is_interrupted_cleans_up(daemon, tmp_path):
    report = tmp_path / "report.json"
    process = start(daemon, "create", "-c", "2", "-n", "5000", "-w", "0", "-t", "base", "-o", report)
    end = time.monotonic() + 60
    while len(ask(daemon, "/v2/sandboxes")) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "interrupted" in error, error
    assert json.loads(report.read_text())["complete"] is False
    nothing_is_left(daemon)


def test_compare_is_a_gate_and_report_joins_runs(daemon, tmp_path):
    one, other, page = (tmp_path / name for name in ("one.json", "other.json", "page.html"))
    code, _, error = bench(daemon, "create", "-c", "1,2", "-n", "2", "-w", "0", "-t", "base", "-o", one)
    assert code == 0, error

    def mica_bench(*words):
        words = [PROGRAMS / "mica-bench", *words]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=60)

    assert mica_bench("compare", one, one).returncode == 0
    document = json.loads(one.read_text())
    document["results"][0]["p95_us"] *= 2
    other.write_text(json.dumps(document))
    worse = mica_bench("compare", one, other)
    assert worse.returncode == 1 and "FAILED create c=1: p95 went from" in worse.stdout, worse.stdout
    assert mica_bench("compare", other, one).returncode == 0
    assert mica_bench("compare", one, other, "--p95", "2.5").returncode == 0
    del document["results"][1]
    other.write_text(json.dumps(document))
    gone = mica_bench("compare", one, other, "--p95", "2.5")
    assert gone.returncode == 1 and "create c=2: the second run has no such row" in gone.stdout
    assert mica_bench("report", one, other, "--html", page).returncode == 0
    well_formed(page.read_text())
    assert "latency against concurrency" in page.read_text()


def test_two_daemons_run_in_turns(tmp_path):
    report, place, marks, second = (tmp_path / name for name in ("ab.json", "place", "marks", "second"))
    mount, _ = standin.cgroup_mount()
    others = set(mount.glob("mica-ab-*"))
    # Another program, that says what it was started for and with which number.
    second.write_text(f"#!/bin/sh\necho $$ $1 >> '{marks}'\nexec '{PROGRAMS}/mica' \"$@\"\n")
    second.chmod(0o755)
    words = [
        *(PROGRAMS / "mica-bench", "ab", "--a", PROGRAMS / "mica", "--b", second, "--blocks", "2", "-o", report),
        *("--directory", place, "--a-serve-args=--shards 1", "--b-serve-args=--shards 1 --pool-min 0 --pool-max 0"),
        *("--", "create", "-c", "1", "-n", "3", "-w", "0"),
    ]
    ran = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(report.read_text())
    rows = {row["op"]: row for row in document["results"]}
    assert set(rows) == {"create c=1", "daemon_cpu_per_request"}
    assert [turn["side"] for turn in document["turns"]] == list("ABBABAAB")
    started = [line.split() for line in marks.read_text().splitlines()]
    assert [word for _, word in started] == ["template", "serve"]
    of = {side: {turn["daemon_pid"] for turn in document["turns"] if turn["side"] == side} for side in "AB"}
    assert of["B"] == {int(started[1][0])} and len(of["A"]) == 1 and of["A"] != of["B"]
    # Ratios of two daemons are no run that a gate could hold against another.
    gate = subprocess.run(
        list(map(str, (PROGRAMS / "mica-bench", "compare", report, report))), capture_output=True, text=True, check=False
    )
    assert gate.returncode == 1 and "nothing to compare in a report of ab" in gate.stderr, gate.stdout
    for row in rows.values():
        assert row["a_median_us"] > 0 and row["b_median_us"] > 0, row
        assert row["ci95_low"] <= row["ratio"] <= row["ci95_high"], row
        assert row["op"] in ran.stdout
    assert not place.exists()
    assert set(mount.glob("mica-ab-*")) <= others


def test_two_configurations_of_one_program_run_in_turns(tmp_path):
    report, marks, program = (tmp_path / name for name in ("report.json", "marks", "program"))
    program.write_text(f"#!/bin/sh\necho $$ \"$@\" >> '{marks}'\nexec '{PROGRAMS}/mica' \"$@\"\n")
    program.chmod(0o755)
    words = [
        *(PROGRAMS / "mica-bench", "ab", "--a", program, "--a-args=--metrics off", "--b-args=--metrics on"),
        *("--blocks", "1", "--directory", tmp_path / "place", "-o", report),
        *("--", "load-levels", "--request", "health", "-r", "200", "--seconds", "0.2", "-c", "2"),
    ]
    ran = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(report.read_text())
    assert (document["options"]["a_serve_args"], document["options"]["b_serve_args"]) == ("--metrics off", "--metrics on")
    assert [turn["side"] for turn in document["turns"]] == list("ABBA")
    pids = {turn["side"]: turn["daemon_pid"] for turn in document["turns"]}
    started = [line.split() for line in marks.read_text().splitlines() if line.split()[1] == "serve"]
    assert {int(words[0]): words[-1] for words in started} == {pids["A"]: "off", pids["B"]: "on"}
    rows = {row["op"]: row for row in document["results"]}
    assert set(rows) == {"load 200/s", "daemon_cpu_per_request"}
    assert all(row["ci95_low"] <= row["ratio"] <= row["ci95_high"] for row in rows.values()), rows
