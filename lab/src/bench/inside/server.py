"""Answers every request with the same few bytes, and keeps connections. Prints its port and its number once it listens,
and goes on in the background.

Run in a sandbox by `mica bench exec` (lab/src/bench/inside/mod.rs). Refuses to read what it is asked for.
"""

import os
import socket
import threading

BODY = b"hello from a sandbox"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def serve(client):
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = b""
    with client:
        while piece := client.recv(65536):
            head += piece
            if head.endswith(b"\r\n\r\n"):
                head = b""
                client.sendall(ANSWER)


def main():
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    child = os.fork()
    if child:
        # What it listens on is ready: a client may come before it does.
        print(listener.getsockname()[1], child)
        return
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()


main()
