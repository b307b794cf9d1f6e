"""LiteLLM over its life: changes under load, changes that fail, runs that are cut short, and what shows of secrets."""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import openai
import pytest
import support
from openai import OpenAI
from service import ask, key, running, serving
from testinfra.host import Host

NGINX_SITE = "/etc/nginx/sites-available/llmfleet.conf"
PRICES = {"tiny": {"input": 2, "output": 4}, "second": {"input": 10, "output": 20}}


SAMPLER = "while sleep 0.1; do cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' >>/root/arguments; done"


def secrets() -> dict[str, str]:
    """What nobody may see; of a key in PEM one line."""
    folder = support.INVENTORY / ".secrets"
    private = [path for path in folder.iterdir() if path.suffix not in (".crt", ".pub")]
    return {path.name: path.read_text().splitlines()[-2:][0] for path in private}


@pytest.fixture(scope="module")
def chat(api: OpenAI) -> OpenAI:
    return api.with_options(api_key=key("apps", "chat"))


@dataclass
class Clients:
    """What those meet who use the service all the while."""

    answers: Counter[int | str] = field(default_factory=Counter)
    streams: list[int] = field(default_factory=list)  # how many pieces each had
    cut: list[str] = field(default_factory=list)


@contextmanager
def clients(chat: OpenAI, *, stream: int = 0) -> Iterator[Clients]:
    """One asks again and again, another has one stream of so many tokens after the other."""
    met, done = Clients(), threading.Event()

    def ask() -> None:
        while not done.wait(0.2):
            try:
                chat.completions.create(model="tiny", prompt="Say something.", max_tokens=2)
                met.answers[200] += 1
            except openai.APIStatusError as error:
                met.answers[error.status_code] += 1
            except openai.APIError as error:
                met.answers[str(error)] += 1

    def listen() -> None:
        while not done.is_set():
            try:
                met.streams.append(len(support.stream(chat, "tiny", stream)))
            except Exception as error:
                met.cut.append(repr(error))

    threads = [threading.Thread(target=ask), *([threading.Thread(target=listen)] if stream else [])]
    for thread in threads:
        thread.start()
    try:
        yield met
    finally:
        done.set()
        for thread in threads:
            thread.join()


def remote(command: str, text: str = "") -> str:
    """On the gateway, with the text at its standard input: nothing of it is in an argument."""
    ssh = ["ssh", "-F", str(support.HOSTS / "ssh_config"), "gw", command]
    return subprocess.run(ssh, input=text, text=True, check=True, capture_output=True).stdout


@dataclass(frozen=True)
class Change:
    """What a change of prices looked like."""

    run: support.Run
    check: support.Run
    ports: tuple[str, str]  # before and after
    met: Clients
    arguments: str  # of all processes of the gateway meanwhile


@pytest.fixture(scope="module")
def change(gateway: Host, chat: OpenAI) -> Iterator[Change]:
    before = serving(gateway)
    gateway.check_output("systemd-run --quiet --collect --unit=sampler sh -c %s", SAMPLER)
    try:
        check = support.apply("gateway", "--check", "--diff", "-vvv", variables={"litellm_prices": PRICES})
        with clients(chat, stream=1900) as met:
            run = support.apply("gateway", "--diff", "-vvv", variables={"litellm_prices": PRICES})
    finally:
        gateway.check_output("systemctl stop sampler")
    print(f"a switch: {run.seconds:.0f} s, {met.answers[200]} requests and {len(met.streams)} streams meanwhile")
    yield Change(run, check, (before, serving(gateway)), met, remote("cat /root/arguments; rm /root/arguments"))
    support.apply("gateway")


def test_a_change_cuts_no_stream_and_refuses_nobody(gateway: Host, change: Change) -> None:
    assert set(change.ports) == {"4000", "4001"}
    assert set(change.met.answers) == {200}
    assert change.met.cut == []
    assert len(change.met.streams) > 1
    assert "+    output_cost_per_token: 4.0e-06" in change.check.output
    support.wait_until(lambda: running(gateway) == {serving(gateway)}, 180)


