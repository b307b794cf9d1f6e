#!/usr/bin/python3
"""A client of the service, friendly or not, for a bare host: standard library only.

usage: client.py COMMAND < {"host": ..., "port": ..., "ca": ..., "key": ..., and what the command takes}

Prints its answer as JSON. Without "ca" it speaks plain HTTP, and without "address" it connects to "host".
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import resource
import socket
import ssl
import statistics
import struct
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hostile

Asked = dict[str, Any]
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def context(asked: Asked, protocol: str = "http/1.1") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=asked["ca"])
    made.set_alpn_protocols([protocol])
    return made


def connect(asked: Asked, protocol: str = "http/1.1") -> socket.socket:
    plain = socket.create_connection((asked.get("address", asked["host"]), asked.get("port", 443)), 20)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context(asked, protocol).wrap_socket(plain, server_hostname=asked["host"]) if "ca" in asked else plain


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, or says nothing more."""
    data = b""
    try:
        while block := connection.recv(65536):
            data += block
            connection.settimeout(0.7)
    except OSError:
        pass
    return data


def status(reply: bytes) -> int:
    """Of the first answer; 0 without one."""
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/") else 0


# --- commands -----------------------------------------------------------------------------------------------


def attack(asked: Asked) -> dict[str, Any]:
    """The status that each hostile request got, and the body if it is not JSON as OpenAI writes an error."""
    places = {
        "{key}": asked["key"],
        "{host}": asked["host"],
        "{sha256}": hashlib.sha256(asked["key"].encode()).hexdigest(),
    }

    def one(each: hostile.Attack) -> dict[str, Any]:
        request = each.request
        for place, value in places.items():
            request = request.replace(place, value)
        with connect(asked) as connection:
            try:
                connection.sendall(request.encode("latin-1"))
                for _ in range(each.body // hostile.MEGA):
                    connection.sendall(b"a" * hostile.MEGA)
            except OSError:
                pass  # the answer is there already
            reply = received(connection)
        body = reply.partition(b"\r\n\r\n")[2]
        return {"status": status(reply), "error": is_error(body), "answers": reply.count(b"HTTP/1.1 ")}

    with ThreadPoolExecutor(8) as pool:
        return dict(zip((each.name for each in hostile.ATTACKS), pool.map(one, hostile.ATTACKS), strict=True))


def is_error(body: bytes) -> bool:
    try:
        return set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    except (ValueError, LookupError, TypeError):
        return False


def ask(asked: Asked) -> dict[str, Any]:
    """Of "repeat" GETs of "path", or chats with "body": statuses and bodies of all, status and headers of the last."""
    message = request(asked, asked.get("path", hostile.CHAT), asked.get("body"))
    statuses: Counter[int] = Counter()
    bodies = []
    with connect(asked) as connection:
        for _ in range(asked.get("repeat", 1)):
            connection.sendall(message)
            reply = received_answer(connection)
            head, _, body = reply.decode().partition("\r\n\r\n")
            statuses[status(reply)] += 1
            bodies.append(body)
    fields = (line.partition(": ") for line in head.split("\r\n")[1:])
    headers = {name.lower(): value for name, _, value in fields}
    return {"status": status(reply), "statuses": statuses, "headers": headers, "bodies": bodies}


def slow(asked: Asked) -> dict[str, Any]:
    """How long the gateway waits for the rest of a request that is begun with the text in "begin"."""
    begin = asked["begin"].replace("{key}", asked["key"]).replace("{host}", asked["host"])
    with connect(asked) as connection:
        connection.sendall(begin.encode())
        connection.settimeout(60)
        start = time.monotonic()
        try:
            reply = connection.recv(65536)
        except OSError:
            reply = b""
        return {"seconds": time.monotonic() - start, "status": status(reply)}


def idle(asked: Asked) -> dict[str, Any]:
    """Opens "connections", silent or, with TLS, saying no more than "begin"; then asks as a client would."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    place = (asked.get("address", asked["host"]), 443)
    opened: list[socket.socket] = []
    for _ in range(asked["connections"]):
        if asked["begin"]:
            opened.append(connect(asked))
            opened[-1].sendall(asked["begin"].encode())
        else:
            opened.append(socket.create_connection(place, 20))
    times = []
    for _ in range(asked["requests"]):
        start = time.monotonic()
        with connect(asked) as connection:
            connection.sendall(request(asked, "/v1/models", None))
            answer = status(received_answer(connection))
        times.append(time.monotonic() - start)
        if answer != 200:
            return {"opened": len(opened), "status": answer}
    for each in opened:
        each.close()
    return {"opened": len(opened), "status": answer, "slowest": max(times)}


def resets(asked: Asked) -> dict[str, Any]:
    """HTTP/2: makes "streams" requests, ten at a time, and takes them back before they can be answered.

    What has come back, by the type of frame.
    """
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", hostile.CHAT),
        (":authority", asked["host"]),
        ("authorization", f"Bearer {asked['key']}"),
        ("content-type", "application/json"),
    ]
    block = b"".join(literal(name, value) for name, value in fields)
    with connect(asked, "h2") as connection:
        connection.sendall(HTTP2_PREFACE + frame(4, 0, 0))
        sent, start = 0, time.monotonic()
        body = json.dumps(asked["body"]).encode()
        try:
            for first in range(0, asked["streams"], 10):
                ten = [2 * number + 1 for number in range(first, first + 10)]
                connection.sendall(b"".join(frame(1, 4, each, block) + frame(0, 1, each, body) for each in ten))
                time.sleep(0.02)  # for the gateway to begin with them
                connection.sendall(b"".join(frame(3, 0, each, struct.pack(">I", 8)) for each in ten))
                sent += 10
        except OSError:
            pass  # closed for sending too many
        seconds = time.monotonic() - start
        data = received(connection)
    return {"sent": sent, "seconds": seconds, "frames": frames(data)}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header that is neither indexed nor compressed; both parts are shorter than 127."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def frames(data: bytes) -> dict[int, int]:
    """How many frames of each type there are."""
    found: Counter[int] = Counter()
    while len(data) >= 9:
        length = int.from_bytes(data[:3], "big")
        found[data[3]] += 1
        data = data[9 + length :]
    return found


# --- load ---------------------------------------------------------------------------------------------------


def request(asked: Asked, path: str, body: Any) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    head = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        f"Host: {asked['host']}",
        *([f"Authorization: Bearer {asked['key']}"] if "key" in asked else []),
        "Content-Type: application/json",
        f"Content-Length: {len(text)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + text


def received_answer(connection: socket.socket) -> bytes:
    """One answer with a Content-Length, on a connection that stays open."""
    data = b""
    while block := connection.recv(65536):
        data += block
        head, _, body = data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length and len(body) >= int(length):
            break
    return data


def latency(asked: Asked) -> dict[str, float]:
    """Of "requests" one after the other on one connection, each with the body "body"; "pause" seconds between them."""
    times, statuses = [], set()
    message = request(asked, hostile.CHAT, asked["body"])
    with connect(asked) as connection:
        for _ in range(asked["requests"]):
            start = time.perf_counter()
            connection.sendall(message)
            statuses.add(status(received_answer(connection)))
            times.append(time.perf_counter() - start)
            time.sleep(asked.get("pause", 0))
    times.sort()
    return {"p50": statistics.median(times), "p95": times[int(len(times) * 0.95)], "statuses": sorted(statuses)}


async def opened(asked: Asked) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = {"ssl": asked["context"], "server_hostname": asked["host"]} if "ca" in asked else {}
    return await asyncio.open_connection(asked.get("address", asked["host"]), asked.get("port", 443), **tls)


async def flooding(asked: Asked, until: float, found: Counter[int]) -> None:
    message = request(asked, hostile.CHAT, asked["body"])
    while time.monotonic() < until:
        reader, writer = await opened(asked)
        try:
            while time.monotonic() < until:
                begin = time.monotonic()
                writer.write(message)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                found[status(head)] += 1
                await asyncio.sleep(max(0, begin + asked["pause"] - time.monotonic()))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # after a thousand requests a connection is closed
        finally:
            writer.close()


async def flood(asked: Asked) -> dict[str, Any]:
    """How often each status came in "seconds", on "connections" that each send a request every "pause" seconds."""
    found: Counter[int] = Counter()
    asked["context"] = context(asked)
    start = time.monotonic()
    await asyncio.gather(*(flooding(asked, start + asked["seconds"], found) for _ in range(asked["connections"])))
    return {"seconds": time.monotonic() - start, "statuses": found}


async def streaming(asked: Asked) -> tuple[str, list[float]]:
    """One stream: "whole", or what was wrong with it; and when its events came."""
    times: list[float] = []
    try:
        reader, writer = await opened(asked)
        start = time.perf_counter()
        writer.write(request(asked, hostile.CHAT, asked["body"]))
        head = await reader.readuntil(b"\r\n\r\n")
        if status(head) != 200:
            return f"status {status(head)}", times
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                writer.close()
                return "whole", times
            if line.startswith(b"data: "):
                times.append(time.perf_counter() - start)
    except (OSError, asyncio.IncompleteReadError) as error:
        return f"{type(error).__name__}: {error}", times
    return f"cut after {len(times)} events", times


async def streams(asked: Asked) -> dict[str, Any]:
    """How "streams" streams at a time ended that were begun, one after the other, for "seconds"."""
    found: Counter[str] = Counter()
    asked["context"] = context(asked) if "ca" in asked else None
    until = time.monotonic() + asked["seconds"]

    async def one_after_the_other(number: int) -> None:
        await asyncio.sleep(number * 0.02)
        while time.monotonic() < until:
            end, times = await streaming(asked)
            if end == "whole" and len(times) != asked["body"]["max_tokens"]:
                end = f"{len(times)} events"
            found[end] += 1
            if end.startswith("status"):
                return

    await asyncio.gather(*(one_after_the_other(number) for number in range(asked["streams"])))
    return found


async def gaps(asked: Asked) -> dict[str, Any]:
    """The median time between the events of "streams" streams, one after the other."""
    asked["context"] = context(asked) if "ca" in asked else None
    found: list[float] = []
    for _ in range(asked["streams"]):
        end, times = await streaming(asked)
        if end != "whole":
            return {"end": end}
        found += [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"end": "whole", "median": statistics.median(found), "events": len(found)}


def main() -> None:
    command = {each.__name__: each for each in (attack, ask, slow, idle, resets, latency, flood, streams, gaps)}[
        sys.argv[1]
    ]
    answer = command(json.load(sys.stdin))
    print(json.dumps(asyncio.run(answer) if asyncio.iscoroutine(answer) else answer))


if __name__ == "__main__":
    main()
