"""A gateway on Debian 13 before two engines on Debian 12."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import support

GATEWAY = "10.77.3.10"
ENGINES = {"eng1": "10.77.3.11", "eng2": "10.77.3.12"}


def served(host: Any) -> int:
    """How many requests for tiny this engine has ended."""
    lines = host.check_output(
        f"curl -s http://{ENGINES[host.backend.host]}:8000/metrics | grep '^vllm:request_success_total' || true"
    )
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines.splitlines())


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest) -> dict[str, Any]:
    import testinfra  # noqa: PLC0415 - needs the inventory that the plugin has been given

    inventory = request.config.getoption("ansible_inventory")
    return {name: testinfra.get_host(f"ansible://{name}", ansible_inventory=inventory) for name in ENGINES}


def test_replicas_share_the_requests(engines: dict[str, Any]) -> None:
    before = {name: served(host) for name, host in engines.items()}
    with support.client(GATEWAY) as api:
        for _ in range(8):
            support.stream(api, "tiny", 4)
    assert all(served(host) > before[name] for name, host in engines.items())


def test_model_from_the_hub_answers() -> None:
    with support.client(GATEWAY) as api:
        assert {model.id for model in api.models.list()} == {"tiny", "second"}
        assert len(support.stream(api, "second", 32)) >= 30


def test_engine_talks_to_the_gateway_only(engines: dict[str, Any]) -> None:
    """From the machine that runs the tests, which is neither a gateway nor the engine itself."""
    for name, address in ENGINES.items():
        assert engines[name].service("vllm@tiny.service").is_running
        with pytest.raises(OSError, match=r"timed out|unreachable|refused"):
            socket.create_connection((address, 8000), timeout=3).close()


def test_one_engine_less_is_not_noticed(engines: dict[str, Any]) -> None:
    engines["eng1"].check_output("systemctl stop vllm@tiny.service")
    try:
        with support.client(GATEWAY) as api:
            for _ in range(6):
                assert len(support.stream(api, "tiny", 16)) >= 15
    finally:
        engines["eng1"].check_output("systemctl start vllm@tiny.service")


def test_download_cut_short_is_mended(engines: dict[str, Any]) -> None:
    folder = "/var/lib/vllm/models/llmfleet--second@main"
    engines["eng2"].check_output("systemctl stop vllm@second.service")
    engines["eng2"].check_output(f"rm {folder}/.complete && truncate --size 1000 {folder}/model.safetensors")
    support.apply("site")
    assert engines["eng2"].file(f"{folder}/model.safetensors").size > 100_000
    again = support.apply("site")
    assert again.total("changed") == 0
    print(f"no-change run of three hosts: {again.tasks} tasks, {again.seconds:.1f} s")
