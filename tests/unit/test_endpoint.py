# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""endpoint_check against a real HTTPS server on this machine that does one thing wrong at a time."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "collections"))
endpoint = importlib.import_module("ansible_collections.llmfleet.serving.plugins.module_utils._endpoint")

KEY = "sk-good-9f1c7a52"
NAME = "llm.test"
CHUNKS = 24
CLOSED = ["/metrics", "/invocations"]


@dataclass
class Server:
    """What the server does. Times are far above a scheduler's slice: the tests do not hang on a quiet machine."""

    certificate_name: str = NAME
    days: int = 30
    family: socket.AddressFamily = socket.AF_INET
    block: int = 1  # chunks sent at a time
    bursts: int = 0  # so many replies are sent at once, later ones as ``block`` says
    chunks: int = CHUNKS
    listed: str = '{"data": [{"id": "other"}, {"id": "tiny"}]}'
    embedding: str = '{"data": [{"embedding": [0.5, 0.25]}]}'
    without_key: int = 401
    wrong_key: int = 401
    answers: dict[str, int] = field(default_factory=dict)
    insert: str | None = None  # an event in the middle of the stream
    end: str = "data: [DONE]\n\n"
    cut: bool = False
    hosts: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    connections: int = 0
    port: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    behaviour: Server

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        status = self.status()
        self.reply(status, self.behaviour.listed if self.path == "/v1/models" else "{}")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.status()
        if status == 200 and self.path == "/v1/embeddings":
            self.reply(status, self.behaviour.embedding)
        elif status == 200:
            assert request["stream"]
            assert request["temperature"] > 0
            self.stream()
        else:
            self.reply(status, json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}))

    def status(self) -> int:
        self.behaviour.hosts.add(self.headers["Host"])
        match self.headers["Authorization"]:
            case None:
                key = self.behaviour.without_key
            case given if given != f"Bearer {KEY}":
                key = self.behaviour.wrong_key
            case _:
                key = 200
        known = 200 if self.path.startswith("/v1/") else 404
        return key if key != 200 else self.behaviour.answers.get(self.path, known)

    def reply(self, status: int, body: str) -> None:
        if not status:  # nginx's 444
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body.encode())

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [self.event({"role": "assistant", "content": ""})]
        events += [self.event({"content": f"{number} "}) for number in range(self.behaviour.chunks)]
        if self.behaviour.insert:
            events.insert(len(events) // 2, self.behaviour.insert)
        if self.behaviour.cut:
            self.wfile.write("".join(events[: len(events) // 2]).encode() + b"ff\r\ndata: {")
            self.close_connection = True
            return
        block = self.behaviour.block
        if self.behaviour.bursts:
            self.behaviour.bursts -= 1
            block = len(events)
        for first in range(0, len(events), block):
            time.sleep(0.01)
            self.wfile.write("".join(events[first : first + block]).encode())
        usage = 'data: {"choices": [], "usage": {"completion_tokens": 48}}\n\n'
        self.wfile.write((self.chunk(usage) + self.chunk(self.behaviour.end) + "0\r\n\r\n").encode())

    def event(self, delta: dict[str, str]) -> str:
        return self.chunk(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n")

    @staticmethod
    def chunk(data: str) -> str:
        return f"{len(data):x}\r\n{data}\r\n" if data else ""


def write_certificate(folder: Path, name: str, days: int) -> Path:
    """A certificate of its own authority, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "test"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "llmfleet")]
    )
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}{days}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@contextmanager
def serving(behaviour: Server, folder: Path) -> Iterator[Path]:
    """Runs the server in a thread; gives the file with its certificate."""
    path = write_certificate(folder, behaviour.certificate_name, behaviour.days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.sni_callback = lambda _socket, name, _context: behaviour.names.add(name)

    class HTTPSServer(ThreadingHTTPServer):
        address_family = behaviour.family

        def get_request(self) -> tuple[ssl.SSLSocket, object]:
            plain, address = super().get_request()
            behaviour.connections += 1
            return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

        def handle_error(self, *_args: object) -> None:
            """A client that goes away in the middle is what the tests are about."""

    address = "::1" if behaviour.family == socket.AF_INET6 else "127.0.0.1"
    server = HTTPSServer((address, 0), type("Bound", (Handler,), {"behaviour": behaviour}))
    behaviour.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def options(port: int, ca: Path | None, **changes: object) -> endpoint.Options:
    given = {
        "url": f"https://{NAME}:{port}",
        "api_key": KEY,
        "models": ["tiny"],
        "address": "127.0.0.1",
        "ca_path": str(ca) if ca else None,
        "timeout": 10,
        "closed_paths": CLOSED,
    }
    return endpoint.Options(**{**given, **changes})


def check(behaviour: Server, folder: Path, **changes: object) -> endpoint.Report:
    with serving(behaviour, folder) as ca:
        report = endpoint.Endpoint(options(behaviour.port, ca, **changes)).run()
    assert KEY not in json.dumps(asdict(report)) + "".join(report.summary)
    assert all(check.detail and "\n" not in check.detail for check in report.checks)
    return report


def failed(report: endpoint.Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.failed}


def test_good_endpoint(folder: Path) -> None:
    behaviour = Server()
    report = check(behaviour, folder)
    assert failed(report) == {}
    names = ["connection", "models", "completion tiny", "streaming tiny", "missing key", "wrong key"]
    assert [check.name for check in report.checks] == names + [f"closed path {path}" for path in CLOSED]
    (model,) = report.models
    assert model["name"] == "tiny"
    assert model["chunks"] == CHUNKS
    assert model["text"] == "".join(f"{number} " for number in range(CHUNKS))[:80]
    # Each chunk takes the server at least 10 ms, the empty first one as well; usage says 48 tokens.
    assert 0.02 <= model["time_to_first_token_seconds"] < 5
    assert 0 < model["tokens_per_second"] <= 48 / (CHUNKS * 0.01)
    assert report.certificate["issuer"] == "test, llmfleet"
    ends = datetime.datetime.strptime(report.certificate["not_after"], "%Y-%m-%dT%H:%M:%S%z")
    assert 29 <= (ends - datetime.datetime.now(datetime.timezone.utc)).days <= 30
    assert report.summary[0].startswith("ok     connection: certificate for llm.test from test, llmfleet, valid")


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_address_replaces_the_resolver_only(family: socket.AddressFamily, address: str, folder: Path) -> None:
    behaviour = Server(family=family)
    assert failed(check(behaviour, folder, address=address)) == {}
    assert behaviour.hosts == {f"{NAME}:{behaviour.port}"}
    assert behaviour.names == {NAME}


def test_name_is_resolved_without_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    asked = []

    def resolve(host: str, *args: object, **kwargs: object) -> object:
        asked.append(host)
        return real("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert failed(check(Server(), folder, address=None)) == {}
    assert set(asked) == {NAME}


def test_environment_has_no_influence(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .netrc would replace the key, a proxy would see the traffic, another bundle would replace the trust."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {NAME} login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    assert failed(check(Server(), folder)) == {}


def test_all_chunks_of_a_long_reply_are_counted(folder: Path) -> None:
    assert check(Server(chunks=200, block=4), folder).models[0]["chunks"] == 200


def test_reasoning_is_text(folder: Path) -> None:
    event = Handler.chunk('data: {"choices": [{"delta": {"reasoning_content": "hm", "content": null}}]}\n\n')
    report = check(Server(chunks=0, insert=event), folder)
    assert failed(report) == {}
    assert report.models[0]["text"] == "hm"
    streaming = next(check for check in report.checks if check.name == "streaming tiny")
    assert streaming.ok
    assert "not enough to judge" in streaming.detail


BAD = Handler.chunk("data: <html>502</html>\n\n")
ERROR = Handler.chunk('data: {"error": {"message": "out of ' + KEY + '"}}\n\n')


@pytest.mark.parametrize(
    ("behaviour", "name", "detail"),
    [
        (Server(block=100), "streaming tiny", "24 chunks in 1 arrivals: something holds the stream back"),
        (Server(block=17, chunks=48), "streaming tiny", "48 chunks in 3 arrivals"),
        (Server(wrong_key=200), "wrong key", "/v1/models answered 200, not 401"),
        (Server(without_key=200), "missing key", "/v1/models answered 200, not 401"),
        (Server(without_key=403), "missing key", "/v1/models answered 403, not 401"),
        (Server(answers={"/metrics": 200}), "closed path /metrics", "answered 200 to a good key"),
        (Server(answers={"/metrics": 301}), "closed path /metrics", "answered 301"),
        (Server(answers={"/metrics": 502}), "closed path /metrics", "answered 502"),
        (Server(answers={"/invocations": 405}), "closed path /invocations", "answered 405"),
        (Server(listed='{"data": [{"id": "other"}]}'), "models", "lists other, not tiny"),
        (Server(listed='{"data": []}'), "models", "lists nothing, not tiny"),
        (Server(listed="<html>"), "models", "no list of models"),
        (Server(listed='{"data": [{"id": 7}]}'), "models", "no list of models"),
        (Server(answers={"/v1/models": 500}), "models", "answered 500; see the logs"),
        (Server(cut=True), "completion tiny", "127.0.0.1 port {port} cut the connection"),
        (Server(end=""), "completion tiny", "ended without [DONE] after 24 chunks"),
        (Server(insert=BAD), "completion tiny", "'<html>502</html>' is no completion chunk"),
        (Server(insert=ERROR), "completion tiny", "the stream carries an error: out of ********"),
        (Server(chunks=0), "completion tiny", "a stream without any text"),
        (Server(answers={endpoint.CHAT: 404}), "completion tiny", "answered 404 (no: Bearer ********)"),
        (Server(answers={endpoint.CHAT: 422}), "completion tiny", "the budget of api_key is used up: raise it, or set"),
        (Server(answers={endpoint.CHAT: 429}), "completion tiny", "raise the rate limits"),
        (Server(answers={endpoint.CHAT: 0}), "completion tiny", "cut the connection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_fault_is_one_finding(behaviour: Server, name: str, detail: str, folder: Path) -> None:
    found = failed(check(behaviour, folder))
    assert list(found) == [name]
    assert detail.format(port=behaviour.port) in found[name]
    assert ";" in found[name], "a finding has a remedy"


def test_key_that_opens_only_the_completions_is_found(folder: Path) -> None:
    """The list of models is refused without a key, the completions are not."""
    behaviour = Server(without_key=200, answers={"/v1/models": 401})
    found = failed(check(behaviour, folder))
    assert found["missing key"].startswith("/v1/chat/completions answered 200, not 401")
    assert "check api_key" in found["models"]


def test_closed_connection_is_a_refusal(folder: Path) -> None:
    report = check(Server(answers={"/metrics": 0}), folder)
    assert failed(report) == {}
    assert "ok     closed path /metrics: refused, the connection was closed" in report.summary


def test_burst_must_repeat_itself(folder: Path) -> None:
    """A busy controller may read one reply late; the proxy that buffers does it each time."""
    assert failed(check(Server(bursts=4), folder)) == {}
    assert list(failed(check(Server(bursts=5), folder))) == ["streaming tiny"]


def test_spread_ratio_zero_accepts_a_burst(folder: Path) -> None:
    assert failed(check(Server(block=100), folder, spread_ratio=0)) == {}


def test_slow_stream_ends_at_the_timeout(folder: Path) -> None:
    """Each read is quick, the whole is not."""
    found = failed(check(Server(chunks=1000), folder, timeout=0.5))
    assert "no answer from 127.0.0.1" in found["completion tiny"]
    assert "within 0.5 s" in found["completion tiny"]


@pytest.mark.parametrize(
    ("behaviour", "detail"),
    [
        (Server(certificate_name="other.test"), "the certificate is not for llm.test; issue one"),
        (Server(days=-1), "the certificate has expired; renew it"),
    ],
)
def test_bad_certificate_ends_the_check(behaviour: Server, detail: str, folder: Path) -> None:
    report = check(behaviour, folder)
    assert detail in failed(report)["connection"]
    assert len(report.checks) == 1
    assert report.certificate == {}
    assert behaviour.connections == 1, "nothing is sent after that"


def test_unknown_authority(folder: Path) -> None:
    other = write_certificate(folder, "authority.test", 30)
    found = failed(check(Server(), folder, ca_path=str(other)))
    assert found["connection"].startswith("the certificate is not trusted (")
    assert found["connection"].endswith("set ca_path")
    assert "not trusted" in failed(check(Server(), folder, ca_path=None))["connection"]


@pytest.mark.parametrize("changes", [{"certificate_name": "other.test"}, {"days": -1}])
def test_requests_check_the_certificate_too(changes: dict[str, object], folder: Path) -> None:
    """The key goes over these connections, not over that of the first check."""
    behaviour = Server(**changes)
    with serving(behaviour, folder) as ca, pytest.raises(requests.exceptions.SSLError):
        endpoint.Endpoint(options(behaviour.port, ca)).models()
    assert behaviour.hosts == set()


def unreachable(port: int, **changes: object) -> str:
    report = endpoint.Endpoint(options(port, None, **changes)).run()
    assert [check.name for check in report.failed] == ["connection"]
    return report.failed[0].detail


def test_no_connection_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert f"no answer from 127.0.0.1 port {port} within 0.3 s" in unreachable(port, timeout=0.3)
    assert f"127.0.0.1 port {port} refuses connections" in unreachable(port)

    def unknown(*_args: object, **_kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "llm.test cannot be resolved (Name or service not known)" in unreachable(port, address=None)


def test_port_without_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert "check that this port speaks HTTPS" in unreachable(plain.getsockname()[1])
        thread.join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://llm.test"}, "must be https://name"),
        ({"url": "https://llm.test/v1"}, "no path"),
        ({"url": "https://user:secret@llm.test"}, "must be https://name"),
        ({"url": "https://llm..test"}, "must be https://name"),
        ({"url": "https://llm.test:70000"}, "out of range"),
        ({"api_key": f"{KEY}\n"}, "api_key is empty or has a space"),
        ({"api_key": ""}, "api_key is empty"),
        ({"models": []}, "at least one model"),
        ({"closed_paths": ["metrics"]}, "begins with /"),
        ({"ca_path": "/nowhere.pem"}, "ca_path /nowhere.pem is no PEM bundle: No such file"),
        ({"ca_path": __file__}, "is no PEM bundle"),
    ],
)
def test_options_are_checked_first(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        endpoint.Endpoint(options(443, None, **changes))
    assert KEY not in str(error.value)


def test_key_is_not_in_the_options_text() -> None:
    assert KEY not in repr(options(443, None))


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([0.006 + 0.0024 * n for n in range(48)], "48 chunks in 48 arrivals"),  # a tiny model, 400 tokens/s
        ([2 + 0.0024 * n for n in range(48)], "48 chunks in 48 arrivals"),  # the same on a cold engine
        ([0.02 * (n // 9) for n in range(48)], "48 chunks in 6 arrivals"),  # read every 20 ms by a busy machine
        ([0.12 + 0.00003 * n for n in range(48)], "burst"),  # all at once, in blocks of their own
        ([0.1 * (n // 17) for n in range(48)], "burst"),  # blocks of 4 KiB
        ([0.2 * (n // 34) for n in range(512)], "burst"),  # blocks of 8 KiB, for long
        ([0.1 * n for n in range(3) for _ in range(6)], "burst"),
        ([0.5] * 16, "burst"),
        ([0.5] * 15, "15 chunks in 1 arrivals: not enough to judge"),
    ],
)
def test_threshold(times: list[float], verdict: str) -> None:
    reply = endpoint.Reply(times=times)
    if verdict == "burst":
        with pytest.raises(endpoint.CheckError, match="holds the stream back"):
            reply.judge(0.1)
    else:
        assert reply.judge(0.1).startswith(verdict)
    assert "holds" not in reply.judge(0)


ENDINGS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5), ENDINGS, st.data())
def test_any_split_gives_the_same_events(events: list[list[str]], ending: str, data: st.DataObject) -> None:
    text = "".join(
        f": comment{ending}" + "".join(f"data: {line}{ending}" for line in lines) + f"event: x{ending}{ending}"
        for lines in events
    )
    stream = text.encode() + b": end"  # settles whether a CR at the end was half of a CR LF
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = endpoint.EventParser()
    seen = []
    for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        seen += parser.feed(stream[first:last])
    assert seen == ["\n".join(lines) for lines in events]


@given(st.binary(max_size=64))
def test_any_bytes_split_into_single_ones(stream: bytes) -> None:
    whole, single = endpoint.EventParser(), endpoint.EventParser()
    assert whole.feed(stream) == [event for byte in stream for event in single.feed(bytes([byte]))]


def ansible(arguments: dict[str, object], *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    module = "llmfleet.serving.endpoint_check"
    command = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-i", "localhost,", "-c", "local", "-m", module]
    command += ["-e", f"ansible_python_interpreter={sys.executable}", "-a", json.dumps(arguments), *flags]
    environment = {**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_module(folder: Path) -> None:
    behaviour = Server(answers={"/metrics": 200})
    with serving(behaviour, folder) as ca:
        arguments = asdict(options(behaviour.port, ca))
        failing = ansible(arguments, "-vvv")
        passing = ansible({**arguments, "fail_on_error": False}, "--check", "-vvv")
    assert failing.returncode == 2, failing.stdout + failing.stderr
    assert f"https://{NAME}:{behaviour.port} failed 1 of 8 checks:" in failing.stdout
    assert "- closed path /metrics: answered 200 to a good key; let the gateway" in failing.stdout
    assert passing.returncode == 0, passing.stdout + passing.stderr
    assert "FAILED closed path /metrics" in passing.stdout
    assert '"changed": false' in passing.stdout
    assert '"chunks": 24' in passing.stdout
    assert KEY not in failing.stdout + failing.stderr + passing.stdout + passing.stderr


def test_module_without_requests(tmp_path: Path) -> None:
    (tmp_path / "requests.py").write_text("raise ImportError('no requests here')\n")
    result = ansible(asdict(options(9, None)), PYTHONPATH=str(tmp_path))
    assert "Failed to import the required Python library (requests)" in result.stdout
    wrong = ansible({**asdict(options(9, None)), "url": "http://llm.test"})
    assert "it must be https://name or https://name:port" in wrong.stdout


def test_model_that_makes_embeddings_is_asked_for_one(folder: Path) -> None:
    report = check(Server(), folder, models=[], embedding_models=["tiny"])
    assert failed(report) == {}
    assert {check.name: check.detail for check in report.checks}["embedding tiny"] == "2 dimensions"


@pytest.mark.parametrize("answer", ["{}", '{"data": []}', "no"])
def test_answer_without_an_embedding_is_found(folder: Path, answer: str) -> None:
    report = check(Server(embedding=answer), folder, embedding_models=["tiny"])
    assert failed(report)["embedding tiny"].startswith("no embedding in the answer")
