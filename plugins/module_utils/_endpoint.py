# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: checks an OpenAI-compatible HTTPS endpoint from outside, as a client sees it.

No Ansible import. Each finding is one sentence; that of a failed check ends with the remedy.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import socket
import ssl
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError
except ImportError:
    REQUESTS_ERROR: str | None = traceback.format_exc()
    HTTPAdapter = object
else:
    REQUESTS_ERROR = None

CHAT = "/v1/chat/completions"
PROMPT = "Count from one to one hundred in words, separated by commas."
URL = re.compile(r"https://([\w-]{1,63}(\.[\w-]{1,63})*|\[[0-9A-Fa-f:.]+\])(:\d+)?/?", re.ASCII)
LOGS = "see the logs of the gateway and the engine"
# The module's documentation gives the reasons for these four.
SAME_ARRIVAL = 0.0005
ENOUGH_CHUNKS = 16
FEWEST_ARRIVALS = 4
ATTEMPTS = 5
OK, UNAUTHORIZED = 200, 401
REMEDIES = {
    UNAUTHORIZED: "check api_key",
    403: "check what api_key may do",
    404: "check that models has the name that clients use",
    422: "the budget of api_key is used up: raise it, or set nginx_verify_key to another key",
    429: "raise the rate limits of api_key or wait",
    503: f"put it back if it is drained (playbooks/drain.yml with drain_undo=true), or {LOGS}",
}
# What an open route says to a GET when it wants another method or a body; and 429, which says nothing of it.
NO_REFUSAL = (400, 405, 415, 422, 429)
# One sentence for what can go wrong on the way. None quotes a request, because that has the key.
OTHER_NAME = "the certificate is not for {name}; issue one that has this name, or correct url"
CERTIFICATE = {  # by OpenSSL's X509_V_ERR_*
    10: "the certificate has expired; renew it, and check that the renewal timer runs",
    62: OTHER_NAME,
    64: OTHER_NAME,
}
NETWORK: list[tuple[type[BaseException], str]] = [  # the first that fits
    (socket.gaierror, "{name} cannot be resolved ({cause.strerror}); correct url or the DNS, or set address"),
    (ssl.SSLCertVerificationError, "the certificate is not trusted ({cause.verify_message}); set ca_path"),
    (ssl.SSLError, "no TLS with {where} ({cause.reason}); check that this port speaks HTTPS"),
    (TimeoutError, "no answer from {where} within {timeout:g} s; check firewall and load, or raise timeout"),
    (ConnectionRefusedError, "{where} refuses connections; check that the gateway runs and listens there"),
    (ConnectionError, "{where} cut the connection; " + LOGS),
    (http.client.IncompleteRead, "{where} cut the connection; " + LOGS),
    (OSError, "{where} cannot be reached ({cause.strerror}); check address, route and firewall"),
]


class CheckError(Exception):
    """What a check has found wrong and what to do, in one sentence."""


@dataclass(frozen=True)
class Options:
    url: str
    api_key: str = field(repr=False)
    models: list[str]
    ca_path: str | None = None
    address: str | None = None
    max_tokens: int = 48
    timeout: float = 60
    closed_paths: list[str] = field(default_factory=list)
    spread_ratio: float = 0.1
    embedding_models: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not URL.fullmatch(self.url):
            raise ValueError(f"url is {self.url!r}: it must be https://name or https://name:port, and no path")
        if not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("api_key is empty or has a space, a line end or a letter that no header carries")
        if not self.all_models:
            raise ValueError("models is empty: name at least one model")
        for path in self.closed_paths:
            if not re.fullmatch(r"/[!-~]*", path):
                raise ValueError(f"closed_paths has {path!r}: a path begins with / and has no space")
        try:
            urlsplit(self.url).port  # noqa: B018 - ends in a ValueError when out of range
        except ValueError as error:
            raise ValueError(f"url: {error}") from None

    @property
    def all_models(self) -> list[str]:
        return [*self.models, *self.embedding_models]

    @property
    def name(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 443


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass
class Report:
    checks: list[Check] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    certificate: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]

    @property
    def summary(self) -> list[str]:
        return [f"{'ok' if check.ok else 'FAILED':<6} {check.name}: {check.detail}" for check in self.checks]


