# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""vllm_ready run as a module, against real HTTP servers on loopback and stand-ins for systemctl and journalctl."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.modules import vllm_ready

KEY = "sk-of-the-engine-7c1f"
ANSWER = b'{"choices": [{"text": " I"}], "usage": {"completion_tokens": 1}}'
EMBEDDING = b'{"data": [{"embedding": [0.5]}]}'


@dataclass
class Engine:
    """What the server does, and what it was asked."""

    health: list[int] = field(default_factory=lambda: [200])  # one status a call, the last one ever after
    status: int = 200
    body: bytes = ANSWER
    cut: int = 0  # bytes that are promised and not sent
    delay: float = 0.0  # of the completion
    requests: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.engine.requests.append({"path": self.path, "key": self.headers["Authorization"]})
        health = self.engine.health
        self.reply(health.pop(0) if len(health) > 1 else health[0], b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.engine.requests.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
        time.sleep(self.engine.delay)
        if self.headers["Authorization"] not in (None, f"Bearer {KEY}"):
            self.reply(401, json.dumps({"error": f"Unauthorized: {self.headers['Authorization']}"}).encode())
        else:
            self.reply(self.engine.status, self.engine.body)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + (self.engine.cut if body else 0)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(engine: Engine, address: str = "127.0.0.1") -> Iterator[Engine]:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    server = Server((address, engine.port), type("Bound", (Handler,), {"engine": engine}))
    engine.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


Module = Callable[..., dict[str, Any]]


@pytest.fixture
def module(run_module: Any, systemd: Any) -> Module:
    """Waits for instances a, b, ... on the given ports."""

    def run(*ports: int, host: str = "127.0.0.1", key: str = KEY, check: bool = False, **options: Any) -> Any:
        kind = options.pop("kind", "completion")
        names = "abc"[: len(ports)]
        known = json.loads(systemd.state_file.read_text())["units"]
        for name in names:
            (systemd.config_dir / f"{name}.env").write_text(f'# managed\nVLLM_API_KEY="{key}"\n' if key else "X=1\n")
            if f"vllm@{name}.service" not in known:
                systemd.unit(name)
        instances = [
            {"name": name, "host": host, "port": port, "kind": kind} for name, port in zip(names, ports, strict=True)
        ]
        answer = run_module(
            "vllm_ready",
            {"instances": instances, "config_dir": str(systemd.config_dir), "timeout": 0, **options},
            patch={"PAUSE": 0.1},
            environment={**systemd.environment, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
            check=check,
        )
        assert KEY not in json.dumps(answer)
        assert not answer.get("changed")
        return answer

    return run


def test_instance_that_answers_is_ready(module: Module) -> None:
    with serving(Engine()) as engine:
        answer = module(engine.port)
    assert (answer["ready"], answer["waiting_for"]) == (True, {})
    assert engine.requests == [
        {"path": "/health", "key": None},
        {
            "path": "/v1/completions",
            "key": f"Bearer {KEY}",
            "body": {"model": "a", "prompt": "Hello", "max_tokens": 1, "temperature": 0},
        },
    ]


def test_pooling_model_is_asked_for_an_embedding(module: Module) -> None:
    with serving(Engine(body=EMBEDDING)) as engine:
        assert module(engine.port, kind="embedding")["ready"]
    assert engine.requests[1]["path"] == "/v1/embeddings"
    assert engine.requests[1]["body"] == {"model": "a", "input": "Hello"}


def test_engine_without_a_key(module: Module) -> None:
    with serving(Engine()) as engine:
        assert module(engine.port, key="")["ready"]
    assert engine.requests[1]["key"] is None


@pytest.mark.parametrize(
    ("listens", "asked"),
    [("::1", "::1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::")],  # noqa: S104 - asked for, not bound to
)
def test_addresses(module: Module, listens: str, asked: str) -> None:
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(serving(Engine(), listens))
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert module(engine.port, host=asked)["ready"]


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (
            Engine(status=500, body=b'{"error": {"message": "EngineCore encountered an issue."}}'),
            "/v1/completions answers 500: EngineCore encountered an issue.",
        ),
        (Engine(status=500, body=b"Internal Server Error"), "/v1/completions answers 500: b'Internal Server Error'"),
        (
            Engine(status=404, body=b'{"error": {"message": "The model `a` does not exist."}}'),
            "/v1/completions answers 404: The model `a` does",
        ),
        (Engine(body=b""), "/v1/completions answers without a token: b''"),
        (Engine(body=b"<html>"), "/v1/completions answers without a token: b'<html>'"),
        (Engine(body=ANSWER.replace(b"1}", b"0}")), "/v1/completions answers without a token: "),
        (Engine(body=EMBEDDING), "/v1/completions answers without a token: "),
        (Engine(cut=5), "/v1/completions"),
    ],
)
def test_health_alone_is_not_enough(module: Module, systemd: Any, engine: Engine, expected: str) -> None:
    systemd.log("a", "INFO Starting", "torch.OutOfMemoryError: CUDA out of memory.")
    with serving(engine):
        answer = module(engine.port, timeout=30)
    assert answer["failed"]
    assert answer["ready"] is False
    assert "vllm@a" in answer["msg"]
    assert f"is healthy but does not answer: {expected}" in answer["msg"]
    assert "torch.OutOfMemoryError: CUDA out of memory." in answer["msg"]
    assert "journalctl -u vllm@a" in answer["msg"]
    assert answer["journal"] == ["INFO Starting", "torch.OutOfMemoryError: CUDA out of memory."]


