"""What the end-to-end tests share: the lab they run against, and raw HTTP beside the SDK.

The environment comes from `mica lab env`; tools/lab-test sets it. Waiting is always for a condition,
with a deadline.
"""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from e2b_code_interpreter import Sandbox as CodeSandbox

from e2b import Sandbox

# Emulation is slow, and a loaded test machine slower.
PATIENCE_S = 600

MICA = os.path.join(os.environ["MICA_BIN_DIR"], "mica")


def lab(script: str, stdin: bytes = b"", timeout_s: int = 300) -> str:
    """Runs a shell script as root in the lab's host and returns what it printed."""
    done = subprocess.run(
        [MICA, "lab", "exec", "--", "sh", "-euc", script],
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(
            f"in the lab: {script}\nexit {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}"
        )
    return done.stdout.decode()


def api(method: str, path: str, body=None, headers=None):
    """One raw request to the control plane: (status, parsed JSON or None)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        os.environ["E2B_API_URL"] + path,
        data=data,
        method=method,
        headers={
            "X-API-Key": os.environ["E2B_API_KEY"],
            "Content-Type": "application/json",
            **(headers or {}),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text else None


def wait_until(what: str, condition, deadline_s: float = 120):
    """Polls until `condition()` is true; fails with `what` at the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"not within {deadline_s} s: {what}")


def make(template: str = "base", **options) -> Sandbox:
    kind = CodeSandbox if template.startswith("code-interpreter") else Sandbox
    return kind.create(template, timeout=3600, request_timeout=PATIENCE_S, **options)


@pytest.fixture(scope="module")
def base():
    """One sandbox of the template `base`, for tests that do not harm it."""
    sandbox = make("base")
    yield sandbox
    sandbox.kill()


@pytest.fixture(scope="session")
def code():
    """One sandbox of the code interpreter's template, its Python kernel running."""
    sandbox = make("code-interpreter-v1")
    assert sandbox.run_code("1+1", timeout=PATIENCE_S, request_timeout=PATIENCE_S).text == "2"
    yield sandbox
    sandbox.kill()


def templates() -> dict:
    """The lab's templates by name, as `mica template list --json` prints them."""
    return {entry["name"]: entry for entry in json.loads(lab("mica template list --json"))}


def template_folder(name: str) -> str:
    return f"/var/lib/mica/templates/{templates()[name]['templateId']}"


def template_variant(name: str, kernel: bytes = b"", vcpus: int = 1, memory_mib: int = 512) -> str:
    """Registers the template `base` under another name, with other sizes or another kernel, and warms
    it up. The disk is a reflink; the boot is what this costs."""
    base = template_folder("base")
    if name in templates():
        lab(f"mica template delete {name}")
    image = f"/var/lib/mica/{name}.kernel" if kernel else f"{base}/kernel"
    if kernel:
        lab(f"cat > {image}", stdin=kernel)
    lab(
        f"mica template add --name {name} --kernel {image} --initramfs {base}/initramfs "
        f"--disk {base}/disk --ready agent --vcpus {vcpus} --memory {memory_mib}",
        timeout_s=PATIENCE_S,
    )
    if kernel:
        lab(f"rm {image}")
    return name


@pytest.fixture
def variant():
    made = []

    def make_variant(name, **options):
        made.append(name)
        return template_variant(name, **options)

    yield make_variant
    for name in made:
        if name in templates():
            lab(f"mica template delete {name}")


@pytest.fixture(scope="session")
def tiny():
    """`base` on one vCPU and little memory. It stays in the lab for the files after this one, under
    a name that says which `base` it was made from."""
    known = templates()
    name = f"tiny-{known['base']['templateId']}"
    for other in known:
        if other.startswith("tiny-") and other != name:
            lab(f"mica template delete {other}")
    # A template without its running snapshot is one whose first boot was cut off.
    warm = f"test -e /var/lib/mica/snapshots/{known.get(name, {}).get('templateId')}/manifest && echo warm || true"
    if name not in known or not lab(warm):
        template_variant(name, vcpus=1, memory_mib=256)
    # From its first create on a shard keeps processes of this size ready, and from its start on those of all
    # templates that are there: so that every shard does at every count of a test, also after a restart, each
    # gets a share of these.
    for known_name in (name, "base"):
        for sandbox in [make(known_name) for _ in range(12)]:
            sandbox.kill(request_timeout=PATIENCE_S)
    return name


def run(sandbox: Sandbox, command: str, **options) -> str:
    """What a command in the sandbox printed."""
    return sandbox.commands.run(
        command, timeout=PATIENCE_S, request_timeout=PATIENCE_S, **options
    ).stdout


def connect(sandbox_id: str) -> Sandbox:
    """The SDK's object for a sandbox that was made by a raw request. Wakes it if it is paused."""
    return Sandbox.connect(sandbox_id, timeout=3600, request_timeout=PATIENCE_S)
