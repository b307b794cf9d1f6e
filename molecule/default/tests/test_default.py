"""One Debian 12 host after check, converge and idempotence. Each test takes over what the one before has left."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import support
from testinfra.host import Host

ADDRESS = "10.77.2.11"
UNIT = "vllm@tiny.service"
METRICS = "http://127.0.0.1:8000/metrics"


@pytest.fixture(scope="module")
def host() -> Host:
    return support.host("one")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    folder = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "models"
    common = {"copy": True, "context": 2048, "users": 8, "flags": {"enforce_eager": True}}
    return {name: {"name": name, "source": str(folder / name), **common} for name in ("tiny", "second")}


def main_pid(host: Host) -> int:
    return int(host.check_output(f"systemctl show --property MainPID --value {UNIT}"))


def test_engine_runs_unprivileged(host: Host) -> None:
    assert host.service(UNIT).is_running
    assert host.service(UNIT).is_enabled
    assert host.process.get(pid=main_pid(host)).user == "vllm"


def test_start_is_written_down(host: Host) -> None:
    """Of real vLLM, whose words for it change from version to version. On the CPU there is no plan to compare with."""
    started = json.loads(host.file("/var/lib/vllm/started/tiny.json").content_string)
    assert started["measured"]["kv_cache_tokens"] > 2048
    assert started["measured"]["max_model_len"] == 2048
    assert started["compared"] == []


def test_only_ssh_http_and_https_are_open(host: Host) -> None:
    assert support.listeners(host) == {22, 80, 443}


@pytest.mark.parametrize("address", [ADDRESS, "fd77:2::11"])
def test_openai_client_gets_a_stream(address: str) -> None:
    with support.client(address) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
        # Long enough to go on for a second: of a short answer all pieces come within milliseconds.
        times = [time for time, _ in support.stream(api, "tiny", 1500)]
    assert len(times) > 100
    assert times[0] < 0.6 * times[-1], "the answer came in one burst"


def test_no_key_is_to_be_seen(host: Host) -> None:
    """All that holds a key is written anew in a run with -vvv, while somebody looks at the processes here and there."""
    keys = [support.secret("api_key"), support.secret("vllm_api_key")]
    host.check_output("rm /etc/vllm/tiny.env /etc/nginx/llmfleet/secrets.conf")
    host.check_output("systemd-run --unit look sh -c 'while sleep 0.1; do ps -eo args >> /root/seen; done'")
    here: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            here.append(subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        run = support.apply("site", "-vvv", "--diff")
    finally:
        ended.set()
        looking.join()
    assert run.total("changed") > 0
    assert here
    seen = {
        "the output of a run with -vvv": run.output,
        "the arguments of processes on the controller": "".join(here),
        "the arguments of processes on the host": host.check_output(
            "systemctl stop look; cat /root/seen; rm /root/seen"
        ),
        "the journal": host.check_output("journalctl --no-pager --all --output=verbose"),
        "files that everybody can read": host.check_output(
            f"find /etc /opt/vllm /opt/uv /run /tmp /var -xdev -type f -perm -o+r -size -10M "
            f"-exec grep -lF -e {shlex.quote(keys[0])} -e {shlex.quote(keys[1])} {{}} + || true"
        ),
    }
    assert "vllm.entrypoints" in seen["the arguments of processes on the host"]
    assert [place for place, text in seen.items() if any(key in text for key in keys)] == []
    assert seen["files that everybody can read"] == ""


def test_confinement(host: Host) -> None:
    scores = {unit: support.exposure(host, unit) for unit in (UNIT, "nginx.service")}
    print("systemd-analyze security:", scores)
    assert scores[UNIT] < 2
    assert scores["nginx.service"] < 3


def test_sigkill_is_survived(host: Host) -> None:
    before = main_pid(host)
    host.check_output(f"kill -KILL {before}")
    support.wait_until(lambda: main_pid(host) not in (0, before), 30)
    support.wait_until(lambda: "vllm:" in support.fetch(host, METRICS), 180)


def test_stop_lets_a_running_stream_end(host: Host) -> None:
    pieces: list[tuple[float, str]] = []
    begun = threading.Event()

    def consume() -> None:
        with support.client(ADDRESS) as api:
            pieces.extend(support.stream(api, "tiny", 1900, begun))

    reader = threading.Thread(target=consume)
    reader.start()
    assert begun.wait(60)
    assert not pieces, "the stream has ended before the stop"
    host.check_output(f"systemctl stop {UNIT}")
    reader.join(60)
    host.check_output(f"systemctl start {UNIT}")
    assert pieces, "the stream has been cut"


def test_second_model(host: Host, models: dict[str, Any]) -> None:
    both = {"vllm_models": [models["tiny"], models["second"]]}
    before = main_pid(host)
    assert support.apply("site", variables=both).total("changed") > 0
    assert main_pid(host) == before, "adding a model has restarted the other one"
    assert support.apply("site", variables=both).total("changed") == 0
    with support.client(ADDRESS) as api:
        assert {model.id for model in api.models.list()} == {"tiny", "second"}
        for model in ("tiny", "second"):
            assert support.stream(api, model, 32)
    assert support.apply("site").total("changed") > 0
    assert not host.service("vllm@second.service").is_running
    assert not host.file("/etc/vllm/second.yaml").exists
    assert not host.file("/etc/vllm/second.env").exists
    assert not host.file("/var/lib/vllm/started/second.json").exists


BAD_INPUT = {
    "a misspelled variable": ({"vllm_verison": "0.32.0"}, "do you mean vllm_version?"),
    "a wrong type": ({"vllm_shutdown_timeout": "soon"}, "write a whole number"),
    "a version with a known hole": ({"vllm_version": "0.21.0"}, "CVE-2026-48746"),
    "a port that sshd has": ({"vllm_models": [{"name": "a", "source": "o/m", "port": 22}]}, "port is 22"),
    "a port twice": (
        {"vllm_models": [{"name": n, "source": "o/m", "port": 8000} for n in "ab"]},
        "vllm_models[1].port is 8000, as is vllm_models[0].port",
    ),
    "a name twice": ({"vllm_models": [{"name": "a", "source": "o/m"}] * 2}, "vllm_models[1].name is 'a', as is"),
    "a folder that is no model": (
        {"vllm_models": [{"name": "a", "source": "/srv/nothing"}]},
        "this host has no /srv/nothing/config.json",
    ),
    "a folder on the controller that is no model": (
        {"vllm_models": [{"name": "a", "source": "/srv/nothing", "copy": True}]},
        "the controller has no /srv/nothing/config.json",
    ),
    "an unknown key of a model": ({"vllm_models": [{"name": "a", "source": "o/m", "contxt": 1}]}, "(a) has contxt, "),
    "too little disk": ({"vllm_version": "0.31.0", "vllm_required_free_bytes": 2**60}, "need 1073741824.0 GiB"),
    "a port that nginx wants": ({"nginx_https_port": 8000}, "Port 8000 is wanted by nginx"),
    "no driver": ({"vllm_platform": "cuda"}, "no NVIDIA driver is loaded"),
    "no server name": ({"nginx_server_name": ""}, "nginx_server_name"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_changed(case: str) -> None:
    variables, message = BAD_INPUT[case]
    run = support.play("site", variables=variables)
    assert run.code != 0
    assert message in " ".join(run.output.split())
    assert run.total("changed") == 0


def test_flag_that_vllm_does_not_know_leaves_the_service_as_it_is(host: Host, models: dict[str, Any]) -> None:
    before = main_pid(host)
    wrong = {**models["tiny"], "flags": {"max_modle_len": 1}}
    run = support.play("site", variables={"vllm_models": [wrong]})
    assert run.code != 0
    said = " ".join(run.output.split())
    assert "unrecognized arguments: --max-modle-len" in said
    assert "Do you mean --max-model-len?" in said
    assert main_pid(host) == before
    assert support.apply("site").total("changed") == 0


def test_uv_from_a_given_wheel(host: Host, tmp_path: Path) -> None:
    """For hosts without a way to an index: the wheel comes from the controller, and its hash is checked twice."""
    version = re.search(r"uv (\S+)", host.check_output("/opt/uv/bin/uv --version"))[1]
    download = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(tmp_path)]
    subprocess.run([*download, f"uv=={version}"], check=True)
    wheel = next(tmp_path.glob("uv-*.whl"))
    host.check_output("rm -rf /opt/uv")
    support.apply("engines", variables={"uv_wheel": str(wheel)})
    assert host.check_output("/opt/uv/bin/uv --version").startswith(f"uv {version} ")
    wheel.write_bytes(wheel.read_bytes() + b"changed")
    run = support.play("preflight", variables={"uv_wheel": str(wheel)})
    assert run.code != 0
    assert "must be a wheel of uv_version" in " ".join(run.output.split())
    assert support.apply("engines").total("changed") == 0


@pytest.mark.long
def test_run_cut_short_while_it_installs(host: Host) -> None:
    host.check_output(f"systemctl stop {UNIT} && rm -rf /opt/vllm/0.32.0")
    support.cut_short(lambda: host.run("pgrep -f 'uv pip install'").succeeded, 600)
    assert host.run("pgrep -f 'uv pip install'").succeeded, "it should go on, for the next run to wait for"
    assert not host.file("/opt/vllm/0.32.0/recipe.txt").exists
    support.apply("site")
    assert host.file("/opt/vllm/0.32.0/recipe.txt").exists


def test_run_cut_short_while_it_copies_and_configures(host: Host) -> None:
    """What such a run leaves: half of the weights, and flags that the running process has never read."""
    weights, flags = "/var/lib/vllm/models/tiny/model.safetensors", "/etc/vllm/tiny.yaml"
    before = main_pid(host)
    host.check_output(f"truncate --size 1000 {weights} && sed -i 's/max-num-seqs: 8/max-num-seqs: 4/' {flags}")
    support.apply("site")
    assert host.file(weights).size > 100_000
    assert host.file(flags).contains("max-num-seqs: 8")
    assert main_pid(host) != before


def test_run_cut_short_while_it_starts_a_model(host: Host) -> None:
    host.check_output(f"systemctl stop {UNIT}")
    support.cut_short(lambda: main_pid(host) != 0, 60)
    again = support.apply("site")
    assert again.total("changed") == 0
    print(f"no-change run of one host: {again.tasks} tasks, {again.seconds:.1f} s, with the wait for the start")


def test_remove_leaves_nothing(host: Host) -> None:
    support.apply("remove")
    units = ("/etc/systemd/system/vllm@.service", "/etc/systemd/system/nginx.service.d")
    for path in ("/etc/vllm", "/opt/vllm", "/opt/uv", "/var/cache/vllm", *units):
        assert not host.file(path).exists, path
    assert host.file("/var/lib/vllm/models/tiny/config.json").exists, "models are kept unless it is asked for"
    assert not host.user("vllm").exists
    assert not support.listeners(host) & {443, 8000}
    kept = ("/opt/llmfleet-demo", "/var/log/nginx/llmfleet.access.log")
    found = host.check_output("find / -xdev -iname '*llmfleet*' -not -path '/proc/*'").splitlines()
    assert [path for path in found if path not in kept] == []
    support.apply("remove", variables={"vllm_remove_models": True})
    assert not host.file("/var/lib/vllm").exists
