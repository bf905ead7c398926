"""The unmodified E2B SDK against a real Linux guest: values, not that it ran."""

import os
import re
import threading
import urllib.error
import urllib.request

import pytest
from conftest import PATIENCE_S, api, make, wait_until
from e2b import CommandExitException, NotFoundException, PtySize, Sandbox

SLOW = {"request_timeout": PATIENCE_S}


def test_code_runs_in_a_real_kernel(code):
    execution = code.run_code("print('Hello from Mica'); 6*7", timeout=PATIENCE_S, **SLOW)
    assert execution.error is None
    assert "".join(execution.logs.stdout) == "Hello from Mica\n"
    assert execution.text == "42"


def test_a_traceback_names_the_error(code):
    execution = code.run_code("1/0", timeout=PATIENCE_S, **SLOW)
    assert execution.error.name == "ZeroDivisionError"
    assert execution.error.value == "division by zero"
    # IPython colours its tracebacks, so the line of code is in pieces.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", execution.error.traceback)
    assert "1/0" in plain
    assert "ZeroDivisionError: division by zero" in plain


def test_state_stays_between_executions(code):
    code.run_code("kept = 'still here'", timeout=PATIENCE_S, **SLOW)
    assert code.run_code("kept", timeout=PATIENCE_S, **SLOW).text == "still here"


def test_a_chart_comes_as_png_and_as_chart(code):
    execution = code.run_code(
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2, 3], [4, 5, 6]); plt.title('T'); plt.xlabel('X'); plt.show()",
        timeout=PATIENCE_S,
        **SLOW,
    )
    assert execution.error is None
    (result,) = [r for r in execution.results if r.png]
    assert result.chart.title == "T"
    assert result.chart.x_label == "X"


def test_it_is_a_linux_of_its_own(base):
    result = base.commands.run("uname -sr; nproc; free -m", timeout=PATIENCE_S, **SLOW)
    first, count, *rest = result.stdout.splitlines()
    assert first.startswith("Linux 6.12.")
    assert int(count) == base.get_info(**SLOW).cpu_count
    assert any(line.startswith("Mem:") for line in rest)


def test_exit_codes_and_both_outputs(base):
    with pytest.raises(CommandExitException) as failure:
        base.commands.run("echo out; echo err >&2; exit 3", timeout=PATIENCE_S, **SLOW)
    assert failure.value.exit_code == 3
    assert failure.value.stdout == "out\n"
    assert failure.value.stderr == "err\n"


def test_background_stdin_and_kill(base):
    command = base.commands.run("cat", background=True, stdin=True, timeout=0, **SLOW)
    lines = []
    reader = threading.Thread(
        target=lambda: lines.extend(out for out, _, _ in command if out), daemon=True
    )
    base.commands.send_stdin(command.pid, "over vsock\n", **SLOW)
    reader.start()
    reader.join(timeout=1)
    assert command.pid in [process.pid for process in base.commands.list(**SLOW)]
    assert base.commands.kill(command.pid, **SLOW) is True
    reader.join(timeout=60)
    assert "".join(lines) == "over vsock\n"
    assert base.commands.kill(command.pid, **SLOW) is False


def test_users_and_sudo(base):
    assert base.commands.run("whoami", timeout=PATIENCE_S, **SLOW).stdout == "user\n"
    assert base.commands.run("sudo whoami", timeout=PATIENCE_S, **SLOW).stdout == "root\n"
    assert base.commands.run("whoami", user="root", timeout=PATIENCE_S, **SLOW).stdout == "root\n"


def test_envs_and_cwd(base):
    result = base.commands.run(
        'echo "$A $E2B_SANDBOX $E2B_SANDBOX_ID"; pwd',
        envs={"A": "b c"},
        cwd="/tmp",
        timeout=PATIENCE_S,
        **SLOW,
    )
    assert result.stdout == f"b c true {base.sandbox_id}\n/tmp\n"


