"""One client's process: runs the features it is told to, and writes what came of each.

Used by python/features.py and cube/features.py. Every feature is a function registered with `feature`; it
asserts values and returns nothing. A call that the client does not have is said with `require` or `absent`.
The driver (matrix.py) reads the lines of the file that MICA_CELLS names; each is flushed, so that a process
that dies loses no cell but the one it was in.
"""

import json
import os
import sys
import time
import traceback
import uuid

# False with the stand-in VM: its sandboxes are processes of one machine, and share its files.
ISOLATED = os.environ["MICA_CLIENTS_ISOLATED"] == "1"
TEMPLATE = os.environ["MICA_CLIENTS_TEMPLATE"]
CLIENT = os.environ["MICA_CLIENTS_CLIENT"]
# The limit of one request: emulation is slow. Whole seconds: clients before 2.15 send "60000.0" for 60.0.
PATIENCE_S = int(os.environ["MICA_CLIENTS_PATIENCE_S"])

LARGE_BYTES = 100 * 1000 * 1000

FEATURES = {}


class Absent(Exception):
    """The cell has no result, for this reason."""


def feature(function):
    """Registers a feature under the function's name, without its `check_`."""
    FEATURES[function.__name__.removeprefix("check_")] = function
    return function


def absent(reason):
    raise Absent(reason)


def require(owner, name, what=None):
    """Ends the cell with a reason where the client has no such call; otherwise gives the call."""
    if not hasattr(owner, name):
        raise Absent(f"the client has no {what or name}")
    return getattr(owner, name)


def wait_until(what, condition, deadline_s=None):
    """Polls until `condition()` is true and gives its value; fails with `what` at the deadline."""
    end = time.monotonic() + (deadline_s or PATIENCE_S)
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not in time: {what}")
        time.sleep(0.2)


def raises(kinds, call, *args, **options):
    """The exception that `call` must end with."""
    try:
        value = call(*args, **options)
    except kinds as error:
        return error
    raise AssertionError(f"{call} gave {value!r}, and was to raise {kinds}")


def unique(prefix):
    """A name that no other cell uses: the stand-in's sandboxes share one file system."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def main():
    """Runs the features named on the command line, in that order."""
    with open(os.environ["MICA_CELLS"], "a", encoding="utf-8") as out:

        def write(**cell):
            out.write(json.dumps(cell) + "\n")
            out.flush()

        for name in sys.argv[1].split(","):
            write(feature=name, status="begun")
            begun = time.monotonic()
            try:
                if name not in FEATURES:
                    raise NotImplementedError(f"the matrix has no test of {name} for this client")
                FEATURES[name]()
                cell = {"status": "pass"}
            except Absent as reason:
                cell = {"status": "absent", "reason": str(reason)}
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                cell = {"status": "fail", "reason": text, "detail": traceback.format_exc()}
            write(feature=name, seconds=round(time.monotonic() - begun, 2), **cell)
