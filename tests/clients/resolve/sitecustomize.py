"""Names below `localhost` are this machine, as RFC 6761 says; resolvers of distributions know only the one.

Read by Python at its start, where matrix.py puts this directory in PYTHONPATH. The client is not changed.
"""

import socket

system = socket.getaddrinfo


def getaddrinfo(host, *args, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name.rstrip(".").endswith(".localhost"):
        host = "127.0.0.1"
    return system(host, *args, **options)


socket.getaddrinfo = getaddrinfo