class EventParser:
    """Server-sent events: takes the stream in blocks of any size, gives the data of each complete event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, block: bytes) -> list[str]:
        events = []
        text = self._rest + block
        end = len(text) - text.endswith(b"\r")  # it may be half of a CR LF
        *lines, rest = re.split(rb"\r\n|\n|\r", text[:end])
        self._rest = rest + text[end:]
        for line in lines:
            name, _, value = line.decode(errors="replace").partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


@dataclass
class Reply:
    """A streamed completion. ``times``: the arrival of each chunk with text, in seconds since it was sent."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0

    def add(self, event: str, moment: float) -> None:
        try:
            chunk = json.loads(event)
            if chunk.get("error"):
                raise CheckError(f"the stream carries an error: {_message(chunk)[:200]}; {LOGS}")
            self.tokens = (chunk.get("usage") or {}).get("completion_tokens") or self.tokens
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if text := delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"):
                    self.times.append(moment)
                    self.text += text
        except (ValueError, LookupError, TypeError, AttributeError):
            raise CheckError(f"{event[:60]!r} is no completion chunk; {LOGS}") from None

    @property
    def arrivals(self) -> int:
        gaps = zip(self.times, self.times[1:], strict=False)
        return 1 + sum(later - earlier >= SAME_ARRIVAL for earlier, later in gaps)

    @property
    def is_enough(self) -> bool:
        return len(self.times) >= ENOUGH_CHUNKS

    @property
    def spread(self) -> float:
        return self.arrivals / len(self.times) if self.times else 0

    def is_streamed(self, spread_ratio: float) -> bool:
        return not spread_ratio or self.arrivals >= max(FEWEST_ARRIVALS, spread_ratio * len(self.times))

    def judge(self, spread_ratio: float) -> str:
        seen = f"{len(self.times)} chunks in {self.arrivals} arrivals"
        if self.is_enough and not self.is_streamed(spread_ratio):
            raise CheckError(f"{seen}: something holds the stream back; set proxy_buffering off in every proxy")
        if not self.is_enough:
            return f"{seen}: not enough to judge, {ENOUGH_CHUNKS} chunks are; raise max_tokens"
        return seen

    def result(self, model: str) -> dict[str, Any]:
        return {
            "name": model,
            "time_to_first_token_seconds": round(self.times[0], 4),
            "chunks": len(self.times),
            "tokens_per_second": round((self.tokens or len(self.times)) / self.times[-1], 1),
            "text": self.text[:80],
        }


class TimedSocket(ssl.SSLSocket):
    """Notes when data came off the network. What is read later from a buffer has come at that time."""

    received = 0.0  # of all connections, because there is only one at a time

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        count = super().recv_into(*args, **kwargs)
        TimedSocket.received = time.perf_counter()
        return count


class NamedAdapter(HTTPAdapter):
    """Connects to ``address`` if there is one; the certificate must be for the URL's name all the same."""

    def __init__(self, context: ssl.SSLContext, options: Options) -> None:
        self._tls = {"ssl_context": context, "server_hostname": options.name}
        self._address = options.address or options.name
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, **self._tls)

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        host, pool = super().build_connection_pool_key_attributes(*args, **kwargs)
        return {**host, "host": self._address}, pool

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        """The context holds what is trusted; requests would add its own list of authorities to it."""


