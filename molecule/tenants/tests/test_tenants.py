"""Teams and keys of the inventory, as clients meet them: nginx, LiteLLM, PostgreSQL and vLLM together."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import support
import yaml
from openai import OpenAI
from testinfra.host import Host

GATEWAY, ENGINE = "10.77.6.10", "10.77.6.11"
METRICS = {"tiny": f"http://{ENGINE}:8000/metrics", "second": f"http://{ENGINE}:8001/metrics"}
DECLARED = yaml.safe_load((support.INVENTORY / "hosts.yml").read_text())["all"]["vars"]["serving_tenants"]
BATCH_SECONDS = 10  # litellm_batch_write_seconds


@pytest.fixture(scope="module")
def gateway() -> Host:
    return support.host("gw")


@pytest.fixture(scope="module")
def api() -> Iterator[OpenAI]:
    """For all threads: each request says whose key it has."""
    with support.client(GATEWAY, key="none") as client:
        yield client


@pytest.fixture
def tenants() -> Iterator[list[dict[str, Any]]]:
    """Those of the inventory, to be changed; afterwards they are again what they were."""
    changed = copy.deepcopy(DECLARED)
    yield changed
    if changed != DECLARED:
        apply(DECLARED)


def apply(tenants: list[dict[str, Any]], *arguments: str, **variables: Any) -> support.Run:
    given = {"serving_tenants": tenants, "serving_tenants_prune": True, **variables}
    return support.apply("tenants", *arguments, variables=given)


def key(team: str, name: str) -> str:
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


def spend(gateway: Host, alias: str) -> float:
    """By what has been written to the database."""
    program = "su postgres -c 'psql -XAtq litellm --set=alias='%s"
    sql = "SELECT spend FROM \"LiteLLM_VerificationToken\" WHERE key_alias = :'alias'"
    return float(gateway.check_output(f"echo %s | {program}", sql, alias))


def serving(gateway: Host) -> str:
    return gateway.check_output(
        "ls /etc/systemd/system/multi-user.target.wants | grep -o '^litellm@4[0-9]*' | cut -c 9-"
    )


# --- what each may do -----------------------------------------------------------------------------------------


def test_second_run_changes_nothing() -> None:
    again = support.apply("site")
    assert again.total("changed") == 0, again.output
    print(f"no-change run of gateway and engine with tenants: {again.tasks} tasks, {again.seconds:.1f} s")


def test_keys_open_what_their_teams_may_use(api: OpenAI) -> None:
    assert ask(api, key("research", "ci")) == 200
    assert ask(api, key("apps", "chat"), "second") == 200
    assert ask(api, key("research", "ci"), "second") in (401, 403)
    assert ask(api, "sk-" + "x" * 40) == 401
    assert [model.id for model in api.with_options(api_key=key("research", "ci")).models.list()] == ["tiny"]


def test_answer_streams_through_litellm(api: OpenAI) -> None:
    pieces = support.stream(api.with_options(api_key=key("apps", "chat")), "tiny", 64)
    assert len({round(when, 3) for when, _ in pieces}) > 16


def test_key_is_created_changed_blocked_and_deleted(api: OpenAI, tenants: list[dict[str, Any]]) -> None:
    tenants[1]["keys"].append({"name": "extra"})
    assert apply(tenants).total("changed") > 0
    extra = key("apps", "extra")
    assert ask(api, extra) == 200
    assert apply(tenants).total("changed") == 0
    tenants[1]["keys"][-1]["models"] = ["second"]
    apply(tenants)
    assert ask(api, extra) in (401, 403)
    tenants[1]["keys"][-1]["state"] = "blocked"
    apply(tenants)
    assert ask(api, extra, "second") == 401
    del tenants[1]["keys"][-1]
    apply(tenants)
    assert ask(api, extra, "second") == 401


def test_key_is_rotated_with_an_overlap(api: OpenAI, tenants: list[dict[str, Any]]) -> None:
    old, new = key("apps", "chat"), "sk-" + "another-key-of-the-apps-" * 2
    tenants[1]["keys"][0]["key"] = new
    apply(tenants, serving_tenants_overlap=3600)
    assert (ask(api, old), ask(api, new)) == (200, 200)
    tenants[1]["keys"][0]["key"] = old
    apply(tenants, serving_tenants_overlap=0)
    assert (ask(api, old), ask(api, new)) == (200, 401)


def test_budget_comes_to_its_end(gateway: Host, api: OpenAI, tenants: list[dict[str, Any]]) -> None:
    tenants[1]["keys"].append({"name": "poor", "max_budget": 0.0001})  # 50 tokens of answers
    apply(tenants)
    poor = key("apps", "poor")
    assert ask(api, poor, tokens=64) == 200
    support.wait_until(lambda: spend(gateway, "apps/poor") > 0.0001, 3 * BATCH_SECONDS)
    support.wait_until(lambda: ask(api, poor) != 200, 90)
    assert ask(api, poor) in (400, 422, 429)
    assert ask(api, key("apps", "chat")) == 200


@pytest.mark.parametrize("limit", [{"rpm_limit": 10}, {"tpm_limit": 400}])
def test_limit_holds_across_workers(api: OpenAI, tenants: list[dict[str, Any]], limit: dict[str, int]) -> None:
    name = next(iter(limit)).replace("_", "-")
    tenants[1]["keys"].append({"name": name, **limit})
    apply(tenants)
    limited = key("apps", name)
    time.sleep(61 - time.time() % 60)  # limits count by the clock's minute
    with ThreadPoolExecutor(4) as pool:
        found = Counter(pool.map(lambda _: ask(api, limited, tokens=16), range(30)))
    print(limit, dict(found))
    assert set(found) == {200, 429}
    if "rpm_limit" in limit:
        assert found[200] == 10
    else:
        assert found[200] <= 400 // 16 + 4


# --- faults ---------------------------------------------------------------------------------------------------


def test_database_that_is_away(gateway: Host, api: OpenAI) -> None:
    """Keys that were in use go on, and nothing that they spend is lost."""
    used = key("apps", "chat")
    assert ask(api, used) == 200
    time.sleep(2 * BATCH_SECONDS)
    before = spend(gateway, "apps/chat")
    gateway.check_output("systemctl stop 'postgresql@*'")
    try:
        answers = Counter(ask(api, used) for _ in range(10))
    finally:
        gateway.check_output("systemctl start postgresql")
        gateway.check_output("systemctl start 'postgresql@*-main' || systemctl restart postgresql")
    print("while PostgreSQL was away:", dict(answers))
    assert answers[200] == 10
    assert ask(api, used) == 200
    support.wait_until(lambda: spend(gateway, "apps/chat") >= before + 11 * 8 * 2e-6, 6 * BATCH_SECONDS)


def test_litellm_that_is_killed_comes_back(gateway: Host, api: OpenAI) -> None:
    port, cut = serving(gateway), []

    def listen() -> None:
        try:
            support.stream(api.with_options(api_key=key("apps", "chat")), "tiny", 1500)
        except Exception as error:
            cut.append(error)

    stream = threading.Thread(target=listen)
    stream.start()
    time.sleep(2)
    gateway.check_output(f"systemctl kill --kill-whom=all --signal=KILL litellm@{port}")
    stream.join(60)
    assert cut, "the stream did not notice"
    start = time.monotonic()
    support.wait_until(lambda: ask(api, key("apps", "chat")) == 200, 120)
    print(f"LiteLLM serves again after {time.monotonic() - start:.0f} s")


# --- what is spent ----------------------------------------------------------------------------------------------


def counted(gateway: Host) -> float:
    """What vLLM's own counters say that tiny's tokens cost."""
    asked, said = (
        support.metric(gateway, METRICS["tiny"], f"vllm:{kind}_tokens_total") for kind in ("prompt", "generation")
    )
    return asked * 1e-6 + said * 2e-6


def test_spend_is_what_vllm_counted(gateway: Host, api: OpenAI) -> None:
    used = key("apps", "chat")
    time.sleep(2 * BATCH_SECONDS)
    spent, cost = spend(gateway, "apps/chat"), counted(gateway)

    def one(number: int) -> None:
        chunks = api.with_options(api_key=used).chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"Say something, for the {number}th time."}],
            max_tokens=48,
            temperature=0.8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for count, _ in enumerate(chunks):
            if number % 5 == 0 and count == 12:
                chunks.close()
                break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(500)))
    time.sleep(3 * BATCH_SECONDS)
    spent, cost = spend(gateway, "apps/chat") - spent, counted(gateway) - cost
    print(f"500 requests, 100 of them cut: vLLM counted {cost:.6f}, LiteLLM recorded {spent:.6f} ({spent / cost:.4f})")
    assert spent == pytest.approx(cost, rel=0.001)
