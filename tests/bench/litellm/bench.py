#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Prints what LiteLLM costs a gateway, and what each of its settings buys.

On a gateway with tenants that nobody uses at the time, as root and by the Python of LiteLLM's environment:

    scp tests/bench/litellm/bench.py gateway:/root/
    ssh gateway '/opt/litellm/*/bin/python /root/bench.py ways'

bench.py ways|lengths|settings [--rounds N] [--only NAME ...] [--backend HOST:PORT --model NAME]

ways      nginx, LiteLLM and the backend against what there is with fewer of them
lengths   answers of more and fewer tokens
settings  LiteLLM as the role configures it, with one worker, against the same with one thing changed

The backend is a stand-in for vLLM that streams at a fixed pace, or with --backend a real one. Beside what serves,
further instances of litellm@.service are started from copies of its folder, and nginx from a copy of its site.
All that is compared is asked in turns within each round. Only on an idle machine do few rounds tell small differences:
compare with the row "nothing changed". CPU is what LiteLLM's Python processes have used for each
request, which other work on the machine does not touch as it does times. All of it is taken away in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import json
import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from aiohttp import web

ETC = Path("/etc/litellm")
UNITS = Path("/run/systemd/system")
SCRATCH = Path("/run/llmfleet-bench")
SITE = Path("/etc/nginx/sites-available/llmfleet.conf")
STANDIN_PORT, BASE_PORT, OTHER_PORT, NGINX_PORT = 4599, 4510, 4511, 4520
PACE = 0.002  # seconds between two tokens of the stand-in
TOKENS = 64
MANY = 8
TEAM = "llmfleet-bench"
USAGE = "llmfleet_usage.continuous_usage"
TICK = os.sysconf("SC_CLK_TCK")


