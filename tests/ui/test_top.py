"""`mica top` on a terminal of its own: it draws, takes keys, and gives the terminal back."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

import pytest
from conftest import PROGRAMS

PATIENCE_S = 60
LEAVE_SCREEN = b"\x1b[?1049l"


class Terminal:
    """A program on a terminal of 130 columns and 40 rows, and all that it wrote."""

    def __init__(self, words, settings):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(list(map(str, words)), stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm-256color"} | settings)
        self.written = b""

    def wait_for(self, what, since=0):
        """Reads until it has written that, behind so many bytes."""
        end = time.monotonic() + PATIENCE_S
        while what not in self.written[since:]:
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"{what!r} did not come: {self.written[-2000:]!r}"
            self.written += os.read(self.ours, 65536)

    def press(self, key):
        """How much it had written before."""
        seen = len(self.written)
        os.write(self.ours, key)
        return seen

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def top(host):
    # As `mica lab env` and docs/dashboard.md set them.
    settings = {"E2B_API_URL": host.url, "E2B_API_KEY": host.key}
    terminal = Terminal([PROGRAMS / "mica", "top", "--interval", "1"], settings)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_it_follows_the_host_and_gives_the_terminal_back(host, top, key):
    host.kill_all()
    top.wait_for(b"sort:")
    made = host.create()
    top.wait_for(made.encode())
    seen = top.press(b"a")
    # What is drawn again is the line of keys: another name is the strong one.
    top.wait_for(b"ge", since=seen)
    seen = top.press(key)
    top.wait_for(LEAVE_SCREEN, since=seen)
    assert top.process.wait(timeout=PATIENCE_S) == 0
    assert termios.tcgetattr(top.theirs) == top.before
    host.kill_all()
