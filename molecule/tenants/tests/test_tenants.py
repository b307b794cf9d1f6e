"""Teams and keys of the inventory, as clients meet them: nginx, LiteLLM, PostgreSQL and vLLM together."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import support
from openai import OpenAI
from service import BATCH_SECONDS, DECLARED, ask, counted, key, listening, serving, settled, spend
from testinfra.host import Host

TENANTS = DECLARED["vars"]["serving_tenants"]
ALERTS, SLACK = (urlsplit(DECLARED["vars"][f"litellm_alert_{kind}_url"]) for kind in ("webhook", "slack"))
PRICE = 2e-6  # of a token that tiny says


@pytest.fixture
def tenants() -> Iterator[list[dict[str, Any]]]:
    """Those of the inventory, to be changed; afterwards they are again what they were."""
    changed = copy.deepcopy(TENANTS)
    yield changed
    if changed != TENANTS:
        apply(TENANTS)


def apply(tenants: list[dict[str, Any]], *arguments: str, **variables: Any) -> support.Run:
    given = {"serving_tenants": tenants, "serving_tenants_prune": True, **variables}
    return support.apply("tenants", *arguments, variables=given)


# --- what each may do -----------------------------------------------------------------------------------------


def test_keys_open_what_their_teams_may_use(api: OpenAI) -> None:
    assert ask(api, key("research", "ci")) == 200
    assert ask(api, key("apps", "chat"), "second") == 200
    assert ask(api, key("research", "ci"), "second") in (401, 403)
    assert ask(api, "sk-" + "x" * 40) == 401
    assert [model.id for model in api.with_options(api_key=key("research", "ci")).models.list()] == ["tiny"]


def test_answer_streams_through_litellm(api: OpenAI) -> None:
    pieces = support.stream(api.with_options(api_key=key("apps", "chat")), "tiny", 64)
    assert len({round(when, 3) for when, _ in pieces}) > 16


def test_keys_are_changed_blocked_rotated_and_deleted(api: OpenAI, tenants: list[dict[str, Any]]) -> None:
    old, new = key("apps", "chat"), "sk-" + "another-key-of-the-apps-" * 2
    changing, leaving = key("apps", "changing"), key("apps", "leaving")
    assert (ask(api, changing), ask(api, leaving)) == (200, 200)
    mine = {entry["name"]: entry for entry in tenants[1]["keys"]}
    mine["chat"]["key"] = new
    mine["changing"]["models"] = ["second"]
    mine["leaving"]["state"] = "blocked"
    apply(tenants, serving_tenants_overlap=3600)
    assert (ask(api, old), ask(api, new)) == (200, 200)
    assert ask(api, changing) == 403
    assert ask(api, leaving) == 401
    tenants[1]["keys"].remove(mine["leaving"])
    mine["chat"]["key"] = old
    apply(tenants, serving_tenants_overlap=0)
    assert (ask(api, old), ask(api, new)) == (200, 401)
    assert ask(api, changing, "second") == 200
    assert ask(api, leaving) == 401


def test_budget_comes_to_its_end(gateway: Host, api: OpenAI) -> None:
    """It is enough for 50 tokens: a first answer may be longer, and a later one is refused."""
    poor = key("apps", "poor")
    with listening(gateway, int(ALERTS.port)) as told:
        support.wait_until(lambda: ask(api, poor, tokens=64) == 422, 300)
        slack = re.compile(rf"^POST {SLACK.path} .*Budget Crossed.*apps/poor", re.MULTILINE)
        support.wait_until(lambda: "budget_crossed" in told() and slack.search(told()), 180)
        print(told())
        assert f"POST {ALERTS.path}" in told()
        assert "apps/poor" in told()
        assert poor not in told()
    support.wait_until(lambda: spend(gateway, "apps/poor") > 0.0001, 18 * BATCH_SECONDS)
    assert ask(api, key("apps", "chat")) == 200


def test_limits_hold_across_workers(api: OpenAI) -> None:
    """Of requests exactly; of tokens nearly, for what a request takes is known only when it ends."""
    for name, least, most in (("rpm", 10, 10), ("tpm", 10, 400 // 16 + 4)):
        limited = key("apps", name)
        time.sleep(61 - time.time() % 60)  # limits count by the clock's minute
        with ThreadPoolExecutor(4) as pool:
            found = Counter(pool.map(lambda _, limited=limited: ask(api, limited, tokens=16), range(40)))
        print(f"{name}: {dict(found)}")
        assert set(found) == {200, 429}
        assert least <= found[200] <= most


# --- faults ---------------------------------------------------------------------------------------------------


def test_database_that_is_away(gateway: Host, api: OpenAI) -> None:
    """Keys that were in use go on, and nothing that they spend is lost."""
    used, before = key("apps", "chat"), settled(lambda: spend(gateway, "apps/chat"))
    with ThreadPoolExecutor(8) as pool:  # so that both workers know the key, for a minute
        assert set(pool.map(lambda _: ask(api, used), range(16))) == {200}
    gateway.check_output("systemctl stop 'postgresql@*'")
    try:
        answers = Counter(ask(api, used) for _ in range(10))
    finally:
        gateway.check_output("systemctl start postgresql")
        gateway.check_output("systemctl start 'postgresql@*-main' || systemctl restart postgresql")
    print("while PostgreSQL was away:", dict(answers))
    assert answers[200] == 10
    assert ask(api, used) == 200
    support.wait_until(lambda: spend(gateway, "apps/chat") >= before + (16 + 10 + 1) * 8 * PRICE, 18 * BATCH_SECONDS)


def test_litellm_that_is_killed_comes_back(gateway: Host, api: OpenAI) -> None:
    port, begun = serving(gateway), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(support.stream, api.with_options(api_key=key("apps", "chat")), "tiny", 1900, begun)
        assert begun.wait(120)
        gateway.check_output(f"systemctl kill --kill-whom=all --signal=KILL litellm@{port}")
        assert stream.exception(120), "the stream did not notice"
    start = time.monotonic()
    support.wait_until(lambda: ask(api, key("apps", "chat")) == 200, 300)
    print(f"LiteLLM serves again after {time.monotonic() - start:.0f} s")


# --- what is spent ----------------------------------------------------------------------------------------------


def cost_of(gateway: Host, requests: Callable[[], None]) -> tuple[float, float]:
    """What LiteLLM has recorded for the requests, and what they cost by vLLM's counters."""
    spent, counts = settled(lambda: spend(gateway, "apps/chat")), counted(gateway)["tiny"]
    requests()
    return settled(lambda: spend(gateway, "apps/chat")) - spent, counted(gateway)["tiny"] - counts


