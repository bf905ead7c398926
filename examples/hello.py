#!/usr/bin/env python3
"""Runs code in a Mica sandbox through the unmodified E2B SDK, and says how long each step took.

Needs the PyPI packages e2b and e2b-code-interpreter, and E2B_API_URL, E2B_SANDBOX_URL and
E2B_API_KEY in the environment (`eval "$(mica lab env)"` sets them). Exits 0 only if every step
gave the result it should.
"""

import sys
import threading
import time

from e2b_code_interpreter import Sandbox

# An emulated host runs guests about 24 times slower than a real one.
PATIENCE_S = 600


class Step:
    """One timed step: prints a line when it ends, and a sign of life every five seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.ended = threading.Event()

    def __enter__(self) -> "Step":
        self.start = time.monotonic()
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.ticker.start()
        return self

    def _tick(self) -> None:
        while not self.ended.wait(5):
            waited = time.monotonic() - self.start
            print(f"    ... {self.title}: {waited:.0f} s", flush=True)

    def __exit__(self, kind, error, trace) -> None:
        self.ended.set()
        self.ticker.join()
        word = "ok" if kind is None else f"FAILED: {error}"
        took_ms = (time.monotonic() - self.start) * 1000
        print(f"{self.title:<28} {took_ms:>10.1f} ms  {word}", flush=True)


def expect(what: str, condition: bool) -> None:
    if not condition:
        raise AssertionError(what)


def indent(text: str) -> None:
    for line in text.rstrip("\n").splitlines():
        print(f"    {line}", flush=True)


def main() -> None:
    with Step("create a sandbox"):
        sandbox = Sandbox.create(timeout=3600, request_timeout=PATIENCE_S)
    indent(f"id {sandbox.sandbox_id}")
    try:
        with Step("run_code"):
            execution = sandbox.run_code(
                "print('Hello from Mica')", timeout=PATIENCE_S, request_timeout=PATIENCE_S
            )
            expect(f"no error, got {execution.error}", execution.error is None)
            stdout = "".join(execution.logs.stdout)
            expect(f"stdout was {stdout!r}", stdout == "Hello from Mica\n")
        indent(stdout)

        with Step("commands.run"):
            result = sandbox.commands.run(
                "uname -a; nproc; free -m", timeout=PATIENCE_S, request_timeout=PATIENCE_S
            )
            expect(f"exit code was {result.exit_code}", result.exit_code == 0)
            expect("uname says Linux", result.stdout.startswith("Linux "))
            expect("free shows memory", "Mem:" in result.stdout)
        indent(result.stdout)

        text = "written through the SDK\n" * 1000
        with Step("write a file"):
            sandbox.files.write("/home/user/hello.txt", text, request_timeout=PATIENCE_S)
        with Step("read it back"):
            back = sandbox.files.read("/home/user/hello.txt", request_timeout=PATIENCE_S)
            expect("the file is what was written", back == text)
        indent(f"{len(back)} bytes, the same")
    finally:
        with Step("kill"):
            killed = sandbox.kill(request_timeout=PATIENCE_S)
            expect("kill found the sandbox", killed is True)
    with Step("it is gone"):
        expect("is_running is false", sandbox.is_running(request_timeout=PATIENCE_S) is False)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the step already printed where
        print(f"\nhello.py failed: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print("\nAll of it worked.")
