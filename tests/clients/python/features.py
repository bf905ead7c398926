"""What the Python `e2b` clients go through, 1.11 to the newest, and `e2b_code_interpreter`.

Started by matrix.py with the features to run, in the environment of one client. Refuses to know versions:
where they differ, the call's presence or its parameters decide. Some features are in apart.py.
"""

import datetime
import hashlib
import io
import os
import re

import apart  # noqa: F401
import e2b
from common import (
    DEFAULT_HOME,
    DEFAULT_USER,
    RUN,
    SLOW,
    Own,
    Sandbox,
    end_shared,
    folder,
    make,
    pause_call,
    pids,
    shared,
    start,
    takes,
    write,
)

from cells import (
    ISOLATED,
    LARGE_BYTES,
    PATIENCE_S,
    TEMPLATE,
    feature,
    main,
    raises,
    require,
    unique,
    wait_until,
)
from owners import check_owners

PtySize = getattr(e2b, "PtySize", None)
if PtySize is None:
    from e2b.sandbox.commands.command_handle import PtySize


@feature
def check_create():
    with Own() as sandbox:
        assert re.fullmatch(r"i[0-9a-z]{20}", sandbox.sandbox_id), sandbox.sandbox_id
        assert sandbox.is_running(**SLOW) is True
        info = sandbox.get_info(**SLOW)
        assert info.sandbox_id == sandbox.sandbox_id
        assert info.name == TEMPLATE or info.template_id, info
        length = (info.end_at - info.started_at).total_seconds()
        assert 890 <= length <= 910, length


@feature
def check_code():
    require(Sandbox, "run_code")
    sandbox = shared()
    execution = sandbox.run_code("print('printed'); 6*7", **RUN)
    assert execution.error is None, execution.error
    assert "".join(execution.logs.stdout) == "printed\n", execution.logs
    assert execution.text == "42", execution
    execution = sandbox.run_code(
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2, 3], [4, 5, 6]); plt.title('T'); plt.xlabel('X'); plt.ylabel('Y'); plt.show()",
        **RUN,
    )
    assert execution.error is None, execution.error
    (result,) = [r for r in execution.results if r.png]
    assert result.chart.type.value == "line", result.chart
    assert (result.chart.title, result.chart.x_label, result.chart.y_label) == ("T", "X", "Y")
    points = [tuple(map(float, point)) for point in result.chart.elements[0].points]
    assert points == [(1, 4), (2, 5), (3, 6)], points


@feature
def check_traceback():
    require(Sandbox, "run_code")
    execution = shared().run_code("def inner():\n    return 1/0\ninner()", **RUN)
    assert execution.error.name == "ZeroDivisionError"
    assert execution.error.value == "division by zero"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", execution.error.traceback)
    assert "return 1/0" in plain and "in inner()" in plain, plain


@feature
def check_command():
    sandbox = shared()
    seen = []
    result = sandbox.commands.run("echo out; echo err >&2", on_stdout=seen.append, **RUN)
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    assert "".join(seen) == "out\n"
    failure = raises(e2b.CommandExitException, sandbox.commands.run, "echo x; exit 3", **RUN)
    assert (failure.exit_code, failure.stdout) == (3, "x\n")


@feature
def check_background():
    sandbox = shared()
    handle = start(sandbox, "sleep 1; echo done")
    assert handle.pid in pids(sandbox)
    again = sandbox.commands.connect(handle.pid, timeout=PATIENCE_S, request_timeout=PATIENCE_S)
    assert again.pid == handle.pid
    result = handle.wait()
    assert (result.stdout, result.exit_code) == ("done\n", 0)
    again.disconnect()
    wait_until("the process leaves the list", lambda: handle.pid not in pids(sandbox))


@feature
def check_stdin():
    sandbox = shared()
    handle = start(sandbox, 'read line; echo "got:$line"', stdin=True)
    sandbox.commands.send_stdin(handle.pid, "a line\n", **SLOW)
    assert handle.wait().stdout == "got:a line\n"
    if hasattr(sandbox.commands, "close_stdin"):
        handle = start(sandbox, "cat; echo end", stdin=True)
        sandbox.commands.send_stdin(handle.pid, "kept\n", **SLOW)
        sandbox.commands.close_stdin(handle.pid, **SLOW)
        assert handle.wait().stdout == "kept\nend\n"