def test_spend_is_what_vllm_counted(gateway: Host, api: OpenAI) -> None:
    """To the token. Of what is cut that is charged which LiteLLM had, but not what vLLM made until it noticed."""
    used = api.with_options(api_key=key("apps", "chat"))
    read = 12

    def stream(number: int, cut: bool) -> None:
        what: dict[str, Any] = {"model": "tiny", "max_tokens": 48, "stream": True, "extra_body": {"ignore_eos": True}}
        text = f"Say something, for the {number}th time."
        if number % 4:
            pieces = used.chat.completions.create(messages=[{"role": "user", "content": text}], temperature=0.8, **what)
        else:
            pieces = used.completions.create(prompt=text, temperature=0.8, **what)
        for count, _ in enumerate(pieces):
            if cut and count == read:
                pieces.close()
                break

    def streams(count: int, cut: bool) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: stream(number, cut), range(count)))

    spent, cost = cost_of(gateway, lambda: streams(400, cut=False))
    print(f"400 whole streams: vLLM counted {cost:.6f}, LiteLLM recorded {spent:.6f}")
    assert spent == pytest.approx(cost, rel=1e-9)
    spent, cost = cost_of(gateway, lambda: streams(100, cut=True))
    lost = (cost - spent) / PRICE / 100
    print(f"100 cut streams: vLLM counted {cost:.6f}, LiteLLM recorded {spent:.6f}, {lost:.1f} tokens less for each")
    assert 100 * read * PRICE <= spent <= cost * (1 + 1e-9)
