"""The driver itself: a cell that crashes or hangs hides no other, and no cell is empty without a reason."""

import os
import sys

import report
from matrix import run_client

# A client whose features do what their names say.
CLIENT = """
import os, sys, time
sys.path.insert(0, os.environ["CLIENTS"])
import cells

@cells.feature
def check_good():
    pass

@cells.feature
def check_wrong():
    assert 1 == 2, "one is not two"

@cells.feature
def check_without():
    cells.require(object(), "fork")

@cells.feature
def check_crash():
    os._exit(9)

@cells.feature
def check_hang():
    time.sleep(600)

cells.main()
"""


def run(features, source=CLIENT, limit_s=20):
    here = os.path.dirname(os.path.abspath(__file__))
    variables = {
        "CLIENTS": here,
        "PYTHONDONTWRITEBYTECODE": "1",
        "MICA_CLIENTS_ISOLATED": "0",
        "MICA_CLIENTS_TEMPLATE": "base",
        "MICA_CLIENTS_CLIENT": "a client",
        "MICA_CLIENTS_PATIENCE_S": "1",
    }
    return run_client([sys.executable, "-c", source], here, variables, features, limit_s)


def test_a_crash_or_a_hang_costs_its_own_cell_only():
    cells = run(["crash", "good", "hang", "without", "wrong"])
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "crash": "fail",
        "good": "pass",
        "hang": "fail",
        "without": "absent",
        "wrong": "fail",
    }
    assert cells["crash"]["reason"] == "the process ended with 9"
    assert cells["hang"]["reason"] == "no progress for 20 s"
    assert cells["without"]["reason"] == "the client has no fork"
    assert cells["wrong"]["reason"] == "AssertionError: one is not two"
    assert "check_wrong" in cells["wrong"]["detail"]


def test_a_client_that_does_not_start_fails_everywhere_and_says_why():
    cells = run(["good", "wrong"], source="import no_such_module")
    assert [cell["status"] for cell in cells.values()] == ["fail", "fail"]
    assert "No module named 'no_such_module'" in cells["good"]["reason"]


def test_a_feature_nobody_wrote_fails():
    cell = run(["unheard"])["unheard"]
    assert cell["status"] == "fail"
    assert cell["reason"] == "NotImplementedError: the matrix has no test of unheard for this client"


def test_no_cell_is_empty():
    features = {"a": "A", "b": "B", "c": "C", "d": "D"}
    cells = {
        "a": {"status": "pass"},
        "b": {"status": "absent", "reason": ""},
        "c": {"status": "begun"},
    }
    row = report.complete("one", features, cells)
    assert [cell["status"] for cell in row["cells"].values()] == ["pass", "fail", "fail", "fail"]
    assert [feature for _, feature, _ in report.failures([row])] == ["b", "c", "d"]


def test_reasons_stand_below_the_table_once():
    features = {"a": "A", "b": "B"}
    absent = {"status": "absent", "reason": "the client has none"}
    rows = [report.complete("one", features, {"a": absent, "b": absent})]
    rows.append(report.complete("two", features, {"a": {"status": "pass"}, "b": {"status": "fail", "reason": "x"}}))
    assert report.table(rows, features) == (
        "| | one | two |\n|---|---|---|\n| A | – (1) | yes |\n| B | – (1) | **FAIL** |\n\n"
        "1. the client has none"
    )
    told = report.details(report.failures([*rows, rows[1]]))
    assert told.count("two: b, b: x") == 1