@feature
def check_command_kill():
    sandbox = shared()
    handle = start(sandbox, "sleep 600")
    assert sandbox.commands.kill(handle.pid, **SLOW) is True
    end = raises(e2b.CommandExitException, handle.wait)
    assert end.exit_code == -1 and "signal: killed" in end.error, (end.exit_code, end.error)
    wait_until("the process leaves the list", lambda: handle.pid not in pids(sandbox))
    assert sandbox.commands.kill(handle.pid, **SLOW) is False


@feature
def check_command_timeout():
    sandbox = shared()
    mark = unique("sleeper")
    command = f"exec -a {mark} sleep 600"
    raises(e2b.TimeoutException, sandbox.commands.run, command, timeout=2, request_timeout=PATIENCE_S)

    def gone():
        return not any(mark in " ".join(process.args) for process in sandbox.commands.list(**SLOW))

    wait_until("the process ends with its timeout", gone)


@feature
def check_user():
    sandbox = shared()
    assert sandbox.commands.run("id -un; echo $HOME", **RUN).stdout == f"{DEFAULT_USER}\n{DEFAULT_HOME}\n"
    assert sandbox.commands.run("id -un; echo $HOME", user="root", **RUN).stdout == "root\n/root\n"
    refused = raises(Exception, sandbox.commands.run, "true", user="nobody-of-that-name", **RUN)
    assert "invalid username: 'nobody-of-that-name'" in str(refused), refused


@feature
def check_cwd():
    sandbox = shared()
    assert sandbox.commands.run("pwd", cwd="/usr", **RUN).stdout == "/usr\n"
    refused = raises(e2b.InvalidArgumentException, sandbox.commands.run, "true", cwd="/no/such", **RUN)
    assert "/no/such" in str(refused) and "does not exist" in str(refused), refused


@feature
def check_envs():
    with Own(envs={"AT_CREATE": "a b", "BOTH": "create"}) as sandbox:
        result = sandbox.commands.run(
            'echo "$AT_CREATE|$BOTH|$AT_RUN|$E2B_SANDBOX|$E2B_SANDBOX_ID"',
            envs={"BOTH": "run", "AT_RUN": "ü=1"},
            **RUN,
        )
        assert result.stdout == f"a b|run|ü=1|true|{sandbox.sandbox_id}\n", result.stdout


@feature
def check_pty():
    sandbox = shared()
    seen = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0, **SLOW)
    sandbox.pty.send_stdin(terminal.pid, b"stty size; echo $TERM\n", **SLOW)
    sandbox.pty.resize(terminal.pid, PtySize(rows=30, cols=100), **SLOW)
    sandbox.pty.send_stdin(terminal.pid, b"stty size; exit 5\n", **SLOW)
    end = raises(e2b.CommandExitException, terminal.wait, on_pty=seen.append)
    text = b"".join(seen)
    assert end.exit_code == 5
    assert b"30 100" in text and b"xterm" in text, text


@feature
def check_text():
    sandbox = shared()
    where = folder(sandbox)
    written = write(sandbox, f"{where}/deep/a.txt", "line\nünï €\n")
    assert written.path == f"{where}/deep/a.txt"
    assert sandbox.files.read(f"{where}/deep/a.txt", **SLOW) == "line\nünï €\n"
    assert write(sandbox, f"{where}/empty", "").name == "empty"
    assert sandbox.files.read(f"{where}/empty", **SLOW) == ""
    listed = sandbox.files.list(where, **SLOW)
    assert sorted((e.name, e.type.value) for e in listed) == [("deep", "dir"), ("empty", "file")], listed
    if hasattr(sandbox.files, "get_info"):
        assert sandbox.files.get_info(f"{where}/deep/a.txt", **SLOW).name == "a.txt"
    moved = sandbox.files.rename(f"{where}/deep/a.txt", f"{where}/b.txt", **SLOW)
    assert moved.path == f"{where}/b.txt"
    assert sandbox.files.exists(f"{where}/deep/a.txt", **SLOW) is False
    assert sandbox.files.exists(f"{where}/b.txt", **SLOW) is True
    assert sandbox.files.make_dir(where, **SLOW) is False
    sandbox.files.remove(where, **SLOW)
    assert sandbox.files.exists(where, **SLOW) is False
    missing = raises(e2b.NotFoundException, sandbox.files.read, f"{where}/b.txt", **SLOW)
    assert "does not exist" in str(missing), missing
    check_owners(sandbox, DEFAULT_USER, write)


