"""Two hosts with cards that a stand-in plays, after check, converge and idempotence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import support
from testinfra.host import Host

PAGE = support.INVENTORY / ".plan.html"
WIDE = {"name": "wide", "source": "/srv/models/wide", "context": 4096, "users": 2}


@pytest.fixture(scope="module")
def hosts() -> dict[str, Host]:
    return {name: support.host(name) for name in ("one", "two")}


@pytest.fixture
def cards(hosts: dict[str, Host]) -> Iterator[Host]:
    """Host one, whose cards are put back afterwards."""
    hosts["one"].check_output("cp /srv/cards /srv/cards.before")
    yield hosts["one"]
    hosts["one"].check_output("mv /srv/cards.before /srv/cards")


def plan_of(host: Host, name: str) -> dict[str, Any]:
    return json.loads(host.file(f"/etc/vllm/{name}.plan.json").content_string)


def flags_of(host: Host, name: str) -> dict[str, str]:
    lines = host.file(f"/etc/vllm/{name}.yaml").content_string.splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))


def state(hosts: dict[str, Host]) -> dict[str, str]:
    """All that a run could change on the hosts."""
    look = "find /etc /opt /srv /var/lib/vllm -type f -printf '%p %T@ %s\\n' | sort; systemctl show -p MainPID 'vllm@*'"
    return {name: host.check_output(look) for name, host in hosts.items()}


def words(run: support.Run) -> str:
    return " ".join(run.output.split())


def test_plan_shows_all_hosts_and_writes_a_page(hosts: dict[str, Host]) -> None:
    PAGE.unlink(missing_ok=True)
    before = state(hosts)
    run = support.apply("plan")
    assert all(name in run.output for name in ("one", "two", "tiny", "second", "wide", "RTX 4090"))
    assert PAGE.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert state(hosts) == before


def test_two_models_share_one_card(hosts: dict[str, Host]) -> None:
    tiny, second = (plan_of(hosts["one"], name) for name in ("tiny", "second"))
    assert tiny["gpus"] == second["gpus"] == [0]
    rows = [plan["memory"][0] for plan in (tiny, second)]
    assert sum(row["total_bytes"] - row["spare_bytes"] - row["other_bytes"] for row in rows) < rows[0]["total_bytes"]
    assert flags_of(hosts["one"], "tiny")["max-model-len"] == "2048"
    assert flags_of(hosts["one"], "tiny")["max-num-seqs"] == "8"
    assert flags_of(hosts["one"], "second")["max-num-batched-tokens"] == "2k", "the user's own flag stays as it is"


def test_wide_model_takes_both_cards(hosts: dict[str, Host]) -> None:
    assert plan_of(hosts["two"], "wide")["gpus"] == [0, 1]
    assert flags_of(hosts["two"], "wide")["tensor-parallel-size"] == "2"
    environment = hosts["two"].file("/etc/vllm/wide.env").content_string
    assert 'CUDA_VISIBLE_DEVICES="0,1"' in environment
    assert 'CUDA_DEVICE_ORDER="PCI_BUS_ID"' in environment


def test_plan_is_for_the_engine_to_read_and_not_to_write(hosts: dict[str, Host]) -> None:
    file = hosts["two"].file("/etc/vllm/wide.plan.json")
    assert (file.user, file.group, file.mode) == ("root", "vllm", 0o640)
    file = hosts["two"].file("/var/lib/vllm/started/wide.json")
    assert (file.user, file.group, file.mode) == ("root", "root", 0o644)


def started(host: Host, name: str) -> dict[str, Any]:
    return json.loads(host.file(f"/var/lib/vllm/started/{name}.json").content_string)


def test_start_is_compared_with_the_plan(hosts: dict[str, Host]) -> None:
    for name, model in (("one", "tiny"), ("two", "wide")):
        found = started(hosts[name], model)
        assert found["measured"]["kv_cache_tokens"] == plan_of(hosts[name], model)["kv_cache_tokens"]
        assert {each["what"] for each in found["compared"]} >= {"weights_bytes", "kv_cache_bytes", "kv_cache_tokens"}
        assert all(abs(each["percent"]) < 0.1 for each in found["compared"])


def test_start_that_is_not_as_planned_is_warned_about(hosts: dict[str, Host]) -> None:
    """Once: this looks at it again, for what was written down is gone."""
    (off,) = (each for each in started(hosts["one"], "second")["compared"] if each["what"] == "kv_cache_tokens")
    assert off["percent"] == pytest.approx(-50, abs=0.1)
    hosts["one"].check_output("rm /var/lib/vllm/started/second.json")
    run = support.apply("engines", "--limit", "one")
    assert "second: KV cache" in words(run)
    assert "50.0 % of the plan less than planned" in words(run)
    assert "tiny: KV cache" not in words(run)
    assert run.total("changed") == 0


def test_engine_and_jitter_change_no_plan(cards: Host) -> None:
    """What the running engine holds, and a hundred megabytes that come and go."""
    pid = cards.check_output("systemctl show --property MainPID --value vllm@tiny.service")
    held = f"compute={pid} 24000000000 /opt/vllm/bin/vllm"
    cards.check_output(f"sed -i -e s/^free=.*/free=900000000/ -e '/^free=/a {held}' /srv/cards")
    again = support.apply("engines", "--limit", "one")
    assert again.total("changed") == 0
    cards.check_output("mv /etc/vllm/tiny.plan.json /root")
    run = support.play("plan", "--limit", "one")
    cards.check_output("mv /root/tiny.plan.json /etc/vllm")
    assert run.code == 0, "what the engine holds itself is free for it, also where its plan was lost"


REFUSED = {
    "a model too large for one of the hosts": ("site", {"vllm_models": [WIDE]}, "does not fit", "one"),
    "an architecture that nobody knows": (
        "plan",
        {"vllm_models": [{"name": "odd", "source": "/srv/models/odd"}]},
        "OddForCausalLM",
        "vllm_plan: false",
    ),
    "a flag that nobody can count": (
        "plan",
        {"vllm_models": [{**WIDE, "flags": {"cpu-offload-gb": 8}}]},
        "vllm_models[0].flags.cpu_offload_gb is 8",
        "vllm_plan: false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_stops_before_any_host_is_changed(hosts: dict[str, Host], case: str) -> None:
    playbook, variables, *messages = REFUSED[case]
    before = state(hosts)
    run = support.play(playbook, variables=variables)
    assert run.code != 0
    assert all(message in words(run) for message in messages), run.output
    assert "PLAY [Bring up" not in run.output
    assert run.total("changed") == 0
    assert state(hosts) == before


@pytest.mark.parametrize("playbook", ["site", "engines"])
def test_refusal_stops_a_part_of_the_fleet_as_well(playbook: str) -> None:
    """Ansible skips plays of localhost under --limit; and engines.yml alone plans by itself."""
    run = support.play(playbook, "--limit", "one", variables={"vllm_models": [WIDE]})
    assert run.code != 0
    assert "does not fit" in words(run)
    assert run.total("changed") == 0


def test_host_without_a_gpu_is_refused(cards: Host) -> None:
    cards.check_output("sed -i '/^.gpu/,$d' /srv/cards")
    run = support.play("plan", "--limit", "one")
    assert run.code != 0
    assert "no GPU that the planner can use" in words(run)


def test_without_a_plan_nothing_is_looked_at() -> None:
    run = support.apply("plan", "--limit", "one", variables={"vllm_plan": False})
    assert "Look at the GPUs" not in run.output
