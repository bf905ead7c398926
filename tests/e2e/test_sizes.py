"""Templates built in another size than their base's: what a real Linux guest has then, and what it has lost."""

import pytest
from conftest import PATIENCE_S, api, make, run, wait_until
from e2b import Sandbox, Template
from inside import resources

SLOW = {"request_timeout": PATIENCE_S}

# What a kernel takes of the memory before it counts: never more than so much of it.
KERNEL_SHARE = 0.25


@pytest.fixture
def build():
    """Builds templates. They and their sandboxes are gone after the test, with all that they kept."""
    before = resources()
    made = []

    def build_template(template, name: str, cpu_count: int, memory_mb: int) -> list:
        lines = []
        info = Template.build(
            template,
            name,
            cpu_count=cpu_count,
            memory_mb=memory_mb,
            on_build_logs=lambda entry: lines.append(entry.message),
            **SLOW,
        )
        made.append(info.template_id)
        return lines

    yield build_template
    for template in made:
        assert api("DELETE", f"/templates/{template}")[0] == 204

    # The pool may have more processes than before: there are sizes now that it did not know.
    def clean() -> bool:
        now = resources()
        return all(now[kind] <= before[kind] for kind in ("files", "snapshots"))

    wait_until("nothing of the builds is left", clean)


def size_of(sandbox: Sandbox) -> tuple[int, float]:
    """vCPUs and MiB of memory, as Linux counts them."""
    count, memory_kib = run(sandbox, "nproc; awk '/^MemTotal/ { print $2 }' /proc/meminfo").split()
    return int(count), int(memory_kib) / 1024


def has_size(sandbox: Sandbox, cpu_count: int, memory_mb: int) -> None:
    """That it has this size, whoever is asked."""
    counted, memory = size_of(sandbox)
    assert counted == cpu_count
    assert (1 - KERNEL_SHARE) * memory_mb < memory <= memory_mb
    info = sandbox.get_info(**SLOW)
    assert (info.cpu_count, info.memory_mb) == (cpu_count, memory_mb)


def processes(sandbox: Sandbox) -> str:
    return run(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_a_build_of_another_size_boots_its_base_in_it(tiny, build):
    # `tiny` has one vCPU and 256 MiB.
    first = (
        Template()
        .from_template(tiny)
        .set_envs({"COLOUR": "green"})
        # Nobody syncs it: the next build finds it all the same.
        .run_cmd("nproc > ~/counted; echo word > ~/file")
        .set_start_cmd("sleep 98765", "true")
    )
    lines = build(first, "sized", 2, 512)
    assert any(line.startswith("Booting") for line in lines), lines
    sandbox = make("sized")
    has_size(sandbox, 2, 512)
    assert run(sandbox, 'cat ~/counted ~/file; echo "$COLOUR"; hostname') == (
        f"2\nword\ngreen\n{sandbox.sandbox_id}\n"
    )
    assert "sleep 98765" in processes(sandbox), "its start command runs in it"
    # The vCPUs are all of one machine: each takes work.
    assert run(sandbox, "for c in 0 1; do taskset -c $c nproc; done") == "1\n1\n"
    assert sandbox.kill(**SLOW) is True

    # What was built is booted the same way, and what ran in it is not started again.
    build(Template().from_template("sized").run_cmd("nproc >> ~/counted"), "resized", 1, 384)
    sandbox = make("resized")
    has_size(sandbox, 1, 384)
    assert run(sandbox, 'cat ~/counted ~/file; echo "$COLOUR"') == "2\n1\nword\ngreen\n"
    assert "sleep 98765" not in processes(sandbox)
    # The kernel of what it was built on boots it again, in the size that it has.
    path = f"/sandboxes/{sandbox.sandbox_id}"
    assert api("POST", f"{path}/pause", {"memory": False})[0] == 204
    assert api("POST", f"{path}/resume", {"timeout": 3600})[0] == 201
    has_size(sandbox, 1, 384)
    assert sandbox.kill(**SLOW) is True


def test_a_code_interpreter_of_another_size_has_its_kernels_up(build):
    build(Template().from_template("code-interpreter-v1"), "code-interpreter-small", 1, 1536)
    sandbox = make("code-interpreter-small")
    assert size_of(sandbox)[0] == 1
    # Before the first cell.
    languages = [context.language for context in sandbox.list_code_contexts()]
    assert languages == ["python", "javascript", "bash"]
    assert sandbox.run_code("6 * 7", timeout=PATIENCE_S, **SLOW).text == "42"
    assert sandbox.kill(**SLOW) is True
