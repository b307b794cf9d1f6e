"""Something that listens where nobody is meant to come: answers whoever connects to the port by TCP or UDP.

usage: listener.py PORT [hold]    With hold, connections stay open.
"""

import select
import socket
import sys

port, hold = int(sys.argv[1]), sys.argv[2:] == ["hold"]
held = []
tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
udp.bind(("::", port))
while True:
    for ready in select.select([tcp, udp], [], [])[0]:
        if ready is tcp:
            held.append(tcp.accept()[0])
            if not hold:
                held.pop().close()
        else:
            udp.sendto(b"answer", udp.recvfrom(16)[1])