# --- the stand-in for vLLM ------------------------------------------------------------------------------------


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    count = body["max_tokens"]
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    options = body.get("stream_options") or {}

    def usage(said: int) -> dict[str, int]:
        return {"prompt_tokens": 16, "completion_tokens": said, "total_tokens": 16 + said}

    if not body.get("stream"):
        message = {"role": "assistant", "content": "word " * count}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return web.json_response({**common, "object": "chat.completion", "choices": [choice], "usage": usage(count)})
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)

    async def say(choices: list[dict[str, Any]], **more: Any) -> None:
        await reply.write(f"data: {json.dumps({**common, 'choices': choices, **more})}\n\n".encode())

    await say([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for number in range(count):
        await asyncio.sleep(PACE)
        finish = "length" if number == count - 1 else None
        so_far = {"usage": usage(number + 1)} if options.get("continuous_usage_stats") else {}
        await say([{"index": 0, "delta": {"content": "word "}, "finish_reason": finish}], **so_far)
    if options.get("include_usage"):
        await say([], usage=usage(count))
    await reply.write(b"data: [DONE]\n\n")
    return reply


def standin() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    web.run_app(app, host="127.0.0.1", port=STANDIN_PORT, print=None)


# --- what is started ------------------------------------------------------------------------------------------


def run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


@dataclass
class Settings:
    """What an instance runs from."""

    config: dict[str, Any]
    environment: dict[str, str]
    start: str
    key: str = "limits"
    name: str = "the role's own"

    def changed(self, name: str, change: Callable[[Settings], Any]) -> Settings:
        other = copy.deepcopy(self)
        other.name = name
        change(other)
        return other


@dataclass
class Place:
    """Somewhere that answers, and the unit whose CPU time counts."""

    name: str
    url: str
    key: str
    units: list[str] = field(default_factory=list)
    server_name: str = ""


def unquoted(line: str) -> tuple[str, str]:
    name, _, value = line.partition("=")
    return name, value[1:-1].replace('\\"', '"').replace("\\\\", "\\")


def serving() -> tuple[str, Settings]:
    """Port and settings of the instance that serves, with the stand-in as the only backend and one worker."""
    port = re.search(r"litellm@(\d+)", run("systemctl", "list-units", "--state=active", "litellm@*"))[1]
    lines = (ETC / port / "env").read_text().splitlines()
    environment = dict(unquoted(line) for line in lines if line and not line.startswith("#"))
    unit = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", run("systemctl", "cat", "litellm@.service"), re.MULTILINE)[1]
    found = Settings(yaml.safe_load((ETC / port / "config.yaml").read_text()), environment, unit.replace("\\\n", ""))
    workers(1)(found)
    return port, found


def instance(port: int, settings: Settings) -> None:
    folder, dropin = ETC / str(port), UNITS / f"litellm@{port}.service.d"
    folder.mkdir(exist_ok=True)
    dropin.mkdir(parents=True, exist_ok=True)
    (dropin / "bench.conf").write_text(f"[Service]\nExecStart=\nExecStart={settings.start}\nRestart=no\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.config))
    shutil.chown(folder / "config.yaml", group="litellm")
    quote = {"\\": "\\\\", '"': '\\"'}
    lines = [f'{name}="{value.translate(str.maketrans(quote))}"' for name, value in settings.environment.items()]
    (folder / "env").touch(0o600)
    (folder / "env").write_text("\n".join(lines))
    if not (folder / "venv").is_symlink():
        (folder / "venv").symlink_to(next(ETC.glob("40*/venv")).resolve())
    run("systemctl", "daemon-reload")
    run("systemctl", "start", f"litellm@{port}")
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health/readiness"):
            return
        if subprocess.run(["systemctl", "--quiet", "is-active", f"litellm@{port}"], check=False).returncode:
            break
        time.sleep(1)
    sys.exit(run("journalctl", "--no-pager", "-n50", "-u", f"litellm@{port}"))


def stop(port: int) -> None:
    subprocess.run(["systemctl", "kill", "--signal=KILL", f"litellm@{port}"], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["systemctl", "stop", f"litellm@{port}"], check=False)
    for folder in (ETC / str(port), UNITS / f"litellm@{port}.service.d"):
        shutil.rmtree(folder, ignore_errors=True)


def service(name: str, *command: str) -> None:
    run("systemd-run", "--quiet", "--collect", f"--unit=llmfleet-bench-{name}", *command)


def nginx(port: int, target: str, digest: str, authorization: str) -> str:
    """The site's own name. Another nginx, with the site as it is but for its port, keys and upstream."""
    site = re.sub(r"^ *listen \[::\]:.*\n", "", SITE.read_text(), flags=re.MULTILINE)
    site = re.sub(r"listen \d+", f"listen 127.0.0.1:{port}", site)
    site = re.sub(r"^    server \S+ (max_fails.*)$", rf"    server {target} \1", site, flags=re.MULTILINE)
    site = re.sub(r"rate=\d+r/s", "rate=100000r/s", site)
    site = re.sub(r"from \S+keys\.json", f"from {SCRATCH}/keys.json", site)
    site = site.replace("/var/log/nginx/", f"{SCRATCH}/")
    site = re.sub(r"include \S+secrets\.conf", f"include {SCRATCH}/secrets-{port}.conf", site)
    own = SCRATCH / f"secrets-{port}.conf"
    own.touch(0o600)
    own.write_text(f'map "" $llmfleet_backend_authorization {{ default {authorization}; }}')
    (SCRATCH / "keys.json").write_text(json.dumps({digest: TEAM}))
    conf = SCRATCH / f"nginx-{port}.conf"
    conf.write_text(
        f"user www-data;\nworker_processes auto;\ndaemon off;\npid {SCRATCH}/{port}.pid;\n"
        "include /etc/nginx/modules-enabled/*.conf;\nevents {}\nhttp {\ninclude /etc/nginx/mime.types;\n" + site + "}\n"
    )
    service(f"nginx-{port}", "/usr/sbin/nginx", "-c", str(conf), "-e", f"{SCRATCH}/error.log")
    while subprocess.run(["ss", "-Hltn", f"sport = :{port}"], check=True, stdout=subprocess.PIPE).stdout == b"":
        time.sleep(0.2)
    return re.findall(r"server_name (\S+?)[ ;]", site)[-1]


def ask(port: str, environment: dict[str, str], path: str, body: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {environment['LITELLM_MASTER_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


@contextlib.contextmanager
def prepared(arguments: argparse.Namespace) -> Iterator[tuple[Settings, dict[str, str]]]:
    """The settings that all others are made from, and the keys to ask with."""
    port, found = serving()
    model = arguments.model or found.config["model_list"][0]["model_name"]
    entry = next(each for each in found.config["model_list"] if each["model_name"] == model)
    if not arguments.backend:
        entry["litellm_params"]["api_base"] = f"http://127.0.0.1:{STANDIN_PORT}/v1"
    found.config["model_list"] = [entry]
    arguments.model = model
    SCRATCH.mkdir(mode=0o755, exist_ok=True)
    keys = {name: f"sk-{secrets.token_urlsafe(32)}" for name in ("limits", "plain")}
    limits = {"max_budget": 1e6, "rpm_limit": 10**6, "tpm_limit": 10**9}
    try:
        service("standin", sys.executable, __file__, "standin")
        ask(port, found.environment, "/team/new", {"team_id": TEAM, "team_alias": TEAM, **limits})
        for name, key in keys.items():
            more = limits if name == "limits" else {}
            ask(port, found.environment, "/key/generate", {"key": key, "team_id": TEAM, "key_alias": name, **more})
        yield found, {**keys, "master": found.environment["LITELLM_MASTER_KEY"]}
    finally:
        for each in (BASE_PORT, OTHER_PORT):
            stop(each)
        subprocess.run(["systemctl", "stop", "llmfleet-bench-*"], check=False)
        ask(port, found.environment, "/team/delete", {"team_ids": [TEAM]})
        shutil.rmtree(SCRATCH)
        run("systemctl", "daemon-reload")


# --- what is measured -----------------------------------------------------------------------------------------


@dataclass
class Load:
    first: list[float]  # seconds to the first token
    seconds: float
    cpu: dict[str, float]  # seconds, by the name of the process

    @property
    def rate(self) -> float:
        return len(self.first) / self.seconds

    def each(self, name: str) -> float:
        """Milliseconds of CPU for each request."""
        return 1000 * self.cpu.get(name, 0) / len(self.first)


def processes(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes(int(child))


def cpu(units: Sequence[str]) -> dict[str, float]:
    used: dict[str, float] = {}
    for unit in units:
        for pid in processes(int(run("systemctl", "show", "-P", "MainPID", unit))):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")[2].rpartition(") ")
            name = name if name in ("nginx", "node") or name.startswith("query") else "litellm"
            used[name] = used.get(name, 0) + sum(map(int, rest.split()[11:13])) / TICK
    return used


async def once(session: aiohttp.ClientSession, place: Place, model: str, tokens: int, stream: bool) -> float:
    messages = [{"role": "user", "content": "Say something, and do not stop before you have said it all."}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {place.key}", "Host": place.server_name or "127.0.0.1"}
    start, first = time.perf_counter(), 0.0
    url = f"{place.url}/v1/chat/completions"
    name = place.server_name or None
    async with session.post(url, json=body, headers=headers, ssl=False, server_hostname=name) as reply:
        if reply.status != 200:
            sys.exit(f"{place.name}: {reply.status} {await reply.text()}")
        async for line in reply.content:
            if not first and (not stream or re.search(rb'"content": ?"[^"]', line)):
                first = time.perf_counter() - start
    return first


async def load(
    place: Place, model: str, clients: int, count: int, *, tokens: int = TOKENS, stream: bool = True
) -> Load:
    left = iter(range(count))
    before, start = cpu(place.units), time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> list[float]:
            return [await once(session, place, model, tokens, stream) for _ in left]

        first = [each for own in await asyncio.gather(*(client() for _ in range(clients))) for each in own]
    seconds = time.perf_counter() - start
    await asyncio.sleep(1)  # what is done once an answer has ended
    return Load(first, seconds, {name: used - before.get(name, 0) for name, used in cpu(place.units).items()})


def rows(title: str) -> None:
    print(
        f"\n{title}\n\n| what | CPU, ms a request | first token with 1 client, ms: p50, p95 | with {MANY}: p50, p95 "
        "| requests/s with 1 | with 8 |\n|---|---|---|---|---|---|"
    )


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def row(name: str, one: list[Load], many: list[Load], against: tuple[list[Load], list[Load]] | None = None) -> None:
    """With the median over the rounds of what it is to the other in the same round."""

    def ratio(of: Callable[[Load], float], which: int) -> str:
        if against is None:
            return ""
        pairs = zip((one, many)[which], against[which], strict=True)
        return f" ({middle([of(mine) / of(other) for mine, other in pairs]):.2f})"

    def first(runs: list[Load]) -> str:
        times = sorted(each * 1000 for run in runs for each in run.first)
        return f"{middle(times):.0f}, {times[int(len(times) * 0.95)]:.0f}"

    parts = sorted({part for run in many for part in run.cpu})
    used = ", ".join(f"{part} {middle([run.each(part) for run in many]):.1f}" for part in parts)
    compared = against is not None and all("litellm" in run.cpu for run in (*many, *against[1]))
    litellm = ratio(lambda run: run.each("litellm"), 1) if compared else ""
    wait = [ratio(lambda run: middle(run.first), which) for which in (0, 1)]
    rate = [f"{middle([run.rate for run in runs]):.1f}" for runs in (one, many)]
    speed = [ratio(lambda run: run.rate, which) for which in (0, 1)]
    print(
        f"| {name} | {used}{litellm} | {first(one)}{wait[0]} | {first(many)}{wait[1]} "
        f"| {rate[0]}{speed[0]} | {rate[1]}{speed[1]} |",
        flush=True,
    )


async def turns(places: Sequence[Place], model: str, rounds: int) -> list[tuple[list[Load], list[Load]]]:
    """Of each place the loads with one client and with many."""
    found: list[tuple[list[Load], list[Load]]] = [([], []) for _ in places]
    for place in places:
        await load(place, model, MANY, 40)
    for number in range(rounds):
        order = list(enumerate(places))
        for at, place in order if number % 2 else order[::-1]:
            found[at][0].append(await load(place, model, 1, 10))
            found[at][1].append(await load(place, model, MANY, 48))
    return found


# --- the settings ---------------------------------------------------------------------------------------------


def workers(count: int) -> Callable[[Settings], None]:
    return environment(NUM_WORKERS=str(count), WEB_CONCURRENCY=str(count))


def environment(**values: str) -> Callable[[Settings], None]:
    return lambda settings: settings.environment.update(values)


def config(section: str, **values: Any) -> Callable[[Settings], None]:
    return lambda settings: settings.config[section].update(values)


def flags(before: str, after: str) -> Callable[[Settings], None]:
    def change(settings: Settings) -> None:
        assert before in settings.start, before
        settings.start = settings.start.replace(before, after)

    return change


def key(name: str) -> Callable[[Settings], None]:
    return lambda settings: setattr(settings, "key", name)


def provider(name: str) -> Callable[[Settings], None]:
    def change(settings: Settings) -> None:
        given = settings.config["model_list"][0]["litellm_params"]
        given["model"] = f"{name}/{given['model'].partition('/')[2]}"

    return change


def without_database(settings: Settings) -> None:
    del settings.environment["DATABASE_URL"]
    settings.key = "master"


def without_redis(settings: Settings) -> None:
    for name in ("coordination_redis", "use_redis_transaction_buffer"):
        del settings.config["general_settings"][name]


def gunicorn(settings: Settings) -> None:
    port = re.search(r"--port (\S+)", settings.start)[1]
    python = settings.start.split("/uvicorn")[0]
    settings.start = (
        f"{python}/gunicorn litellm.proxy.proxy_server:app --bind 127.0.0.1:{port} --workers 1 "
        "--worker-class uvicorn.workers.UvicornWorker --timeout 600 --keep-alive 120"
    )


def granian(settings: Settings) -> None:
    port = re.search(r"--port (\S+)", settings.start)[1]
    python = settings.start.split("/uvicorn")[0]
    settings.start = (
        f"{python}/granian litellm.proxy.proxy_server:app --interface asgi --host 127.0.0.1 --port {port} "
        "--workers 1 --loop uvloop --no-access-log --log-level warning"
    )


SETTINGS: dict[str, Callable[[Settings], Any]] = {
    "nothing changed": lambda settings: None,
    "2 workers": workers(2),
    "asyncio, not uvloop": flags("--loop uvloop", "--loop asyncio"),
    "h11, not httptools": flags("--http httptools", "--http h11"),
    "gunicorn": gunicorn,
    "granian": granian,
    "access log": flags("--no-access-log", "--access-log --log-level info"),
    "log of INFO as JSON": lambda settings: (
        environment(LITELLM_LOG="INFO")(settings),
        config("litellm_settings", json_logs=True)(settings),
    ),
    "prompts kept for logging": config("litellm_settings", turn_off_message_logging=False),
    "no Prometheus": lambda settings: settings.config["litellm_settings"]["callbacks"].remove("prometheus"),
    "no usage with each piece": lambda settings: settings.config["litellm_settings"]["callbacks"].remove(USAGE),
    "openai/, not hosted_vllm/": provider("openai"),
    "httpx, not aiohttp": environment(DISABLE_AIOHTTP_TRANSPORT="True"),
    "idle connections kept 60 s": environment(AIOHTTP_KEEPALIVE_TIMEOUT="60"),
    "spend written each 60 s": config("general_settings", proxy_batch_write_at=60),
    "no row for each request": config("general_settings", disable_spend_logs=True),
    "no Redis": without_redis,
    "no database, master key": without_database,
    "master key": key("master"),
    "key without limits": key("plain"),
    "keys cached 600 s": config("general_settings", user_api_key_cache_ttl=600),
    "no budget reserved": config("general_settings", disable_budget_reservation=True),
    "pre-call checks": config("router_settings", enable_pre_call_checks=True),
    "no retries": config("router_settings", num_retries=0),
    "garbage collected seldom": environment(PYTHON_GC_THRESHOLD="50000,50,50"),
}


async def settings(arguments: argparse.Namespace, found: Settings, keys: dict[str, str]) -> None:
    def place(port: int, which: Settings) -> Place:
        return Place(which.name, f"http://127.0.0.1:{port}", keys[which.key], [f"litellm@{port}"])

    instance(BASE_PORT, found)
    base = place(BASE_PORT, found)
    rows("Each setting against the role's own, with one worker; in brackets the ratio")
    for name in arguments.only or SETTINGS:
        other = found.changed(name, SETTINGS[name])
        instance(OTHER_PORT, other)
        runs = await turns([base, place(OTHER_PORT, other)], arguments.model, arguments.rounds)
        stop(OTHER_PORT)
        if name == "nothing changed":
            row("the role's own", *runs[0])
        row(name, *runs[1], runs[0])


async def ways(arguments: argparse.Namespace, found: Settings, keys: dict[str, str]) -> None:
    backend = arguments.backend or f"127.0.0.1:{STANDIN_PORT}"
    workers(os.cpu_count() or 1)(found)
    instance(BASE_PORT, found)
    digest = sha256(keys["limits"].encode()).hexdigest()
    backend_key = found.environment["LITELLM_BACKEND_KEY"]
    name = nginx(NGINX_PORT, f"127.0.0.1:{BASE_PORT}", digest, "$http_authorization")
    nginx(NGINX_PORT + 1, backend, digest, f'"Bearer {backend_key}"')
    unit, proxies = f"litellm@{BASE_PORT}", [f"llmfleet-bench-nginx-{NGINX_PORT + at}" for at in range(2)]
    places = [
        Place("nginx, backend", f"https://127.0.0.1:{NGINX_PORT + 1}", keys["limits"], proxies[1:], name),
        Place("nginx, LiteLLM, backend", f"https://127.0.0.1:{NGINX_PORT}", keys["limits"], [unit, proxies[0]], name),
        Place("LiteLLM, backend", f"http://127.0.0.1:{BASE_PORT}", keys["limits"], [unit]),
        Place("backend", f"http://{backend}", backend_key),
    ]
    runs = await turns(places, arguments.model, arguments.rounds)
    rows(f"Ways to the backend, {os.cpu_count()} workers; in brackets the ratio to nginx and the backend")
    for place, own in zip(places, runs, strict=True):
        row(place.name, *own, runs[0])


async def lengths(arguments: argparse.Namespace, found: Settings, keys: dict[str, str]) -> None:
    instance(BASE_PORT, found)
    place = Place("LiteLLM", f"http://127.0.0.1:{BASE_PORT}", keys["limits"], [f"litellm@{BASE_PORT}"])
    await load(place, arguments.model, MANY, 40)
    print("\n| answer | CPU of LiteLLM, ms a request |\n|---|---|")
    for tokens, stream in ((1, False), (256, False), (1, True), (16, True), (64, True), (256, True)):
        runs = [
            await load(place, arguments.model, MANY, 40, tokens=tokens, stream=stream) for _ in range(arguments.rounds)
        ]
        used = middle([run.each("litellm") for run in runs])
        print(f"| {tokens} tokens{', streamed' if stream else ', in one piece'} | {used:.1f} |", flush=True)


def main() -> None:
    if sys.argv[1:] == ["standin"]:
        standin()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"ways": ways, "lengths": lengths, "settings": settings}
    parser.add_argument("study", choices=studies)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SETTINGS)
    parser.add_argument("--backend", help="host:port of a vLLM, instead of the stand-in")
    parser.add_argument("--model", help="its name, by default the first that LiteLLM knows")
    arguments = parser.parse_args()
    with prepared(arguments) as (found, keys):
        uvloop.run(studies[arguments.study](arguments, found, keys))


if __name__ == "__main__":
    main()
