"""Prints, as JSON, which TCP ports of HOST answer over IPv4 or IPv6: all 65535 are tried, or those that are named.

usage: scan.py HOST 4|6 [PORT...]
"""

from __future__ import annotations

import json
import resource
import select
import socket
import sys
import time

BATCH = 16384
PATIENCE = 2.0  # seconds without an answer; a lost first packet is sent again after one


def scan(address: tuple, family: int, ports: list[int]) -> list[int]:
    poll, waiting = select.epoll(), {}
    for port in ports:
        one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        one.connect_ex((address[0], port, *address[2:]))
        poll.register(one, select.EPOLLOUT)
        waiting[one.fileno()] = (port, one)
    found, end = [], time.monotonic() + PATIENCE
    while waiting and (left := end - time.monotonic()) > 0:
        for number, _ in poll.poll(left):
            port, one = waiting.pop(number)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(port)
            one.close()
    for _, one in waiting.values():
        one.close()
    return found


def main() -> None:
    name, version, *ports = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    batch = min(BATCH, hard - 64)
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}[version]
    address = socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)[0][4]
    wanted = [int(port) for port in ports] or list(range(1, 65536))
    found: list[int] = []
    for first in range(0, len(wanted), batch):
        found += scan(address, family, wanted[first : first + batch])
    print(json.dumps(sorted(found)))


main()
