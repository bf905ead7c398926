"""Features of the Python `e2b` clients that stand apart from the calls of one sandbox: the asynchronous client, URLs
of files, and pauses and snapshots that keep the disk alone.

Imported by features.py, whose rules hold here.
"""

import asyncio
import os
import urllib.error
import urllib.parse
import urllib.request

from common import RUN, SLOW, Own, Sandbox, pause_call, pids, start, takes, write

import e2b
from cells import ISOLATED, PATIENCE_S, TEMPLATE, absent, feature, raises, require, unique

try:
    from e2b_code_interpreter import AsyncSandbox
except ImportError:
    from e2b import AsyncSandbox


async def of_the_async_client():
    sandbox = await AsyncSandbox.create(TEMPLATE, timeout=900, request_timeout=PATIENCE_S)
    try:
        seen = []
        # Two at once, which is what it is for: each waits for the other.
        pipe = f"/tmp/{unique('pipe')}"
        await sandbox.commands.run(f"mkfifo {pipe}", **RUN)
        said, _ = await asyncio.gather(
            sandbox.commands.run(f"cat {pipe}", on_stdout=seen.append, **RUN),
            sandbox.commands.run(f"echo met > {pipe}; rm {pipe}", **RUN),
        )
        assert (said.stdout, "".join(seen), said.exit_code) == ("met\n", "met\n", 0), said
        path = f"/tmp/{unique('async')}/a"
        await sandbox.files.write(path, "ünï", **(SLOW if takes(sandbox.files.write, "request_timeout") else {}))
        assert await sandbox.files.read(path, **SLOW) == "ünï"
        if hasattr(sandbox, "run_code"):
            execution = await sandbox.run_code("6*7", **RUN)
            assert (execution.text, execution.error) == ("42", None), execution
        again = await AsyncSandbox.connect(sandbox.sandbox_id)
        assert await again.files.read(path, **SLOW) == "ünï"
    finally:
        await sandbox.kill(**SLOW)
    assert await sandbox.is_running(**SLOW) is False


@feature
def check_async():
    asyncio.run(of_the_async_client())


def fetched(url, data=None):
    """The status, and what the URL gave. Its own server is trusted by SSL_CERT_FILE, as the client does."""
    headers = {}
    if data is not None:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        data = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--b--\r\n' % data
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


@feature
def check_file_urls():
    if "E2B_SANDBOX_URL" in os.environ:
        absent("under E2B_SANDBOX_URL the client's URLs name no sandbox")
    secure = {"secure": True} if takes(getattr(Sandbox, "create", Sandbox), "secure") else {}
    with Own(**secure) as sandbox:
        path = f"/tmp/{unique('url')}/a b&ü"
        status, _ = fetched(sandbox.upload_url(path, use_signature_expiration=300), b"sent by URL")
        assert status == 200
        assert sandbox.files.read(path, **SLOW) == "sent by URL"
        write(sandbox, path, "written anew")
        url = sandbox.download_url(path, use_signature_expiration=300)
        assert fetched(url) == (200, b"written anew")
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query))
        # A signature is of one path, and one time.
        for other in ({"path": "/etc/passwd"}, {"signature_expiration": "1"}, {"signature": "v1_00"}):
            forged = parts._replace(query=urllib.parse.urlencode(query | other)).geturl()
            assert fetched(forged)[0] == 401, forged


@feature
def check_pause_disk():
    with Own() as sandbox:
        pause = pause_call(sandbox)
        words = {"mode": {"mode": "filesystem"}, "keep_memory": {"keep_memory": False}}
        options = next((words[name] for name in words if takes(pause, name)), None)
        if options is None:
            absent("the client has no pause that keeps the disk alone")
        counter = start(sandbox, "sleep 3600")
        # What lies in /tmp need not outlive a boot.
        kept = f"{'/home/user' if ISOLATED else '/tmp'}/{unique('kept')}"
        write(sandbox, kept, "on the disk")
        assert pause(**options, **SLOW) is True
        assert sandbox.get_info(**SLOW).state == e2b.SandboxState.PAUSED
        again = Sandbox.connect(sandbox.sandbox_id, timeout=600, request_timeout=PATIENCE_S)
        assert again.files.read(kept, **SLOW) == "on the disk"
        assert again.commands.run("echo back", **RUN).stdout == "back\n"
        assert counter.pid not in pids(again)
        raises(Exception, counter.wait)


@feature
def check_snapshot_disk():
    with Own() as source:
        snapshot = require(source, "create_snapshot")
        if not takes(snapshot, "mode"):
            absent("the client has no snapshot of the disk alone")
        counter = start(source, "sleep 3600")
        kept = f"{'/home/user' if ISOLATED else '/tmp'}/{unique('kept')}"
        write(source, kept, "on the disk")
        made = snapshot(mode="filesystem", **SLOW)
        # The source goes on with all that it has.
        assert counter.pid in pids(source)
        with Own(made.snapshot_id) as copy:
            assert copy.sandbox_id != source.sandbox_id
            assert copy.files.read(kept, **SLOW) == "on the disk"
            if ISOLATED:
                assert counter.pid not in pids(copy)
                boot = "cat /proc/sys/kernel/random/boot_id"
                boots = {one.commands.run(boot, **RUN).stdout for one in (source, copy)}
                assert len(boots) == 2, boots
        assert Sandbox.delete_snapshot(made.snapshot_id, **SLOW) is True