def test_a_terminal(base):
    seen = []
    terminal = base.pty.create(PtySize(rows=24, cols=80), timeout=0, **SLOW)
    base.pty.send_stdin(terminal.pid, b"stty size; exit 5\n", **SLOW)
    with pytest.raises(CommandExitException) as end:
        terminal.wait(on_pty=seen.append)
    assert end.value.exit_code == 5
    assert b"24 80" in b"".join(seen)


def test_files_round_trip(base):
    data = bytes(range(256)) * 4096
    base.files.write("deep/er/blob", data, **SLOW)
    assert bytes(base.files.read("deep/er/blob", format="bytes", **SLOW)) == data
    entry = base.files.get_info("deep/er/blob", **SLOW)
    assert (entry.path, entry.size, entry.owner) == ("/home/user/deep/er/blob", len(data), "user")
    assert [e.name for e in base.files.list("deep", **SLOW)] == ["er"]
    base.files.rename("deep/er/blob", "deep/moved", **SLOW)
    assert base.files.exists("deep/er/blob", **SLOW) is False
    base.files.remove("deep", **SLOW)
    assert base.files.exists("deep", **SLOW) is False
    assert base.files.make_dir("made", **SLOW) is True
    assert base.files.make_dir("made", **SLOW) is False
    with pytest.raises(NotFoundException):
        base.files.read("/no/such/file", **SLOW)


def test_a_program_of_the_guest_is_reached_through_the_proxy(base):
    server = base.commands.run(
        "mkdir -p /tmp/www && echo served > /tmp/www/x && "
        "exec python3 -u -m http.server 8000 --bind 127.0.0.1 --directory /tmp/www",
        background=True,
        timeout=0,
        **SLOW,
    )

    def fetch():
        request = urllib.request.Request(
            os.environ["E2B_SANDBOX_URL"] + "/x",
            headers={"E2b-Sandbox-Id": base.sandbox_id, "E2b-Sandbox-Port": "8000"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            assert error.code == 502, error.code
            assert b"port is not open" in error.read()
            return None

    wait_until("the server answers through the proxy", lambda: fetch() == b"served\n")
    assert server.kill() is True


def test_control_plane(base):
    info = base.get_info(**SLOW)
    assert info.sandbox_id == base.sandbox_id
    status, listed = api("GET", "/sandboxes")
    assert status == 200
    assert base.sandbox_id in [entry["sandboxID"] for entry in listed]
    before = info.end_at
    base.set_timeout(7200, **SLOW)
    assert base.get_info(**SLOW).end_at > before
    status, templates = api("GET", "/templates")
    assert status == 200
    assert {"base", "code-interpreter-v1"} <= {n for t in templates for n in t["names"]}


def test_a_timeout_ends_a_sandbox():
    sandbox = make("base")
    sandbox.set_timeout(1, **SLOW)
    wait_until("the sandbox is gone", lambda: api("GET", f"/sandboxes/{sandbox.sandbox_id}")[0] == 404)
    assert sandbox.is_running(**SLOW) is False


def test_metadata_and_environment():
    sandbox = make("base", metadata={"owner": "a b&c"}, envs={"GREETING": "hi"})
    try:
        assert sandbox.commands.run("echo $GREETING", timeout=PATIENCE_S, **SLOW).stdout == "hi\n"
        assert sandbox.get_info(**SLOW).metadata == {"owner": "a b&c"}
        pages = Sandbox.list(query=None, **SLOW).next_items()
        assert sandbox.sandbox_id in [entry.sandbox_id for entry in pages]
    finally:
        assert sandbox.kill(**SLOW) is True
    assert sandbox.kill(**SLOW) is False


def test_the_access_token_is_enforced(base):
    request = urllib.request.Request(
        os.environ["E2B_SANDBOX_URL"] + "/process.Process/List",
        data=b"{}",
        headers={
            "E2b-Sandbox-Id": base.sandbox_id,
            "E2b-Sandbox-Port": "49983",
            "Content-Type": "application/json",
        },
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 401
