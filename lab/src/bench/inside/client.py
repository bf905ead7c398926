"""Asks the server beside it, from so many clients at once, each so often over a connection of its own. Prints how long all of
it took, and then how long each answer took, in nanoseconds.

Run in a sandbox by `mica bench exec` (lab/src/bench/inside/mod.rs): `PORT CLIENTS CALLS`. Every client is a process, so
that none waits for another's interpreter. Refuses every answer but the server's: then it ends with 1.
"""

import os
import socket
import sys
import time
import traceback

PORT, CLIENTS, CALLS = map(int, sys.argv[1:])
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"hello from a sandbox"


def ask(server):
    server.sendall(REQUEST)
    answer = b""
    while not answer.endswith(BODY):
        piece = server.recv(65536)
        if not piece:
            raise ConnectionError(f"not the server's answer: {answer}")
        answer += piece
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"not the server's answer: {answer}")


def connected(ready):
    """A connection that was used once. Says that it is there, or that it will not be."""
    try:
        server = socket.create_connection(("127.0.0.1", PORT))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ask(server)
    except BaseException:
        os.write(ready, b"x")
        raise
    os.write(ready, b".")
    return server


def client(ready, go, out):
    with connected(ready) as server:
        # Nothing is written to it: it ends when all are ready.
        os.read(go, 1)
        begun, times = time.monotonic_ns(), []
        for _ in range(CALLS):
            sent = time.perf_counter_ns()
            ask(server)
            times.append(time.perf_counter_ns() - sent)
        numbers = [begun, time.monotonic_ns(), *times]
    with open(out, "w") as file:
        file.write(" ".join(map(str, numbers)))


def start(ready, go):
    """Starts a client; where its numbers will come."""
    (read_ready, write_ready), (read_go, write_go) = ready, go
    read, write = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            for fd in (read_ready, write_go, read):
                os.close(fd)
            client(write_ready, read_go, write)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    return read


def main():
    ready, go = os.pipe(), os.pipe()
    outs = [start(ready, go) for _ in range(CLIENTS)]
    if any(os.read(ready[0], 1) != b"." for _ in range(CLIENTS)):
        sys.exit("a client has no connection")
    os.close(go[1])
    found = []
    for out in outs:
        with open(out) as file:
            found.append(list(map(int, file.read().split())))
    if not all(len(one) == CALLS + 2 for one in found):
        sys.exit("a client gave up")
    print(max(one[1] for one in found) - min(one[0] for one in found))
    for one in found:
        print(*one[2:])


main()
