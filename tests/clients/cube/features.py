"""What the `cubesandbox` clients go through, 0.2.1 to the newest.

Started by matrix.py with the features to run, in the environment of one client. Refuses to know versions:
where they differ, the call's presence decides.
"""

import datetime
import hashlib
import inspect
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cubesandbox
from cells import (
    ISOLATED,
    LARGE_BYTES,
    PATIENCE_S,
    TEMPLATE,
    absent,
    feature,
    main,
    raises,
    require,
    unique,
    wait_until,
)
from cubesandbox import Config, Sandbox

CONFIG = Config(request_timeout=PATIENCE_S)
RUN = {"timeout": PATIENCE_S}


def make(template=TEMPLATE, **options):
    return Sandbox.create(template, timeout=900, config=CONFIG, **options)


class Own:
    """A sandbox that is killed at the end of the block, whatever happened to it."""

    def __init__(self, *args, **options):
        self.sandbox = make(*args, **options)

    def __enter__(self):
        return self.sandbox

    def __exit__(self, *_):
        self.sandbox.kill()


shared_sandbox = None


def shared():
    """One sandbox for all that does not harm it."""
    global shared_sandbox
    if shared_sandbox is None:
        shared_sandbox = make()
    return shared_sandbox


def run(sandbox, command, **options):
    """What a command printed; it must succeed."""
    result = sandbox.commands.run(command, **RUN, **options)
    assert result.exit_code == 0, result
    return result.stdout


def folder(sandbox):
    path = f"/tmp/{unique('matrix')}"
    run(sandbox, f"mkdir {path}")
    return path


def read(sandbox, path):
    return sandbox.files.read(path)


def has(sandbox, path):
    return sandbox.commands.run(f"test -e {path}", **RUN).exit_code == 0


@feature
def check_create():
    assert Sandbox.health(config=CONFIG)["status"] == "ok"
    with Own() as sandbox:
        assert re.fullmatch(r"i[0-9a-z]{20}", sandbox.sandbox_id), sandbox.sandbox_id
        info = sandbox.get_info()
        assert (info["sandboxID"], info["state"]) == (sandbox.sandbox_id, "running"), dict(info)
        assert info["cpuCount"] > 0 and info["memoryMB"] > 0


@feature
def check_code():
    sandbox = shared()
    execution = sandbox.run_code("print('printed'); 6*7", **RUN)
    assert execution.error is None, execution.error
    assert "".join(map(str, execution.logs.stdout)) == "printed\n", execution.logs
    assert execution.text == "42", execution
    execution = sandbox.run_code(
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2, 3], [4, 5, 6]); plt.title('T'); plt.xlabel('X'); plt.show()",
        **RUN,
    )
    assert execution.error is None, execution.error
    (result,) = [r for r in execution.results if r.png]
    # The client hands the chart on as it came.
    chart = result.chart
    assert (chart["type"], chart["title"], chart["x_label"]) == ("line", "T", "X"), chart


@feature
def check_traceback():
    execution = shared().run_code("def inner():\n    return 1/0\ninner()", **RUN)
    assert (execution.error.name, execution.error.value) == ("ZeroDivisionError", "division by zero")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", execution.error.traceback)
    assert "return 1/0" in plain and "in inner()" in plain, plain


@feature
def check_command():
    result = shared().commands.run("echo out; echo err >&2; exit 3", **RUN)
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)


@feature
def check_background():
    assert "background" not in inspect.signature(Sandbox.commands.fget(shared()).run).parameters
    absent("commands.run of the client has no background")


@feature
def check_stdin():
    require(shared().commands, "send_stdin", "commands.send_stdin")


@feature
def check_command_kill():
    require(shared().commands, "kill", "commands.kill")


@feature
def check_command_timeout():
    sandbox = shared()
    mark = unique("sleeper")
    refused = raises(Exception, sandbox.commands.run, f"exec -a {mark} sleep 600", timeout=2)
    # Its own limit is as long as the one it sends, so it is the client or the host that says so first.
    assert "deadline" in str(refused) or "timed out" in str(refused), refused
    wait_until("the process ends", lambda: run(sandbox, f"pgrep -fc '{mark[:-1]}[{mark[-1]}]' || true") == "0\n")


@feature
def check_user():
    sandbox = shared()
    assert run(sandbox, "id -un; echo $HOME", user="root") == "root\n/root\n"
    if ISOLATED:
        assert run(sandbox, "id -un; echo $HOME", user="user") == "user\n/home/user\n"
    refused = raises(RuntimeError, sandbox.commands.run, "true", user="nobody-of-that-name", **RUN)
    assert "invalid username: 'nobody-of-that-name'" in str(refused), refused


