"""`mica bench scale`: every figure, what is wanted of it, and a message where it cannot measure."""

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
    "crossing_adds_p50": 20,
}


def scale(*options):
    words = [PROGRAMS / "mica-bench", "scale", "--quick", *options]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=300)


def test_every_figure_is_there_with_what_is_wanted(tmp_path):
    ran = scale("--json", tmp_path / "figures")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "figures").read_text())["results"]
    found = {row["figure"]: row for row in rows}
    assert {name: row["wanted_max"] for name, row in found.items()} == FIGURES
    values = {name: row["value"] for name, row in found.items()}
    assert all(name in ran.stdout for name in FIGURES), ran.stdout
    # A few rounds on a machine that does other things show only what is impossible.
    assert all(values[name] > 0 for name in FIGURES if name != "crossing_adds_p50"), values
    assert values["idle_resident_anonymous"] < values["idle_resident"] < 500, values
    assert values["create_cpu_1_shard"] > values["health_cpu_1_shard"], values
    assert abs(values["get_crossed_p50"] - values["get_local_p50"] - values["crossing_adds_p50"]) < 0.01


def test_a_missing_program_is_named():
    wrong = scale("--standin", "/no/such/program")
    assert wrong.returncode == 1 and "--standin" in wrong.stderr, wrong.stderr
