"""The service as the scenario's inventory declares it, and what is asked of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import openai
import support
import yaml
from openai import OpenAI
from testinfra.host import Host

DECLARED: dict[str, Any] = yaml.safe_load((support.INVENTORY / "hosts.yml").read_text())["all"]
GATEWAY, ENGINE = (DECLARED["hosts"][name]["ansible_host"] for name in ("gw", "eng"))
METRICS = {"tiny": f"http://{ENGINE}:8000/metrics", "second": f"http://{ENGINE}:8001/metrics"}
Value = TypeVar("Value")
BATCH_SECONDS = 10  # litellm_batch_write_seconds
LISTENER = """
import http.server

class Listener(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.command, self.path, self.rfile.read(int(self.headers["Content-Length"] or 0)).decode(), flush=True)
        self.send_response(204)
        self.end_headers()

    do_POST = do_GET

http.server.HTTPServer(("127.0.0.1", %d), Listener).serve_forever()
"""


def key(team: str = "research", name: str = "ci") -> str:
    return support.secret(f"key_{team}_{name}")


def ask(api: OpenAI, key: str, model: str = "tiny", tokens: int = 8) -> int:
    """The status that a request gets."""
    try:
        api.with_options(api_key=key).chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Say something."}],
            max_tokens=tokens,
            extra_body={"ignore_eos": True},
        )
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def sql(host: Host, statements: str, database: str = "litellm") -> str:
    return host.check_output("echo %s | su - postgres -c 'psql -XAtq -v ON_ERROR_STOP=1 %s'", statements, database)


def spend(gateway: Host, alias: str) -> float:
    """By what has been written to the database."""
    return float(sql(gateway, f"SELECT spend FROM \"LiteLLM_VerificationToken\" WHERE key_alias = '{alias}'"))  # noqa: S608


def counted(gateway: Host) -> dict[str, float]:
    """The tokens that vLLM has read and written, and what they cost."""
    read, wrote = (
        [support.metric(gateway, url, f"vllm:{kind}_tokens_total") for url in METRICS.values()]
        for kind in ("prompt", "generation")
    )
    return {"tiny": read[0] * 1e-6 + wrote[0] * 2e-6, "second": read[1] * 1e-5 + wrote[1] * 2e-5}


def settled(read: Callable[[], Value]) -> Value:
    """What is read from the database, once all that LiteLLM still had to write is there."""
    last, since = read(), time.monotonic()
    deadline = since + 30 * BATCH_SECONDS
    while time.monotonic() < since + 2.5 * BATCH_SECONDS:
        assert time.monotonic() < deadline, "it does not come to rest"
        time.sleep(2)
        now = read()
        if now != last:
            last, since = now, time.monotonic()
    return last


def serving(gateway: Host) -> str:
    """The port of the instance that serves."""
    return next(port for port in ("4000", "4001") if gateway.run(f"systemctl is-enabled litellm@{port}").rc == 0)


def running(gateway: Host) -> set[str]:
    """The ports of all that run, though perhaps only to end what they have."""
    units = "systemctl list-units --plain --no-legend --state=active 'litellm@*' | grep -o '@[0-9]*'"
    return set(gateway.run(units).stdout.replace("@", "").split())


@contextmanager
def listening(gateway: Host, port: int) -> Iterator[Callable[[], str]]:
    """Something at this port of the gateway's loopback, and what tells all that it has been asked."""
    unit = f"llmfleet-listener-{secrets.token_hex(4)}"
    gateway.check_output(f"systemd-run --quiet --collect --unit={unit} python3 -uc %s", LISTENER % port)
    try:
        support.wait_until(lambda: gateway.run(f"ss -Hltn 'sport = :{port}'").stdout != "", 30)
        yield lambda: gateway.check_output(f"journalctl --quiet --output=cat _SYSTEMD_UNIT={unit}.service")
    finally:
        gateway.run(f"systemctl stop {unit}")