@feature
def check_cwd():
    sandbox = shared()
    assert run(sandbox, "pwd", cwd="/usr") == "/usr\n"
    refused = raises(RuntimeError, sandbox.commands.run, "true", cwd="/no/such", **RUN)
    assert "/no/such" in str(refused) and "does not exist" in str(refused), refused


@feature
def check_envs():
    with Own(env_vars={"AT_CREATE": "a b", "BOTH": "create"}) as sandbox:
        said = run(sandbox, 'echo "$AT_CREATE|$BOTH|$AT_RUN"', envs={"BOTH": "run", "AT_RUN": "ü=1"})
        assert said == "a b|run|ü=1\n", said
        execution = sandbox.run_code("import os; os.environ['AT_CREATE']", **RUN)
        assert execution.text == "a b", execution


@feature
def check_pty():
    require(Sandbox, "pty")
    from cubesandbox._pty import PtySize

    sandbox = shared()
    seen = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=PATIENCE_S)
    terminal.resize(PtySize(rows=30, cols=100))
    terminal.send_stdin("stty size; echo $TERM; exit 0\n")
    assert terminal.wait(on_data=seen.append) == 0
    text = b"".join(seen)
    assert b"30 100" in text and b"xterm-256color" in text, text
    assert sandbox.pty.kill(terminal.pid) is False


@feature
def check_text():
    sandbox = shared()
    where = folder(sandbox)
    sandbox.files.write(f"{where}/deep/a.txt", "line\nünï €\n")
    assert read(sandbox, f"{where}/deep/a.txt") == "line\nünï €\n"
    missing = raises(OSError, sandbox.files.read, f"{where}/none")
    assert "does not exist" in str(missing), missing
    if not hasattr(sandbox.files, "list"):
        return
    # The client writes as root, and does all else as the template's user, whom that does not stop.
    entries = sandbox.files.list(where)
    assert [(e["name"], e["type"]) for e in entries] == [("deep", "FILE_TYPE_DIRECTORY")], entries
    moved = sandbox.files.rename(f"{where}/deep/a.txt", f"{where}/b.txt")
    assert moved["path"] == f"{where}/b.txt", moved
    assert sandbox.files.exists(f"{where}/deep/a.txt") is False
    assert int(sandbox.files.stat(f"{where}/b.txt")["size"]) == len("line\nünï €\n".encode())
    assert sandbox.files.make_dir(f"{where}/made")["path"] == f"{where}/made"
    sandbox.files.remove(where)
    assert sandbox.files.exists(where) is False


def digest_there(sandbox, path):
    return run(sandbox, f"sha256sum {path}").split()[0]


@feature
def check_bytes():
    sandbox = shared()
    where = folder(sandbox)
    # The client reads text only: what went up is looked at in the sandbox.
    data = bytes(range(256)) * 4096
    sandbox.files.write(f"{where}/blob", data)
    assert digest_there(sandbox, f"{where}/blob") == hashlib.sha256(data).hexdigest()


@feature
def check_large():
    sandbox = shared()
    where = folder(sandbox)
    text = os.urandom(500_000).hex() * (LARGE_BYTES // 1_000_000)
    sandbox.files.write(f"{where}/large", text)
    assert digest_there(sandbox, f"{where}/large") == hashlib.sha256(text.encode()).hexdigest()
    down = read(sandbox, f"{where}/large")
    assert len(down) == LARGE_BYTES and down == text
    run(sandbox, f"rm -r {where}")


@feature
def check_watch():
    sandbox = shared()
    watch_dir = require(sandbox.files, "watch_dir", "files.watch_dir")
    where = folder(sandbox)
    seen = set()
    with watch_dir(where) as watcher:
        sandbox.files.write(f"{where}/new", "x")
        for event in watcher:
            seen.add((event["name"], event["type"]))
            if {("new", "EVENT_TYPE_CREATE"), ("new", "EVENT_TYPE_WRITE")} <= seen:
                return
    raise AssertionError(f"the stream ended with {seen}")


@feature
def check_list():
    mark = {"mark": unique("list"), "odd key&": "a b&c=d/ü%"}
    with Own(metadata=mark) as first:
        # The client does not filter: what it lists has the metadata.
        for listed in (Sandbox.list(config=CONFIG), Sandbox.list_v2(config=CONFIG)):
            (entry,) = [entry for entry in listed if entry["sandboxID"] == first.sandbox_id]
            assert entry["metadata"] == mark and entry["state"] == "running", entry


def left_s(sandbox):
    ends = datetime.datetime.fromisoformat(sandbox.get_info()["endAt"])
    return (ends - datetime.datetime.now(datetime.UTC)).total_seconds()


@feature
def check_set_timeout():
    with Own() as sandbox:
        require(sandbox, "set_timeout")(3000)
        left = left_s(sandbox)
        assert 2900 < left < 3100, left


@feature
def check_pause():
    with Own() as sandbox:
        sandbox.pause(timeout=PATIENCE_S)
        assert sandbox.get_info()["state"] == "paused"
        refused = raises(Exception, sandbox.pause)
        assert "already paused" in str(refused), refused


@feature
def check_connect():
    with Own() as sandbox:
        sandbox.run_code("kept = 'in memory'", **RUN)
        sandbox.pause(timeout=PATIENCE_S)
        other = Sandbox.connect(sandbox.sandbox_id, config=CONFIG)
        assert other.sandbox_id == sandbox.sandbox_id
        assert other.get_info()["state"] == "running"
        # The stand-in keeps what it had only where its process was kept for the resume.
        expected = {"in memory"} if ISOLATED else {"in memory", "gone"}
        kept = other.run_code("globals().get('kept', 'gone')", **RUN).text
        assert kept in expected, kept
        other.pause(timeout=PATIENCE_S)
        sandbox.resume()
        assert sandbox.get_info()["state"] == "running"
        # Newer clients name no time here: what the create asked for holds.
        left = left_s(sandbox)
        assert left > 200, left
        assert run(sandbox, "echo back") == "back\n"


@feature
def check_snapshot():
    with Own() as sandbox:
        made = sandbox.create_snapshot()
        assert made.snapshot_id
        assert run(sandbox, "echo on") == "on\n"
        listed, _ = Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id, config=CONFIG)
        assert [entry.snapshot_id for entry in listed] == [made.snapshot_id], listed
        Sandbox.delete_snapshot(made.snapshot_id, config=CONFIG)
        listed, _ = Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id, config=CONFIG)
        assert listed == [], listed