@feature
def check_bytes():
    sandbox = shared()
    where = folder(sandbox)
    data = bytes(range(256)) * 4096
    write(sandbox, f"{where}/blob", data)
    assert bytes(sandbox.files.read(f"{where}/blob", format="bytes", **SLOW)) == data
    assert b"".join(sandbox.files.read(f"{where}/blob", format="stream", **SLOW)) == data
    write(sandbox, f"{where}/stream", io.BytesIO(data))
    assert bytes(sandbox.files.read(f"{where}/stream", format="bytes", **SLOW)) == data
    sandbox.files.remove(where, **SLOW)


@feature
def check_large():
    sandbox = shared()
    where = folder(sandbox)
    data = os.urandom(1_000_000) * (LARGE_BYTES // 1_000_000)
    digest = hashlib.sha256(data).hexdigest()
    write(sandbox, f"{where}/large", data)
    there = sandbox.commands.run(f"stat -c %s {where}/large; sha256sum {where}/large", **RUN).stdout.split()
    assert there[:2] == [str(LARGE_BYTES), digest], there
    down, count = hashlib.sha256(), 0
    for chunk in sandbox.files.read(f"{where}/large", format="stream", **SLOW):
        down.update(chunk)
        count += len(chunk)
    assert (count, down.hexdigest()) == (LARGE_BYTES, digest)
    sandbox.files.remove(where, **SLOW)


@feature
def check_watch():
    sandbox = shared()
    where = folder(sandbox)
    watcher = sandbox.files.watch_dir(where, **SLOW)
    write(sandbox, f"{where}/new", "x")
    seen = set()

    def both():
        seen.update((event.name, event.type.value) for event in watcher.get_new_events())
        return {("new", "create"), ("new", "write")} <= seen

    wait_until("the file's creation and its content are told", both)
    watcher.stop()
    sandbox.files.remove(where, **SLOW)


def listed(metadata):
    """Ids and metadata of the running sandboxes with this metadata."""
    if hasattr(e2b, "SandboxQuery"):
        query = e2b.SandboxQuery(metadata=metadata)
        pages, entries = Sandbox.list(query=query, limit=1, **SLOW), []
        while pages.has_next:
            entries += pages.next_items()
        return entries
    from e2b.sandbox.sandbox_api import SandboxQuery

    return Sandbox.list(query=SandboxQuery(metadata=metadata), **SLOW)


@feature
def check_list():
    mark = {"mark": unique("list"), "odd key&": "a b&c=d/ü%"}
    with Own(metadata=mark) as first, Own(metadata=mark) as second, Own(metadata={"mark": "x"}):
        entries = listed(mark)
        assert {entry.sandbox_id for entry in entries} == {first.sandbox_id, second.sandbox_id}, entries
        assert len(entries) == 2
        assert all(entry.metadata == mark for entry in entries), entries
        assert listed({"mark": unique("nobody")}) == []


def left_s(sandbox):
    return (sandbox.get_info(**SLOW).end_at - datetime.datetime.now(datetime.UTC)).total_seconds()


@feature
def check_set_timeout():
    with Own() as sandbox:
        sandbox.set_timeout(3000, **SLOW)
        assert 2900 < left_s(sandbox) < 3100
        sandbox.set_timeout(120, **SLOW)
        assert left_s(sandbox) < 130
        sandbox.set_timeout(1, **SLOW)
        wait_until("its time is over", lambda: not sandbox.is_running(**SLOW))


@feature
def check_pause():
    mark = {"mark": unique("pause")}
    with Own(metadata=mark) as sandbox:
        pause = pause_call(sandbox)
        pause(**SLOW)
        assert sandbox.get_info(**SLOW).state == e2b.SandboxState.PAUSED
        assert [entry.state for entry in listed(mark)] == [e2b.SandboxState.PAUSED]
        assert sandbox.is_running(**SLOW) is False
        # Told as `False` since 2.20 or so, and as nothing before.
        assert not pause(**SLOW)


@feature
def check_connect():
    with Own() as sandbox:
        where = folder(sandbox)
        counter = start(sandbox, f"while sleep 0.2; do date +%s%N > {where}/beat; done")
        wait_until("it beats", lambda: sandbox.files.exists(f"{where}/beat", **SLOW))
        other = Sandbox.connect(sandbox.sandbox_id)
        assert other.sandbox_id == sandbox.sandbox_id
        assert other.files.exists(f"{where}/beat", **SLOW) is True
        if not hasattr(sandbox, "pause") and not hasattr(sandbox, "beta_pause"):
            return
        pause_call(sandbox)(**SLOW)
        again = Sandbox.connect(sandbox.sandbox_id, timeout=600, request_timeout=PATIENCE_S)
        assert again.is_running(**SLOW) is True
        assert again.commands.run("echo back", **RUN).stdout == "back\n"
        if ISOLATED:
            # The same processes go on: what was in memory is there.
            assert counter.pid in pids(again)
            before = again.files.read(f"{where}/beat", **SLOW)
            wait_until("it beats again", lambda: again.files.read(f"{where}/beat", **SLOW) != before)


@feature
def check_snapshot():
    with Own() as sandbox:
        made = require(sandbox, "create_snapshot")(**SLOW)
        assert made.snapshot_id and made.snapshot_id != sandbox.sandbox_id
        assert sandbox.commands.run("echo on", **RUN).stdout == "on\n"
        pages, found = sandbox.list_snapshots(**SLOW), []
        while pages.has_next:
            found += [entry.snapshot_id for entry in pages.next_items()]
        assert found == [made.snapshot_id], found
        assert Sandbox.delete_snapshot(made.snapshot_id, **SLOW) is True
        assert Sandbox.delete_snapshot(made.snapshot_id, **SLOW) is False


def differs_from_then_on(source, copy, where):
    """The copy has what was written before, and neither sees what the other writes after."""
    assert copy.sandbox_id != source.sandbox_id
    assert copy.files.read(f"{where}/before", **SLOW) == "before"
    echoed = copy.commands.run("echo $E2B_SANDBOX_ID", **RUN).stdout
    assert echoed == f"{copy.sandbox_id}\n", echoed
    if ISOLATED:
        assert copy.files.exists(f"{where}/after", **SLOW) is False
        write(copy, f"{where}/of-the-copy", "x")
        assert source.files.exists(f"{where}/of-the-copy", **SLOW) is False


@feature
def check_from_snapshot():
    with Own() as source:
        snapshot = require(source, "create_snapshot")
        where = folder(source)
        write(source, f"{where}/before", "before")
        made = snapshot(**SLOW)
        write(source, f"{where}/after", "after")
        with Own(made.snapshot_id) as copy:
            differs_from_then_on(source, copy, where)
        assert Sandbox.delete_snapshot(made.snapshot_id, **SLOW) is True


@feature
def check_fork():
    with Own() as source:
        fork = require(source, "fork")
        where = folder(source)
        write(source, f"{where}/before", "before")
        forks = fork(count=2, timeout=600, **SLOW)
        try:
            assert len(forks) == 2 and all(isinstance(fork, Sandbox) for fork in forks), forks
            assert len({source.sandbox_id, *(fork.sandbox_id for fork in forks)}) == 3
            write(source, f"{where}/after", "after")
            for one in forks:
                differs_from_then_on(source, one, where)
        finally:
            for one in forks:
                if isinstance(one, Sandbox):
                    Sandbox.kill(one.sandbox_id, **SLOW)


@feature
def check_rollback():
    require(Sandbox, "rollback", "rollback: no e2b client has")


@feature
def check_metrics():
    sandbox = shared()
    get_metrics = require(sandbox, "get_metrics")
    points = wait_until("there is a measurement", lambda: get_metrics(**SLOW))
    point = points[-1]
    cpus = int(sandbox.commands.run("nproc", **RUN).stdout) if ISOLATED else point.cpu_count
    assert point.cpu_count == cpus and point.cpu_count > 0, point
    assert 0 <= point.cpu_used_pct <= 100 * point.cpu_count, point
    if hasattr(point, "mem_total"):
        assert 0 < point.mem_used <= point.mem_total, point
        assert 0 < point.disk_used <= point.disk_total, point
    age_s = abs((datetime.datetime.now(datetime.UTC) - point.timestamp.astimezone(datetime.UTC)).total_seconds())
    assert age_s < 120, point


@feature
def check_kill():
    sandbox = make()
    # 1.x says nothing here.
    assert sandbox.kill(**SLOW) in (True, None)
    assert sandbox.is_running(**SLOW) is False
    assert Sandbox.kill(sandbox.sandbox_id, **SLOW) is False
    missing = raises(Exception, sandbox.get_info, **SLOW)
    assert "doesn't exist" in str(missing) or "not found" in str(missing), missing


if __name__ == "__main__":
    try:
        main()
    finally:
        end_shared()
