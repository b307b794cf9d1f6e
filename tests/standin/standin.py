#!/usr/bin/python3
"""Stands in for vLLM where vLLM's own speed would hide what is measured: answers at once, or as slowly as it is told.

usage: standin.py PORT...

The request's JSON body says how: wait (seconds before the answer), stream, max_tokens and gap (seconds between events),
die (no answer at all).
GET /count, which no gateway passes on, says how many other requests have come.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

HEADERS = "HTTP/1.1 200 OK\r\nServer: uvicorn\r\nX-Litellm-Model-Api-Base: http://10.0.0.1:8000\r\nContent-Type: "


class Standin:
    def __init__(self, port: int) -> None:
        self.port = port
        self.counts: Counter[str] = Counter()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                method, path = lines[0].split(" ")[:2]
                await self.answer(writer, method, path, json.loads(body or b"{}"))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter, method: str, path: str, asked: dict[str, Any]) -> None:
        if path == "/count":
            return await self.send(writer, {"port": self.port, **self.counts})
        self.counts["requests"] += 1
        if path == "/v1/models":
            return await self.send(writer, {"object": "list", "data": [{"id": "standin", "object": "model"}]})
        if asked.get("die"):
            raise ConnectionError
        await asyncio.sleep(asked.get("wait", 0))
        if not asked.get("stream"):
            return await self.send(writer, {"port": self.port})
        writer.write(f"{HEADERS}text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for number in range(asked["max_tokens"]):
            self.chunk(writer, json.dumps({"port": self.port, "choices": [{"delta": {"content": f"{number} "}}]}))
            await writer.drain()
            await asyncio.sleep(asked.get("gap", 0))
        self.chunk(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        self.counts["ended"] += 1
        return None

    def chunk(self, writer: asyncio.StreamWriter, text: str) -> None:
        event = f"data: {text}\n\n".encode()
        writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    async def send(self, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        writer.write(f"{HEADERS}application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


async def main() -> None:
    for port in map(int, sys.argv[1:]):
        await asyncio.start_server(Standin(port).connected, "127.0.0.1", port, backlog=1000)
    await asyncio.Event().wait()


asyncio.run(main())