def differs_from_then_on(source, copy, where):
    """The copy has what was written before, and neither sees what the other writes after."""
    assert copy.sandbox_id != source.sandbox_id
    assert read(copy, f"{where}/before") == "before"
    if ISOLATED:
        assert not has(copy, f"{where}/after")
        copy.files.write(f"{where}/of-the-copy", "x")
        assert not has(source, f"{where}/of-the-copy")


@feature
def check_from_snapshot():
    with Own() as source:
        where = folder(source)
        source.files.write(f"{where}/before", "before")
        made = source.create_snapshot()
        source.files.write(f"{where}/after", "after")
        with Own(made.snapshot_id) as copy:
            differs_from_then_on(source, copy, where)
        Sandbox.delete_snapshot(made.snapshot_id, config=CONFIG)


@feature
def check_fork():
    with Own() as source:
        where = folder(source)
        source.files.write(f"{where}/before", "before")
        clones = source.clone(n=2, concurrency=2)
        try:
            assert len({source.sandbox_id, *(clone.sandbox_id for clone in clones)}) == 3
            source.files.write(f"{where}/after", "after")
            for clone in clones:
                differs_from_then_on(source, clone, where)
        finally:
            for clone in clones:
                clone.kill()


@feature
def check_rollback():
    with Own() as sandbox:
        where = folder(sandbox)
        sandbox.files.write(f"{where}/file", "old")
        sandbox.run_code("value = 'old'", **RUN)
        made = sandbox.create_snapshot()
        sandbox.files.write(f"{where}/file", "new")
        sandbox.run_code("value = 'new'", **RUN)
        done = sandbox.rollback(made.snapshot_id)
        assert (done["sandboxID"], done["snapshotID"]) == (sandbox.sandbox_id, made.snapshot_id), done
        # The stand-in leaves its processes and files as they are.
        expected = "old" if ISOLATED else "new"
        assert read(sandbox, f"{where}/file") == expected
        assert sandbox.run_code("value", **RUN).text == expected
        Sandbox.delete_snapshot(made.snapshot_id, config=CONFIG)


@feature
def check_pause_disk():
    if "keep_memory" not in inspect.signature(Sandbox.pause).parameters:
        absent("the client has no pause that keeps the disk alone")
    raise NotImplementedError("the client has such a pause now, and the matrix no test of it")


@feature
def check_snapshot_disk():
    if "mode" not in inspect.signature(Sandbox.create_snapshot).parameters:
        absent("the client has no snapshot of the disk alone")
    raise NotImplementedError("the client has such a snapshot now, and the matrix no test of it")


@feature
def check_file_urls():
    require(Sandbox, "download_url", "URLs of files")


@feature
def check_async():
    require(cubesandbox, "AsyncSandbox", "asynchronous form")


@feature
def check_metrics():
    require(Sandbox, "get_metrics", "call for metrics")


@feature
def check_kill():
    sandbox = make()
    sandbox.kill()
    missing = raises(Exception, sandbox.get_info)
    assert type(missing).__name__ == "SandboxNotFoundError", repr(missing)
    assert type(raises(Exception, sandbox.kill)).__name__ == "SandboxNotFoundError"


if __name__ == "__main__":
    try:
        main()
    finally:
        if shared_sandbox is not None:
            shared_sandbox.kill()