def test_no_secret_shows(change: Change) -> None:
    found = secrets()
    assert {"litellm_master_key", "litellm_salt_key", "vllm_api_key", "key_apps_chat", "backup_key"} <= set(found)
    assert "litellm@" in change.arguments  # else nothing was looked at
    for name, value in found.items():
        for where, text in (("output", change.run.output + change.check.output), ("arguments", change.arguments)):
            assert value not in text, f"{name} is in the {where}"
    readable = "find /etc /run /tmp /var/tmp /var/log /var/cache/litellm /var/lib/redis -type f -perm -o=r -print0"
    look = (
        "umask 077; cat >/root/patterns; trap 'rm /root/patterns' EXIT; "
        f"({readable}; find /var/log /tmp -type f -print0) | xargs -0 grep -lFf /root/patterns; "
        "journalctl --no-pager --output=cat | grep -Ff /root/patterns | cut -c -60; true"
    )
    shown = f"shown-{token_hex(8)}"
    remote(f"umask 022; echo {shown} >/run/llmfleet-shown; logger {shown}; journalctl --sync")
    seen = remote(look, "\n".join([shown, *found.values()])).splitlines()
    assert [line for line in seen if not line.startswith("/var/log/journal/")] == ["/run/llmfleet-shown", shown]
    remote("rm /run/llmfleet-shown")


def test_metrics_are_those_of_all_workers(gateway: Host, chat: OpenAI) -> None:
    url, name = f"http://127.0.0.1:{serving(gateway)}/metrics/", "litellm_proxy_total_requests_metric_total"
    before = support.metric(gateway, url, name)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: chat.completions.create(model="tiny", prompt="Say.", max_tokens=2), range(24)))
    support.wait_until(lambda: support.metric(gateway, url, name) == before + 24, 60)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        pytest.param({"litellm_config": {"general_settings": "nonsense"}}, "general_settings", marks=pytest.mark.long),
        pytest.param(
            {"litellm_config": {"router_settings": {"routing_strategy": "nonsense"}}},
            "nonsense",
            marks=pytest.mark.long,
        ),
        ({"litellm_config": {"general_settings": {"master_key": "sk-another"}}}, "What served before serves on."),
    ],
)
def test_what_litellm_refuses_leaves_what_served(
    gateway: Host, chat: OpenAI, variables: dict[str, Any], says: str
) -> None:
    before = serving(gateway)
    with clients(chat) as met:
        run = support.play("gateway", variables=variables)
    assert run.code != 0
    assert says in run.said
    assert set(met.answers) == {200}
    assert (serving(gateway), running(gateway)) == (before, {before})


@pytest.mark.long
def test_runs_that_are_cut_short_are_mended_by_the_next(gateway: Host, chat: OpenAI) -> None:
    """Before the new instance has answered, and before nginx knows of it."""
    before = serving(gateway)
    (other,) = {"4000", "4001"} - {before}
    prices = {"litellm_prices": {**PRICES, "second": {"input": 3, "output": 3}}}
    moments = (lambda: other in running(gateway), lambda: serving(gateway) == other)
    with clients(chat) as met:
        for moment in moments:
            support.cut_short(moment, 900, "gateway", variables=prices)
        assert f"127.0.0.1:{before}" in gateway.file(NGINX_SITE).content_string
        support.apply("gateway", variables=prices)
    assert set(met.answers) == {200}
    assert f"127.0.0.1:{other}" in gateway.file(NGINX_SITE).content_string
    support.wait_until(lambda: running(gateway) == {serving(gateway)}, 180)


def test_drained_model_gets_nothing_and_the_keys_stay(gateway: Host, api: OpenAI) -> None:
    drained = {"drain_host": "eng", "drain_model": "second"}
    support.apply("drain", variables=drained)
    assert running(gateway) == {serving(gateway)}, "it has not waited for the instance that knew nothing of it"
    assert (ask(api, key("apps", "chat"), "second"), ask(api, key("apps", "chat"))) == (503, 200)
    support.apply("drain", variables={**drained, "drain_undo": True})
    assert ask(api, key("apps", "chat"), "second") == 200
