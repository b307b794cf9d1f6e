"""A stream: serves a byte every 0.2 s to whoever comes, or is such a client, that says nothing.

usage: ticker.py serve PORT
       ticker.py read PORT HOST 4|6 FILE
"""

import socket
import sys
import time
from pathlib import Path

what, port, *rest = sys.argv[1:]
if what == "serve":
    server = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    stream = server.accept()[0]
    while True:
        stream.send(b".")
        time.sleep(0.2)
else:
    host, version, file = rest
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}[version]
    stream = socket.socket(family)
    stream.connect(socket.getaddrinfo(host, int(port), family, socket.SOCK_STREAM)[0][4])
    with Path(file).open("wb", buffering=0) as out:
        while block := stream.recv(4096):
            out.write(block)
