"""A gateway on Debian 13 before two engines on Debian 12."""

from __future__ import annotations

import pytest
import support
from testinfra.host import Host

GATEWAY = "10.77.3.10"
ENGINES = {"eng1": "10.77.3.11", "eng2": "10.77.3.12"}


@pytest.fixture(scope="module")
def engines() -> dict[str, Host]:
    return {name: support.host(name) for name in ENGINES}


def served(engines: dict[str, Host]) -> dict[str, float]:
    """How many requests for tiny each engine has ended."""
    return {
        name: support.metric(host, f"http://{ENGINES[name]}:8000/metrics", "vllm:request_success_total")
        for name, host in engines.items()
    }


def test_replicas_share_the_requests(engines: dict[str, Host]) -> None:
    before = served(engines)
    with support.client(GATEWAY) as api:
        for _ in range(8):
            support.stream(api, "tiny", 4)
    after = served(engines)
    assert all(after[name] > before[name] for name in ENGINES)


def test_model_from_the_hub_answers() -> None:
    with support.client(GATEWAY) as api:
        assert {model.id for model in api.models.list()} == {"tiny", "second"}
        assert support.stream(api, "second", 32)


def test_engine_is_to_talk_to_itself_and_the_gateway_only(engines: dict[str, Host]) -> None:
    """What systemd has been told. It cannot be tried: test hosts may not load the BPF programs that enforce it."""
    for name, address in ENGINES.items():
        shown = engines[name].check_output("systemctl show --property IPAddressAllow,IPAddressDeny vllm@tiny.service")
        rules = dict(line.split("=", 1) for line in shown.splitlines())
        assert set(rules["IPAddressAllow"].split()) == {"127.0.0.0/8", "::1/128", f"{GATEWAY}/32", f"{address}/32"}
        assert set(rules["IPAddressDeny"].split()) == {"0.0.0.0/0", "::/0"}


def test_one_engine_less_is_not_noticed(engines: dict[str, Host]) -> None:
    engines["eng1"].check_output("systemctl stop vllm@tiny.service")
    try:
        with support.client(GATEWAY) as api:
            for _ in range(6):
                assert support.stream(api, "tiny", 16)
    finally:
        engines["eng1"].check_output("systemctl start vllm@tiny.service")


@pytest.mark.long
def test_download_cut_short_is_mended(engines: dict[str, Host]) -> None:
    folder = "/var/lib/vllm/models/llmfleet--second@main"
    engines["eng2"].check_output("systemctl stop vllm@second.service")
    engines["eng2"].check_output(f"rm {folder}/.complete && truncate --size 1000 {folder}/model.safetensors")
    support.apply("site")
    assert engines["eng2"].file(f"{folder}/model.safetensors").size > 100_000
    again = support.apply("site")
    assert again.total("changed") == 0
    print(f"no-change run of three hosts: {again.tasks} tasks, {again.seconds:.1f} s")
