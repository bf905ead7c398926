"""A kernel that compiles and runs each cell as a program: `python3 runner.py SPEC -f CONNECTION_FILE`.

SPEC is JSON: the `name` of the language, the `source` file's name, the commands to `compile` and to
`run` with `{source}` and `{program}` in them, and what to put `before` a cell unless it matches
`unless`. A cell's programs run one after another in the kernel's working directory; nothing of one
is left for the next but files. What the compiler says is the traceback of an error.

What the agent orders comes in the metadata of a cell's message, as for `kernel.py`.
"""

import codecs
import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile

# The directory of this file: nothing is imported from there.
del sys.path[0]
SPEC = json.loads(sys.argv.pop(1))

from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

# What a compiler may say about one cell.
MESSAGES_MAX = 256 * 1024
READ_MAX = 64 * 1024


class Failed(Exception):
    def __init__(self, name, value, traceback):
        super().__init__(value)
        self.content = {"ename": name, "evalue": value, "traceback": traceback}


class Runner(Kernel):
    implementation = "mica-runner"
    implementation_version = "1"
    banner = SPEC["name"]
    language_info = {"name": SPEC["name"], "mimetype": "text/plain", "file_extension": ".txt"}

    async def execute_request(self, stream, ident, parent):
        orders = parent["metadata"].get("mica") or {}
        become = orders.get("become") or {"set": {}, "unset": []}
        for name in become["unset"]:
            os.environ.pop(name, None)
        os.environ.update(become["set"])
        self.call = orders.get("push") or {}
        await super().execute_request(stream, ident, parent)

    def do_execute(self, code, silent, *_args, **_options):
        answer = {
            "status": "ok",
            "execution_count": self.execution_count,
            "payload": [],
            "user_expressions": {},
        }
        if silent or not code.strip():
            return answer
        directory = tempfile.mkdtemp(prefix="cell-")
        try:
            self.compile_and_run(code, directory)
        except Failed as failed:
            self.send_response(self.iopub_socket, "error", failed.content)
            return {**answer, **failed.content, "status": "error"}
        except KeyboardInterrupt:
            content = {"ename": "KeyboardInterrupt", "evalue": "", "traceback": []}
            self.send_response(self.iopub_socket, "error", content)
            return {**answer, **content, "status": "error"}
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return answer

    def compile_and_run(self, code, directory):
        source = os.path.join(directory, SPEC["source"])
        program = os.path.join(directory, "program")
        if not re.search(SPEC["unless"], code):
            code = SPEC["before"] + code
        with open(source, "w") as file:
            file.write(code)
        fill = {"source": source, "program": program}
        commands = [
            [part.format(**fill) for part in SPEC[step]] for step in ("compile", "run")
        ]
        environment = {**os.environ, **self.call}
        self.compile(commands[0], environment, directory)
        status = self.run_program(commands[1], environment)
        if status != 0:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise Failed("ExitError", how, [f"the program ended with {how}"])

    def compile(self, command, environment, directory):
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != 0:
            text = done.stdout[:MESSAGES_MAX].decode(errors="replace")
            text = text.replace(directory + os.sep, "")
            lines = [line for line in text.splitlines() if line and not line.startswith("#")]
            value = lines[0] if lines else f"the compiler ended with {done.returncode}"
            raise Failed("CompileError", value, [text])

    def run_program(self, command, environment):
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            with selectors.DefaultSelector() as waiting:
                for name in ("stdout", "stderr"):
                    decoder = codecs.getincrementaldecoder("utf-8")("replace")
                    output = getattr(child, name)
                    waiting.register(output, selectors.EVENT_READ, (name, decoder))
                while waiting.get_map():
                    for key, _ in waiting.select():
                        self.show(waiting, key)
            return child.wait()
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
            child.stdout.close()
            child.stderr.close()

    def show(self, waiting, key):
        name, decoder = key.data
        data = os.read(key.fd, READ_MAX)
        text = decoder.decode(data, final=not data)
        if text:
            self.send_response(self.iopub_socket, "stream", {"name": name, "text": text})
        if not data:
            waiting.unregister(key.fileobj)


IPKernelApp.launch_instance(kernel_class=Runner)