class Endpoint:
    """One endpoint. A check returns what it has seen or ends in a CheckError; ``run`` makes them a report."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._report = Report()
        try:
            self._context = ssl.create_default_context(cafile=options.ca_path)
        except OSError as error:
            raise ValueError(f"ca_path {options.ca_path} is no PEM bundle: {error.strerror}") from None
        self._context.sslsocket_class = TimedSocket
        self._session = requests.Session()
        # Neither a proxy, nor ~/.netrc (it would replace the key), nor REQUESTS_CA_BUNDLE.
        self._session.trust_env = False
        self._session.mount("https://", NamedAdapter(self._context, options))

    def run(self) -> Report:
        with self._session:
            if self._check("connection", self.connection):
                self._check("models", self.models)
                for model in self._options.models:
                    self._completion(model)
                for model in self._options.embedding_models:
                    self._check(f"embedding {model}", lambda model=model: self.embedding(model))
                self._check("missing key", lambda: self.refused(None))
                self._check("wrong key", lambda: self.refused(f"sk-{secrets.token_hex(16)}"))
                for path in self._options.closed_paths:
                    self._check(f"closed path {path}", lambda path=path: self.closed(path))
        return self._report

    def _check(self, name: str, check: Callable[[], str]) -> bool:
        ok = False
        try:
            detail, ok = check(), True
        except CheckError as error:
            detail = str(error)
        except (OSError, HTTPError) as error:
            detail = self._explain(error)
        self._report.checks.append(Check(name, ok, self._redact(detail)))
        return ok

    def _completion(self, model: str) -> None:
        """Two checks, because a reply can be complete and yet have come in one burst."""
        ratio, best = self._options.spread_ratio, Reply()

        def complete() -> str:
            nonlocal best
            for _ in range(ATTEMPTS):
                # A proxy that buffers does so every time, a busy controller or a short reply is chance.
                best = max(best, self.stream(model), key=lambda reply: (reply.is_enough, reply.spread))
                if best.is_enough and best.is_streamed(ratio):
                    break
            if not best.times:
                raise CheckError(f"a stream without any text; {LOGS}")
            result = best.result(model)
            self._report.models.append(result)
            milliseconds = result["time_to_first_token_seconds"] * 1000
            return f"first token after {milliseconds:.0f} ms, {result['tokens_per_second']} tokens/s"

        if self._check(f"completion {model}", complete):
            self._check(f"streaming {model}", lambda: best.judge(ratio))

    def connection(self) -> str:
        name = self._options.name
        address = (self._options.address or name, self._options.port)
        with (
            socket.create_connection(address, self._options.timeout) as plain,
            self._context.wrap_socket(plain, server_hostname=name) as tls,
        ):
            peer: Any = tls.getpeercert()
        parts = {key: value for part in peer["issuer"] for key, value in part}
        issuer = ", ".join(parts[key] for key in ("commonName", "organizationName") if key in parts)
        end = time.gmtime(ssl.cert_time_to_seconds(peer["notAfter"]))
        self._report.certificate = {"not_after": time.strftime("%Y-%m-%dT%H:%M:%SZ", end), "issuer": issuer}
        return f"certificate for {name} from {issuer}, valid until {self._report.certificate['not_after']}"

    def models(self) -> str:
        with self._request("GET", "/v1/models", self._options.api_key) as response:
            self._must_be_ok(response)
            try:
                listed = [model["id"] for model in json.loads(response.content)["data"]]
                seen = ", ".join(listed) or "nothing"
            except (ValueError, LookupError, TypeError):
                raise CheckError("no list of models; is url an OpenAI-compatible endpoint?") from None
        if missing := [model for model in self._options.all_models if model not in listed]:
            raise CheckError(f"lists {seen}, not {', '.join(missing)}; correct models, or deploy what is missing")
        return f"lists {seen}"

    def stream(self, model: str) -> Reply:
        blocks: list[tuple[float, bytes]] = []
        sent = time.perf_counter()
        with self._request("POST", CHAT, self._options.api_key, self._chat(model)) as response:
            self._must_be_ok(response)
            # Only read here: to parse takes long enough to blur the times on a busy machine.
            while block := response.raw.read1():
                blocks.append((TimedSocket.received - sent, block))
                if blocks[-1][0] > self._options.timeout:
                    raise TimeoutError
        reply, parser = Reply(), EventParser()
        for moment, block in blocks:
            for event in parser.feed(block):
                if event == "[DONE]":
                    reply.text = self._redact(reply.text)
                    return reply
                reply.add(self._redact(event), moment)
        raise CheckError(f"the stream ended without [DONE] after {len(reply.times)} chunks; {LOGS}")

    def embedding(self, model: str) -> str:
        body = {"model": model, "input": PROMPT}
        with self._request("POST", "/v1/embeddings", self._options.api_key, body) as response:
            self._must_be_ok(response)
            try:
                return f"{len(json.loads(response.content)['data'][0]['embedding'])} dimensions"
            except (ValueError, LookupError, TypeError):
                raise CheckError(f"no embedding in the answer; {LOGS}") from None

    def refused(self, key: str | None) -> str:
        chat = self._chat(self._options.all_models[0])
        for method, path, body in (("GET", "/v1/models", None), ("POST", CHAT, chat)):
            with self._request(method, path, key, body) as response:
                if (status := response.status_code) != UNAUTHORIZED:
                    raise CheckError(f"{path} answered {status}, not 401; check the key on every path")
        return "refused with 401"

    def closed(self, path: str) -> str:
        """GET only: it changes nothing, and an open route for another method says 405."""
        try:
            with self._request("GET", path, self._options.api_key) as response:
                status = response.status_code
        except requests.ConnectionError as error:
            if any(isinstance(cause, http.client.RemoteDisconnected) for cause in _causes(error)):
                return "refused, the connection was closed"  # nginx's 444
            raise
        if status // 100 != 4 or status in NO_REFUSAL:
            raise CheckError(f"answered {status} to a good key; let the gateway pass only what clients need")
        return f"refused with {status}"

    def _chat(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": self._options.max_tokens,
            "temperature": 0.7,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _request(self, method: str, path: str, key: str | None, body: Any = None) -> requests.Response:
        headers = {"Host": urlsplit(self._options.url).netloc, "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = self._options.url.rstrip("/") + path
        timeout = self._options.timeout
        return self._session.request(
            method, url, headers=headers, json=body, timeout=timeout, stream=True, allow_redirects=False
        )

    def _must_be_ok(self, response: requests.Response) -> None:
        if (status := response.status_code) != OK:
            try:
                message = self._redact(_message(json.loads(response.content)))
            except (ValueError, AttributeError):
                message = ""
            said = f" ({message[:200]})" if message else ""
            raise CheckError(f"answered {status}{said}; {REMEDIES.get(status, LOGS)}")

    def _redact(self, text: str) -> str:
        return text.replace(self._options.api_key, "********")

    def _explain(self, error: Exception) -> str:
        options = self._options
        where = f"{options.address or options.name} port {options.port}"
        for cause in _causes(error):
            sentence = CERTIFICATE.get(getattr(cause, "verify_code", None))
            sentence = sentence or next((text for kind, text in NETWORK if isinstance(cause, kind)), None)
            if sentence:
                return sentence.format(cause=cause, name=options.name, where=where, timeout=options.timeout)
        return f"the request failed ({type(error).__name__}); {LOGS}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """What the error came from, the root first: requests wraps urllib3's errors, which wrap the system's."""
    if error:
        yield from _causes(error.__cause__ or error.__context__)
        if not isinstance(error, requests.RequestException):  # an OSError, but without its fields
            yield error


def _message(body: Any) -> str:
    error = body.get("error") or body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(message or "").split())
