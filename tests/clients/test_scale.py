"""`mica bench scale`: every figure, what is wanted of it, and a message where it cannot measure. And `mica bench check`,
which ends with 1 where a report does not keep what is promised.
"""

import json
import os
import pathlib
import subprocess

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"])
FIGURES = {
    "hand_over_p50": None,
    "idle_share_of_a_core": 1,
    "idle_resident": 60,
    "idle_resident_anonymous": None,
    "health_cpu_1_shard": None,
    "health_cpu_2_shards": None,
    "health_cpu_ratio": 1.1,
    "create_cpu_1_shard": None,
    "create_cpu_2_shards": None,
    "create_cpu_ratio": 1.1,
    "get_local_p50": None,
    "get_crossed_p50": None,
    "metrics_off_cpu": None,
    "metrics_on_cpu": None,
    "metrics_cpu_ratio": 1.01,
    "crossing_adds_p50": 20,
}


def scale(*options):
    return mica_bench("scale", "--quick", *options)


def mica_bench(*words):
    words = [PROGRAMS / "mica-bench", *words]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)


def test_every_figure_is_there_with_what_is_wanted(tmp_path):
    ran = scale("--json", tmp_path / "figures")
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "figures").read_text())
    assert (report["format"], report["command"], report["complete"]) == ("mica-bench", "scale", True)
    assert report["options"] == {"rounds": 2, "quick": True, "cpu_latency_us": None}
    rows = report["results"]
    assert all(row["op"] == row["figure"] and len(row["of_rounds"]) == row["n"] == 2 for row in rows), rows
    assert all(min(row["of_rounds"]) <= row["value"] <= max(row["of_rounds"]) for row in rows), rows
    found = {row["figure"]: row for row in rows}
    assert {name: row["wanted_max"] for name, row in found.items()} == FIGURES
    values = {name: row["value"] for name, row in found.items()}
    assert all(name in ran.stdout for name in FIGURES), ran.stdout
    # A few rounds on a machine that does other things show only what is impossible.
    assert all(values[name] > 0 for name in FIGURES if name != "crossing_adds_p50"), values
    assert values["idle_resident_anonymous"] < values["idle_resident"] < 500, values
    assert values["create_cpu_1_shard"] > values["health_cpu_1_shard"], values
    of_rounds = [found[name]["of_rounds"] for name in ("get_crossed_p50", "get_local_p50", "crossing_adds_p50")]
    assert all(abs(crossed - local - adds) < 0.01 for crossed, local, adds in zip(*of_rounds, strict=True)), of_rounds
    # So few rounds are no ground for a verdict.
    judged = mica_bench("check", tmp_path / "figures")
    assert judged.returncode == 1 and "2 rounds are too few, of 3 at least" in judged.stdout, judged.stdout


def test_a_missing_program_is_named():
    wrong = scale("--standin", "/no/such/program")
    assert wrong.returncode == 1 and "--standin" in wrong.stderr, wrong.stderr


def test_promises_are_a_gate(tmp_path):
    registry, scale, broken = (tmp_path / name for name in ("registry.json", "scale.json", "broken.json"))
    measured = mica_bench("registry", "--batches", "9", "--rounds", "3", "-o", registry)
    assert measured.returncode == 0, measured.stderr
    # What was counted stands; how fast this machine is, is no matter here.
    report = json.loads(registry.read_text())
    for row in report["results"]:
        assert len(row["of_rounds"]) == 3
        row["of_rounds"] = [50.0, 60.0, 70.0]
    registry.write_text(json.dumps(report))
    rows = [{"op": name, "of_rounds": [most] * 3} for name, most in FIGURES.items() if most is not None]
    made_up = {"format": "mica-bench", "version": 1, "command": "scale", "complete": True, "host": {}, "results": rows}
    scale.write_text(json.dumps(made_up))
    kept = mica_bench("check", registry, scale)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    lines = [line for line in kept.stdout.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 10 and all(line.startswith("kept ") for line in lines), kept.stdout
    assert "0.0000 allocations <= 0" in kept.stdout and "60.0 ns <= 100" in kept.stdout, kept.stdout
    next(row for row in rows if row["op"] == "crossing_adds_p50")["of_rounds"] = [1.0, 20.5, 90.0]
    broken.write_text(json.dumps(made_up))
    judged = mica_bench("check", registry, broken)
    assert judged.returncode == 1, judged.stdout
    assert "1 of 10 promises are broken: crossing_adds_p50" in judged.stderr, judged.stderr
    assert "20.5 us <= 20 (what the other shard adds; 3 rounds, 1.0000 to 90.0)" in judged.stdout, judged.stdout
