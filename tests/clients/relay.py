"""Carries TCP connections from this machine's address to the same port of its loopback.

    python3 relay.py PORT

Run inside the lab's host by tools/test-clients, for a daemon that is open and so listens on the loopback alone.
Waits for its port, which the daemon of before may still have. Refuses to look at what it carries.
"""

import asyncio
import errno
import socket
import sys

PIECE = 1 << 16
# The daemon of before ends its sandboxes first.
PATIENCE_S = 120
AGAIN_S = 0.1


def own_address():
    """Where packets to the outside come from. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


async def carry(reader, writer):
    try:
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    except OSError:
        # One end is gone: the other is told.
        writer.transport.abort()


async def relay(port, reader, writer):
    try:
        onward = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(carry(reader, onward[1]), carry(onward[0], writer))
    for end in (writer, onward[1]):
        end.close()


async def main(port):
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        try:
            server = await asyncio.start_server(lambda r, w: relay(port, r, w), own_address(), port)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(AGAIN_S)
    await server.serve_forever()


asyncio.run(main(int(sys.argv[1])))