def test_wrong_key_is_told_without_the_key(module: Module) -> None:
    wrong = "sk-another-key-0000"
    with serving(Engine()) as engine:
        answer = module(engine.port, key=wrong)
    assert answer["failed"]
    assert "/v1/completions answers 401" in answer["msg"]
    assert wrong not in json.dumps(answer)


def test_nobody_listens_yet(module: Module, systemd: Any) -> None:
    systemd.log("a", "older", "Loading safetensors checkpoint shards: 40% Completed")
    answer = module(free_port())
    assert not answer.get("failed")
    assert answer["ready"] is False
    assert answer["waiting_for"] == {"a": "Loading safetensors checkpoint shards: 40% Completed"}


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_something_else_listens(module: Module, greeting: bytes) -> None:
    """What is no HTTP is not healthy, whatever it says; whether a port is taken is found out before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(greeting)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        answer = module(server.getsockname()[1])
        thread.join()
    assert answer["ready"] is False
    assert not answer.get("failed")


def test_listens_after_a_while(module: Module) -> None:
    engine = Engine(port=free_port())
    stack = ExitStack()
    timer = threading.Timer(0.4, lambda: stack.enter_context(serving(engine)))
    timer.start()
    with stack:
        assert module(engine.port, timeout=20)["ready"]
        timer.join()


def test_healthy_after_a_while(module: Module) -> None:
    with serving(Engine(health=[503, 503, 200])) as engine:
        assert module(engine.port, timeout=20)["ready"]
    assert [request["path"] for request in engine.requests] == ["/health"] * 3 + ["/v1/completions"]


def test_unhealthy_until_the_end(module: Module) -> None:
    with serving(Engine(health=[503])) as engine:
        began = time.monotonic()
        answer = module(engine.port, timeout=1)
    assert 1 <= time.monotonic() - began < 10
    assert (answer["ready"], answer["waiting_for"]) == (False, {"a": ""})
    assert not answer.get("failed")


def test_first_token_may_take_its_time(module: Module) -> None:
    """Longer than the health check's patience, 0.5 s here: the first token may compile kernels."""
    with serving(Engine(delay=0.8)) as engine:
        assert module(engine.port)["ready"]


def test_each_instance_is_asked_until_it_has_answered(module: Module) -> None:
    with serving(Engine()) as first, serving(Engine(health=[503, 200])) as second:
        assert module(first.port, second.port, timeout=20)["ready"]
    assert [len(engine.requests) for engine in (first, second)] == [2, 3]
    assert [engine.requests[-1]["body"]["model"] for engine in (first, second)] == ["a", "b"]


def test_only_those_that_have_not_answered_are_waited_for(module: Module, systemd: Any) -> None:
    systemd.log("b", "Capturing CUDA graphs")
    with serving(Engine()) as engine:
        answer = module(engine.port, free_port())
    assert (answer["ready"], answer["waiting_for"]) == (False, {"b": "Capturing CUDA graphs"})


def test_no_instances(module: Module) -> None:
    answer = module()
    assert (answer["ready"], answer["waiting_for"]) == (True, {})


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}, "is not running (exit-code)"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "is not running (success)"),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "Result": "oom-kill", "NRestarts": "1"},
            "has crashed and is being started again (oom-kill)",
        ),
    ],
)
def test_instance_that_does_not_run_fails_at_once(
    module: Module, systemd: Any, state: dict[str, str], expected: str
) -> None:
    systemd.unit("a", **state)
    systemd.log("a", "ERROR 11-21 09:47:22 [core.py:953] ValueError: No available memory for the cache blocks.")
    began = time.monotonic()
    answer = module(free_port(), timeout=60)
    assert time.monotonic() - began < 30
    assert answer["failed"]
    assert expected in answer["msg"]
    assert "ValueError: No available memory for the cache blocks." in answer["msg"]


def test_crash_while_waiting(module: Module, systemd: Any) -> None:
    """Between two looks systemd may have started it again already."""
    systemd.unit("a", NRestarts="2")
    systemd.later(3, "a", NRestarts="3", Result="signal")
    answer = module(free_port(), timeout=60)
    assert answer["failed"]
    assert "has crashed and is being started again (signal)" in answer["msg"]


def test_crashes_of_the_past_do_not_count(module: Module, systemd: Any) -> None:
    systemd.unit("a", NRestarts="2")
    with serving(Engine(health=[503, 503, 200])) as engine:
        assert module(engine.port, timeout=20)["ready"]


def test_journal_without_an_exception(module: Module, systemd: Any) -> None:
    systemd.unit("a", ActiveState="failed", SubState="failed", Result="timeout")
    answer = module(free_port())
    assert "is not running (timeout): the journal names no exception. See: journalctl -u vllm@a" in answer["msg"]
    assert answer["journal"] == []


def test_key_in_the_journal_is_not_passed_on(module: Module, systemd: Any) -> None:
    systemd.unit("a", ActiveState="failed", SubState="failed")
    systemd.log("a", f"ValueError: api_key {KEY}")
    assert module(free_port())["failed"]  # the fixture looks for the key


def test_check_mode_asks_nobody(module: Module, systemd: Any) -> None:
    with serving(Engine()) as engine:
        answer = module(engine.port, check=True)
    assert answer["ready"]
    assert engine.requests == []
    assert json.loads(systemd.state_file.read_text())["shows"] == 0


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("10.0.0.1", "http://10.0.0.1:8000"),
        ("fd77::1", "http://[fd77::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104 - asked for, not bound to
        ("::", "http://[::1]:8000"),
    ],
)
def test_urls(host: str, url: str) -> None:
    assert vllm_ready.base_url({"host": host, "port": 8000}) == url
