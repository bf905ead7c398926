"""The commands a person types: `mica lab`, `mica serve`, `mica template`, and the example."""

import json
import os
import subprocess
import sys

from conftest import MICA, PATIENCE_S, lab

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(*words: str, timeout_s: int = PATIENCE_S) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_the_example_of_the_readme_works():
    done = run(sys.executable, os.path.join(ROOT, "examples", "hello.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("    Hello from Mica", "    24000 bytes, the same", "All of it worked."):
        assert line in done.stdout.splitlines(), done.stdout
    assert done.stdout.count(" ms  ok") == 7, done.stdout


def test_the_example_fails_when_the_key_is_wrong():
    env = {**os.environ, "E2B_API_KEY": "e2b_" + "0" * 40}
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "examples", "hello.py")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=env,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_a_second_up_and_a_second_template_reuse_what_is_there():
    again = run(MICA, "lab", "up", "--port", os.environ.get("MICA_LAB_PORT", "3000"))
    assert again.returncode == 0, again.stderr
    assert "the lab is up" in again.stdout + again.stderr
    assert "QEMU started" not in again.stdout + again.stderr
    before = lab("mica template list --json")
    template = run(MICA, "lab", "template", "code-interpreter-v1")
    assert template.returncode == 0, template.stderr
    assert "has code-interpreter-v1 already" in template.stdout + template.stderr
    assert lab("mica template list --json") == before


def test_doctor_says_that_the_lab_can_serve():
    """With exit code 0: nothing that it looks at keeps `mica serve` from running, and it does run there."""
    done = run(MICA, "lab", "exec", "--", "mica", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert not [check for check, found in findings.items() if found["status"] == "fail"]
    for check in ("kvm", "user", "kernel", "io_uring", "memlock", "reflink", "cgroup"):
        assert findings[check]["status"] == "ok", findings[check]
    # Where it cannot, the exit code says so.
    done = run(MICA, "lab", "exec", "--", "mica", "doctor", "--json", "--cgroup-root", "/tmp/no-group")
    assert done.returncode == 1, done.stdout + done.stderr
    failing = [f["check"] for f in json.loads(done.stdout) if f["status"] == "fail"]
    assert failing == ["cgroup"]


def test_status_env_and_exit_codes():
    status = run(MICA, "lab", "status")
    assert status.returncode == 0, status.stdout
    exports = run(MICA, "lab", "env").stdout
    for name in ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY"):
        assert f"export {name}=" in exports
    assert run(MICA, "lab", "exec", "--", "sh", "-c", "exit 7").returncode == 7
    assert run(MICA, "--version").returncode == 0
    down = run(MICA, "lab", "--name", "no-such-lab", "status")
    assert down.returncode != 0


def test_shards_sit_on_both_nodes():
    plan = lab("mica topology")
    assert "node 0" in plan and "node 1" in plan
    cores = lab(
        "for t in /proc/$(pgrep -of '[m]ica serve')/task/*; do "
        "grep -h -E '^(Name|Cpus_allowed_list)' $t/status | tr '\\n' ' '; echo; done"
    )
    pinned = {line.split()[3] for line in cores.splitlines() if line.split()[3].isdigit()}
    assert len(pinned) >= 2, cores


def test_a_failed_template_build_leaves_nothing(tmp_path):
    store = tmp_path / "store"
    done = run(MICA, "template", "build", "--store", str(store), "--name", "broken",
               "--packages", "no-such-package-anywhere")
    assert done.returncode != 0
    assert "no-such-package-anywhere" in done.stdout + done.stderr
    assert "step `rootfs packages` failed" in done.stderr
    left = run(MICA, "template", "list", "--json", "--store", str(store))
    assert left.stdout.strip() == "[]"
    mounts = open("/proc/mounts", encoding="utf-8").read()
    assert "mica/templates" not in mounts
