"""A daemon with the stand-in VM and its two templates, for as long as a `with` block takes.

Used by matrix.py. The stand-in runs the real agent as a plain process of this machine: native speed, and no
isolation at all. Needs root, as the daemon does. Refuses to leave anything behind.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

TEMPLATES = ("base", "code-interpreter-v1")
DOMAIN = "sbx.localhost"
# Longest wait for the daemon to begin or to end.
PATIENCE_S = 60


def cgroup_mount():
    """Where cgroup v2 is, and whether it has the controllers of limits."""
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            controllers = (pathlib.Path(where) / "cgroup.controllers").read_text().split()
            return pathlib.Path(where), {"memory", "pids"} <= set(controllers)
    raise RuntimeError("cgroup v2 is not mounted; mount it at /sys/fs/cgroup")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Daemon:
    """`mica serve`, its store, its keys and its certificate, in one directory of their own."""

    def __init__(self, programs, keyless=False):
        self.programs = pathlib.Path(programs).resolve()
        self.keyless = keyless
        self.url = self.api_key = self.domain = self.ca = self.process = None

    def __enter__(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="mica-clients-"))
        mount, limits = cgroup_mount()
        self.cgroup = mount / self.directory.name
        try:
            self.vm_program = self.write_programs()
            self.make_templates(limits)
            self.start(limits)
        except BaseException:
            self.__exit__()
            raise
        return self

    def write_programs(self):
        """A VM program whose agent has the code interpreter, with a Python that can be a kernel."""
        python = os.environ.get("MICA_TEST_PYTHON")
        if python is None:
            raise RuntimeError('set MICA_TEST_PYTHON, to "$(tools/python-env)/bin/python"')
        settings = self.directory / "template.json"
        settings.write_text('{"services": {"interpreter": true}}')
        guest, vm = self.directory / "guest", self.directory / "vm"
        # The daemon starts VM processes with an empty environment.
        path = f"{pathlib.Path(python).parent}:{os.environ['PATH']}"
        # Commands are login shells of root: what this machine's root has in its profile is not ours to run,
        # least of all to kill in the middle.
        hidden = " ".join(f"/root/.{name}" for name in ("profile", "bash_profile", "bash_login", "bashrc"))
        guest.write_text(
            f"#!/bin/sh\nexport PATH='{path}'\n"
            "[ -n \"$HIDDEN\" ] || HIDDEN=1 exec unshare --mount -- \"$0\" \"$@\"\n"
            f"for file in {hidden}; do [ ! -e $file ] || mount --bind /dev/null $file; done\n"
            f"exec '{self.programs}/mica-guest' \"$@\" --template-json '{settings}'\n"
        )
        vm.write_text(f"#!/bin/sh\nexec '{self.programs}/standin-vm' --guest '{guest}' \"$@\"\n")
        for program in (guest, vm):
            program.chmod(0o755)
        return vm

    def make_templates(self, limits):
        """Registers them as for a guest; the stand-in looks at neither kernel nor disk, and warms in no time."""
        (self.directory / "kernel").write_text("not a kernel: the stand-in VM does not look")
        (self.directory / "disk").write_bytes(b"\x5a" * (1 << 20))
        for name in TEMPLATES:
            words = [
                *(self.programs / "mica", "template", "add", "--store", self.directory / "store"),
                *("--name", name, "--kernel", self.directory / "kernel", "--disk", self.directory / "disk"),
                *("--ready", "agent", "--memory", "16", "--vm-program", self.vm_program),
                *("--cgroup-root", f"{self.cgroup}-warm", "--accept-unusable-kvm"),
                *([] if limits else ["--without-cgroup-limits"]),
            ]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"mica template add: {done.stdout}{done.stderr}")

    def can(self, option):
        """Whether this build's `mica serve` has the option."""
        help_text = subprocess.check_output([self.programs / "mica", "serve", "--help"], text=True)
        return f"{option} " in help_text or f"{option}\n" in help_text

    def certificate(self, port):
        """The options of TLS, where this build has them."""
        if not self.can("--tls-cert"):
            return []
        words = [self.programs / "mica", "cert", "--domain", DOMAIN, "--out", self.directory / "tls"]
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
        self.domain, self.ca = f"{DOMAIN}:{port}", self.directory / "tls/ca.pem"
        tls = self.directory / "tls"
        return ["--tls-cert", tls / "server.pem", "--tls-key", tls / "server.key"]

    def start(self, limits):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = [
            *(self.programs / "mica", "serve", "--listen", f"127.0.0.1:{port}", "--domain", f"{DOMAIN}:{port}"),
            *("--store", self.directory / "store", "--key-file", self.directory / "keys"),
            *("--vm-program", self.vm_program, "--cgroup-root", self.cgroup),
            *("--accept-unusable-kvm", "--shards", "2"),
            *([] if limits else ["--without-cgroup-limits"]),
            *self.certificate(port),
            *(["--open"] if self.keyless else []),
        ]
        self.log = self.directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, words)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"MICA_LOG": "warn"},
            )
        end = time.monotonic() + PATIENCE_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"mica serve does not answer:\n{self.log.read_text()}")
            time.sleep(0.05)
        # An open one makes no keys, and takes any.
        keys = self.directory / "keys"
        self.api_key = keys.read_text().splitlines()[0] if keys.exists() else "none"

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=1).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for root in (self.cgroup, pathlib.Path(f"{self.cgroup}-warm")):
            for group in (*root.glob("*/"), root):
                if group.is_dir():
                    # VM processes outlive a daemon that was killed.
                    (group / "cgroup.kill").write_text("1")
                    self.remove_group(group)
        shutil.rmtree(self.directory)

    @staticmethod
    def remove_group(group):
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return group.rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
