"""E2B's own command line, `e2b` of npm's @e2b/cli, against a daemon with the stand-in VM: what it says and does is what
the API says and does.

Run by tools/test-clients. It is the client that people type into: no cell of the matrix, which asks clients for values.
"""

import json
import os
import pathlib
import subprocess
import urllib.error
import urllib.request

import environments
import pytest
import standin

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"])


class Cli:
    """The command line, with nothing in its home."""

    def __init__(self, daemon, home):
        self.daemon = daemon
        node, where = environments.node_environment("cli")
        self.words = [node, str(where / "node_modules/.bin/e2b")]
        self.variables = {
            "E2B_API_URL": daemon.url,
            "E2B_SANDBOX_URL": daemon.url,
            "E2B_API_KEY": daemon.api_key,
            "HOME": str(home),
            "PATH": os.environ["PATH"],
        }

    def run(self, *words, given="", **variables):
        done = subprocess.run(
            [*self.words, *words],
            env=self.variables | variables,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def says(self, *words, **more):
        code, out, error = self.run(*words, **more)
        assert code == 0, (words, code, out, error)
        return out

    def sandboxes(self, *options):
        listed = json.loads(self.says("sandbox", "list", "--format", "json", *options))
        return {one["sandboxId"]: one["state"] for one in listed}

    def asks(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"X-API-Key": self.daemon.api_key, "Content-Type": "application/json"}
        request = urllib.request.Request(self.daemon.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    with standin.Daemon(PROGRAMS) as daemon:
        yield Cli(daemon, tmp_path_factory.mktemp("home"))


@pytest.fixture
def sandbox(cli):
    made = cli.says("sandbox", "create", "base", "--detach").strip().splitlines()[-1]
    yield made
    cli.run("sandbox", "kill", made)


def test_a_sandbox_is_made_listed_and_killed(cli, sandbox):
    assert cli.sandboxes() == {sandbox: "running"}
    assert cli.asks("GET", f"/sandboxes/{sandbox}")["state"] == "running"
    assert sandbox in cli.says("sandbox", "info", sandbox)
    assert "created from template" in cli.says("sandbox", "logs", sandbox)
    cli.says("sandbox", "kill", sandbox)
    assert cli.sandboxes() == {}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        cli.asks("GET", f"/sandboxes/{sandbox}")


def test_a_command_gets_what_is_given_and_ends_as_it_ends(cli, sandbox):
    assert cli.says("sandbox", "exec", sandbox, "--", "echo", "hi there") == "hi there\n"
    code, out, error = cli.run("sandbox", "exec", sandbox, "--", "sh", "-c", "echo said >&2; exit 3")
    assert (code, out) == (3, "") and "said" in error, (code, out, error)
    assert cli.says("sandbox", "exec", sandbox, "--", "cat", given="through a pipe\n") == "through a pipe\n"


def test_a_sandbox_is_paused_and_resumed(cli, sandbox):
    cli.says("sandbox", "pause", sandbox)
    assert cli.sandboxes("--state", "paused") == {sandbox: "paused"}
    cli.says("sandbox", "resume", sandbox)
    assert cli.sandboxes() == {sandbox: "running"}


def test_templates_are_listed(cli):
    listed = cli.says("template", "list", "--format", "json")
    assert {"base", "code-interpreter-v1"} <= {name for one in json.loads(listed) for name in one["aliases"]}


def test_a_key_that_is_none_of_the_hosts_is_told(cli):
    code, out, error = cli.run("sandbox", "list", E2B_API_KEY="e2b_" + "0" * 40)
    assert code != 0 and "the API key is missing or not valid" in error, (code, out, error)
