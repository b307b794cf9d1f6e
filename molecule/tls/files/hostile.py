"""Hostile requests and what has to come of each. Standard library only: it runs on a bare host.

A request is what goes over the wire. {key} stands for a good key, {host} for the service's name. The answer is a
status; 0 means that the connection is closed without one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

AUTH = "Host: {host}\r\nAuthorization: Bearer {key}\r\n"
JSON = "Content-Type: application/json\r\n"
CHAT = "/v1/chat/completions"
GOOD = '{"model": "standin", "messages": []}'
MEGA = 1 << 20


@dataclass(frozen=True)
class Attack:
    name: str
    request: str
    status: int
    body: int = 0  # so many more bytes are sent after it, as far as the other side takes them


def get(path: str, more: str = "", method: str = "GET") -> str:
    return f"{method} {path} HTTP/1.1\r\n{AUTH}{more}\r\n"


def post(body: str, path: str = CHAT, more: str = JSON, method: str = "POST") -> str:
    return f"{method} {path} HTTP/1.1\r\n{AUTH}{more}Content-Length: {len(body)}\r\n\r\n{body}"


def chunked(path: str, more: str, chunks: str) -> str:
    return f"POST {path} HTTP/1.1\r\n{AUTH}{JSON}{more}\r\n{chunks}"


PATHS = [
    Attack("double slash and dots", post(GOOD, "//v1/../invocations"), 404),
    Attack("dots to another path", post(GOOD, "/v1/../invocations"), 404),
    Attack("encoded dots", post(GOOD, "/v1/%2e%2e/invocations"), 404),
    Attack("dots above the root", post(GOOD, "/%2e%2e/%2e%2e/invocations"), 400),
    Attack("dots behind an open path", get(f"{CHAT}/../../metrics"), 404),
    Attack("more dots behind an open path", get(f"{CHAT}/../../../metrics"), 404),
    Attack("encoded slashes", get("/v1/models%2f..%2f..%2fmetrics"), 404),
    Attack("doubly encoded dots", get("/v1/models/%252e%252e/%252e%252e/metrics"), 404),
    Attack("path parameter", get("/v1/models;/../../metrics"), 404),
    Attack("slash at the end", get("/v1/models/"), 404),
    Attack("NUL in the path", get("/v1/models%00"), 400),
    Attack("line end in the path", get("/v1/models%0d%0aX-Injected:%201"), 404),
    Attack("backslash", get("/v1%5cmodels"), 404),
    Attack("capitals", get("/V1/Models"), 404),
    Attack("overlong UTF-8", get("/v1/%c0%ae%c0%ae/metrics"), 404),
    Attack("the gateway's own path", post(GOOD, f"/.llmfleet/1{CHAT}"), 404),
    Attack("the gateway's own error page", get("/.llmfleet/error"), 404),
    Attack("the gateway's own answer", get("/.llmfleet/answer"), 404),
    Attack("vLLM's inference without a key", post(GOOD, "/invocations"), 404),
    Attack("vLLM's metrics", get("/metrics"), 404),
    Attack("vLLM's adapters", post("{}", "/v1/load_lora_adapter"), 404),
    Attack("path by header", get("/nothing", "X-Original-URL: /v1/models\r\nX-Rewrite-URL: /v1/models\r\n"), 404),
]
HOSTS = [
    Attack("another host", get("/v1/models").replace("{host}", "evil.example"), 0),
    Attack("the loopback address", get("/v1/models").replace("{host}", "127.0.0.1:8000"), 0),
    Attack("no host", get("/v1/models").replace("Host: {host}\r\n", ""), 0),
    Attack("two hosts", get("/v1/models", "Host: evil.example\r\n"), 400),
    Attack("user in the host", get("/v1/models").replace("{host}", "{host}@evil.example"), 0),
    Attack("slash in the host", get("/v1/models").replace("{host}", "{host}/x"), 400),
    Attack("absolute form of another host", get("http://evil.example/v1/models"), 0),
    Attack("absolute form of a closed path", get("http://{host}/metrics"), 404),
    Attack("absolute form of the engine", get("http://10.77.5.11:8000/v1/models"), 0),
]
SMUGGLING = [
    Attack(
        "length and chunks",
        chunked(CHAT, "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"),
        400,
    ),
    Attack(
        "chunks and length",
        chunked(CHAT, "Transfer-Encoding: chunked\r\nContent-Length: 60\r\n", "0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"),
        400,
    ),
    Attack("two lengths", get(CHAT, "Content-Length: 0\r\nContent-Length: 44\r\n", "POST"), 400),
    Attack("signed length", get(CHAT, "Content-Length: +5\r\n", "POST"), 400),
    Attack("negative length", get(CHAT, "Content-Length: -1\r\n", "POST"), 400),
    Attack("list of lengths", get(CHAT, "Content-Length: 5, 5\r\n", "POST"), 400),
    Attack("unknown encoding", chunked(CHAT, "Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), 501),
    Attack("two encodings", chunked(CHAT, "Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"), 501),
    Attack("encoding twice", chunked(CHAT, "Transfer-Encoding: chunked\r\n" * 2, "0\r\n\r\n"), 400),
    Attack("space before the colon", chunked(CHAT, "Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), 400),
    Attack("chunk size that is none", chunked(CHAT, "Transfer-Encoding: chunked\r\n", "zz\r\n\r\n"), 400),
    Attack("chunk size that overflows", chunked(CHAT, "Transfer-Encoding: chunked\r\n", "f" * 20 + "\r\n\r\n"), 400),
    Attack(
        "chunks in HTTP/1.0", chunked(CHAT, "Transfer-Encoding: chunked\r\n", "0\r\n\r\n").replace("1.1", "1.0"), 400
    ),
    Attack("header folded", get("/metrics", "X-A: 1\r\n Transfer-Encoding: chunked\r\n"), 400),
    Attack("NUL in a header", get("/metrics", "X-A: \0\r\n"), 400),
    Attack("carriage return in a header", get("/metrics", "X-A: 1\rTransfer-Encoding: chunked\r\n"), 400),
]
HEADERS = [
    Attack("large header", get("/v1/models", f"X-A: {'a' * 40_000}\r\n"), 431),
    Attack("many headers", get("/v1/models", f"X-A: {'a' * 100}\r\n" * 500), 431),
    Attack("long path", get(f"/v1/{'a' * 40_000}"), 414),
    Attack("key twice", get("/v1/models", "Authorization: Bearer {key}\r\n"), 400),
    Attack("other scheme", get("/v1/models").replace("Bearer", "Basic"), 401),
    Attack("empty key", get("/v1/models").replace("{key}", ""), 401),
    Attack("key with more behind it", get("/v1/models").replace("{key}", "{key} {key}"), 401),
    Attack("a key's hash as the key", get("/v1/models").replace("{key}", "{sha256}"), 401),
    Attack("no key and a closed path", get("/metrics").replace("Authorization", "X-Other"), 401),
    Attack("no key and the error page", get("/.llmfleet/error").replace("Authorization", "X-Other"), 401),
    Attack("no key and the answer", get("/.llmfleet/answer").replace("Authorization", "X-Other"), 401),
    Attack("no key and an old error page", get("/.llmfleet/unauthorized").replace("Authorization", "X-Other"), 401),
    Attack("no key and the answer, encoded", get("/x/..//%2ellmfleet/answer").replace("Authorization", "X-Other"), 401),
    Attack(
        "no key and a large body", get(CHAT, f"Content-Length: {3 * MEGA}\r\n", "POST").replace("Auth", "X"), 401, MEGA
    ),
]
BODIES = [
    Attack("large body", get(CHAT, f"{JSON}Content-Length: {5 * MEGA}\r\n", "POST"), 413, MEGA),
    Attack("large body in chunks", chunked(CHAT, "Transfer-Encoding: chunked\r\n", f"{5 * MEGA:x}\r\n"), 413, 6 * MEGA),
    Attack("no JSON", post("{"), 400),
    Attack("JSON that names no model", post("[]"), 400),
    Attack("null", post("null"), 400),
    Attack("model that is a list", post('{"model": ["standin"]}'), 400),
    Attack("model that is a property", post('{"model": "__proto__"}'), 404),
    Attack("model with a path", post('{"model": "../../metrics"}'), 404),
    Attack("nested deep", post('{"model": "standin", "a": ' + "[" * 5000 + "]" * 5000 + "}"), 400),
    Attack("many arrays", post('{"model": "standin", "a": [' + ",".join(["[]"] * 110_000) + "]}"), 400),
    Attack("many objects", post('{"model": "standin", "a": [' + ",".join(["{}"] * 110_000) + "]}"), 400),
    Attack("UTF-16", post('{\0"\0m\0o\0d\0e\0l\0"\0:\0"\0s\0"\0}\0'), 400),
    Attack("huge n", post('{"model": "standin", "n": 1000000}'), 400),
    Attack("huge n in words", post('{"model": "standin", "n": "1000000"}'), 400),
    Attack("huge n twice", post('{"model": "standin", "n": 1, "\\u006e": 1e6}'), 400),
    Attack("infinite n", post('{"model": "standin", "n": 1e999}'), 400),
    Attack("huge best_of", post('{"model": "standin", "n": 1, "best_of": 1000000}'), 400),
    Attack("many prompts", post(json.dumps({"model": "standin", "prompt": ["a"] * 129}), "/v1/completions"), 400),
    Attack("many prompts of n", post('{"model": "standin", "prompt": ["a", [1]], "n": 65}', "/v1/completions"), 400),
]
METHODS = [
    Attack("TRACE", get("/v1/models", method="TRACE"), 405),
    Attack("CONNECT", get("10.77.5.11:8000", method="CONNECT"), 400),
    Attack("OPTIONS", get("*", method="OPTIONS"), 400),
    Attack("DELETE", get(CHAT, method="DELETE"), 405),
    Attack("PUT", post(GOOD, method="PUT"), 405),
    Attack("GET where POST is right", get(CHAT), 405),
    Attack("POST where GET is right", post(GOOD, "/v1/models"), 405),
    Attack("method by header", get(CHAT, "X-HTTP-Method-Override: POST\r\n"), 405),
    Attack("small letters", get("/v1/models", method="get"), 400),
    Attack("HTTP/0.9", "GET /v1/models\r\n", 0),
    Attack("HTTP/3.0 over TCP", get("/v1/models").replace("HTTP/1.1", "HTTP/3.0"), 505),
    Attack("websocket", get("/v1/realtime", "Connection: Upgrade\r\nUpgrade: websocket\r\n"), 404),
    Attack("websocket on an open path", get(CHAT, "Connection: Upgrade\r\nUpgrade: websocket\r\n"), 405),
    Attack(
        "HTTP/2 in clear", get("/metrics", "Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"), 404
    ),
    Attack("HTTP/2 without being asked", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    Attack("no HTTP at all", "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400),
]
ATTACKS = [*PATHS, *HOSTS, *SMUGGLING, *HEADERS, *BODIES, *METHODS]
