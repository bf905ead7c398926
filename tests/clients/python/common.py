"""What the features of the Python `e2b` clients share: sandboxes, files and calls in the form that a version has.

Used by features.py and apart.py. Refuses to know versions: where they differ, the call's presence or its parameters
decide.
"""

import inspect
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cells import ISOLATED, PATIENCE_S, TEMPLATE, require, unique

try:
    from e2b_code_interpreter import Sandbox
except ImportError:
    from e2b import Sandbox

SLOW = {"request_timeout": PATIENCE_S}
RUN = {"request_timeout": PATIENCE_S, "timeout": PATIENCE_S}
# Whom commands run as by default. The stand-in's agent knows only the user it runs as itself.
DEFAULT_USER = "user" if ISOLATED else "root"
DEFAULT_HOME = "/home/user" if ISOLATED else "/root"


def make(template=TEMPLATE, **options):
    """A new sandbox: a class method since 2.0, the constructor before."""
    create = getattr(Sandbox, "create", Sandbox)
    return create(template, timeout=900, request_timeout=PATIENCE_S, **options)


class Own:
    """A sandbox that is killed at the end of the block, whatever happened to it."""

    def __init__(self, *args, **options):
        self.sandbox = make(*args, **options)

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        Sandbox.kill(self.sandbox.sandbox_id, request_timeout=PATIENCE_S)


_shared = None


def shared():
    """One sandbox for all that does not harm it."""
    global _shared
    if _shared is None:
        _shared = make()
    return _shared


def folder(sandbox):
    """A directory of this cell's own."""
    path = f"/tmp/{unique('matrix')}"
    assert sandbox.files.make_dir(path, **SLOW) is True
    return path


def write(sandbox, path, data):
    """A file written. 1.11 knows no names for the rest: its limit is the last of its parameters."""
    if takes(sandbox.files.write, "request_timeout"):
        return sandbox.files.write(path, data, **SLOW)
    return sandbox.files.write(path, data, DEFAULT_USER, PATIENCE_S)


def takes(call, parameter):
    return parameter in inspect.signature(call).parameters


def start(sandbox, command, stdin=False):
    """A command in the background. Clients without the parameter always connect standard input."""
    options = {"stdin": True} if stdin and takes(sandbox.commands.run, "stdin") else {}
    return sandbox.commands.run(command, background=True, timeout=0, request_timeout=PATIENCE_S, **options)


def pids(sandbox):
    return [process.pid for process in sandbox.commands.list(**SLOW)]


def end_shared():
    """Kills the one sandbox, if it was made."""
    if _shared is not None:
        Sandbox.kill(_shared.sandbox_id, request_timeout=PATIENCE_S)


def pause_call(sandbox):
    if hasattr(sandbox, "pause"):
        return sandbox.pause
    return require(sandbox, "beta_pause", "pause")
