"""The kernels of the code interpreter beside Python's, through the unmodified SDK, in a sandbox that is
restored with all of them running."""

import time

import pytest
from e2b_code_interpreter import Sandbox as CodeSandbox

from conftest import PATIENCE_S

TEMPLATE = "code-interpreter-v1"

# What a kernel that was saved would draw again in every sandbox restored from there.
DRAWS = {
    "js": "console.log(Math.random(), crypto.randomUUID(), crypto.getRandomValues(new Uint8Array(8)).join('-'),"
    " require('crypto').randomBytes(8).toString('hex'))",
    "bash": "echo $RANDOM$RANDOM$RANDOM",
}


@pytest.fixture(scope="module")
def sandboxes():
    """Two of one saved state."""
    made = [
        CodeSandbox.create(
            TEMPLATE, timeout=3600, request_timeout=PATIENCE_S, envs={"OWN": str(number)}
        )
        for number in range(2)
    ]
    yield made
    for sandbox in made:
        sandbox.kill()


@pytest.fixture
def code(sandboxes):
    return sandboxes[0]


def run(sandbox, code, language, **options):
    return sandbox.run_code(
        code, language=language, timeout=PATIENCE_S, request_timeout=PATIENCE_S, **options
    )


def out(sandbox, code, language, **options):
    execution = run(sandbox, code, language, **options)
    assert execution.error is None, execution.error
    return "".join(execution.logs.stdout)


def test_every_kernel_runs_before_the_first_cell(code):
    languages = [context.language for context in code.list_code_contexts()]
    assert languages == ["python", "javascript", "bash"]
    started = code.commands.run(
        "for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline; echo; done", request_timeout=PATIENCE_S
    ).stdout
    assert "deno jupyter" in started and "BashKernel" in started
    # For the record: what they take of the guest's memory.
    print(code.commands.run("free -m; ps -eo rss,args --sort=-rss | head -6").stdout)


@pytest.mark.parametrize("language", ["js", "javascript", "ts", "typescript", "deno"])
def test_javascript_and_typescript(code, language):
    begun = time.monotonic()
    execution = run(code, "const add = (x: number, y: number) => x + y\nconsole.log('hi')\nadd(1, 2)", language)
    print(f"{language}: {time.monotonic() - begun:.1f} s")
    assert execution.error is None, execution.error
    assert execution.logs.stdout == ["hi\n"]
    assert execution.text == "3"


def test_javascript_tells_its_errors_and_where_it_is(code):
    execution = run(code, "throw new TypeError('bad')", "js")
    assert (execution.error.name, execution.error.value) == ("TypeError", "bad")
    assert run(code, "let y = 5 +", "js").error.name == "SyntaxError"
    assert run(code, "process.cwd()", "js").text == "/home/user"
    assert out(code, "whoami; pwd", "bash") == "user\n/home/user\n"
    assert run(code, "(exit 3)", "bash").error.value == "3"


def test_environment(sandboxes):
    for number, sandbox in enumerate(sandboxes):
        show = "console.log(process.env.OWN, process.env.CALL)"
        assert out(sandbox, show, "js", envs={"CALL": "1"}) == f"{number} 1\n"
        assert out(sandbox, show, "js") == f"{number} undefined\n"
        assert out(sandbox, "echo $OWN $CALL", "bash", envs={"CALL": "1"}) == f"{number} 1\n"
        assert out(sandbox, "echo $OWN $CALL", "bash") == f"{number}\n"
        # The next shell is another, in the same sandbox.
        run(sandbox, "exit", "bash")
        assert out(sandbox, "echo $OWN $CALL", "bash") == f"{number}\n"


@pytest.mark.parametrize("language", list(DRAWS))
def test_random_numbers_differ(sandboxes, language):
    one, other = (out(sandbox, DRAWS[language], language) for sandbox in sandboxes)
    print(one, other)
    pairs = list(zip(one.split(), other.split(), strict=True))
    assert pairs and all(a != b for a, b in pairs), (one, other)


def test_contexts(code):
    context = code.create_code_context(language="ts", cwd="/tmp", request_timeout=PATIENCE_S)
    assert (context.language, context.cwd) == ("typescript", "/tmp")
    execution = code.run_code(
        "const own = 1; process.cwd()", context=context, timeout=PATIENCE_S, request_timeout=PATIENCE_S
    )
    assert execution.text == "/tmp"
    assert run(code, "typeof own", "ts").text == "undefined"
    code.remove_code_context(context)
