# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""From the inventory to LiteLLM's configuration, and what is wrong with the role's variables."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm_config
from packaging.version import Version

ROLES = Path(__file__).parents[2] / "roles"
ROLE = ROLES / "litellm"
SECRET = "0123456789-0123456789"
SOCKET = "postgresql://litellm@localhost/litellm?host=/run/postgresql"
REMOTE = "postgresql://litellm:pass%2Fword@db.example.org:5432/litellm?sslmode=require&sslaccept=strict"


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "gateways": 1,
        "requirements": "litellm==1.106.2 \\\n    --hash=sha256:00\nlitellm-enterprise==0.1.76\n",
        "workers": 8,
        "postgresql_max_connections": 170,
        "redis": False,
        "alerting": [],
        "litellm_models": [
            {
                "model": "qwen",
                "servers": ["10.0.0.1:8000", "[fd77::1]:8000"],
            },
            {"model": "embed", "servers": ["gpu-1:8001"], "kind": "embedding"},
        ],
        "litellm_drained": [],
        "litellm_prices": {"qwen": {"input": 0.15, "output": 0.6}},
        "litellm_backend_key": SECRET,
        "litellm_master_key": "sk-" + "m" * 20,
        "litellm_salt_key": "s" * 20,
        "litellm_database_url": SOCKET,
        "litellm_database_connections": 10,
        "litellm_allow_requests_on_db_unavailable": True,
        "litellm_version": "1.106.2",
        "litellm_accept_known_vulnerabilities": [],
        "litellm_prisma_engines_dir": "",
        "litellm_ports": [4000, 4001],
        "litellm_workers": 0,
        "litellm_redis_url": "",
        "litellm_fallbacks": {},
        "litellm_retries": 2,
        "litellm_request_timeout": 3600,
        "litellm_allowed_fails": 3,
        "litellm_cooldown_seconds": 30,
        "litellm_batch_write_seconds": 10,
        "litellm_request_log_days": 90,
        "litellm_alert_slack_url": "",
        "litellm_alert_webhook_url": "",
        "litellm_config": {},
        "litellm_environment": {},
        "litellm_start_timeout": 180,
        "litellm_shutdown_timeout": 600,
        **changes,
    }


def problems(**changes: Any) -> list[str]:
    return _litellm_config.problems(settings(**changes))


def config(**changes: Any) -> dict[str, Any]:
    return _litellm_config.config(settings(**changes))


# --- the configuration --------------------------------------------------------------------------------------


def test_every_replica_is_a_deployment() -> None:
    found = config()["model_list"]
    assert [entry["model_name"] for entry in found] == ["qwen", "qwen", "embed"]
    assert [entry["litellm_params"]["api_base"] for entry in found] == [
        "http://10.0.0.1:8000/v1",
        "http://[fd77::1]:8000/v1",
        "http://gpu-1:8001/v1",
    ]
    assert len({entry["model_info"]["id"] for entry in found}) == 3
    assert [entry["model_info"]["mode"] for entry in found] == ["chat", "chat", "embedding"]


def test_replica_is_put_aside_for_its_own_failures_alone() -> None:
    """In router_settings it would hold for a model's only replica and for what a client does, too."""
    found = config(litellm_allowed_fails=5)
    assert "allowed_fails" not in found["router_settings"]
    for entry in found["model_list"]:
        assert entry["model_info"]["allowed_fails"] == 5
        policy = entry["model_info"]["allowed_fails_policy"]
        assert set(policy) == {f"{name}ErrorAllowedFails" for name in _litellm_config.CLIENTS_ERRORS}
        assert min(policy.values()) > 10**6


def test_user_of_a_request_is_not_kept() -> None:
    assert config()["litellm_settings"]["disable_end_user_cost_tracking"] is True


def test_rows_of_single_requests_do_not_grow_without_end() -> None:
    """Nor wait for a day without a change: LiteLLM would look for old ones a day after its start."""
    found = config(litellm_request_log_days=30)["general_settings"]
    assert found["maximum_spend_logs_retention_period"] == "30d"
    assert found["maximum_spend_logs_retention_interval"] == "1h"


def test_clients_do_not_make_tags() -> None:
    """Of each LiteLLM would keep sums by day, without end."""
    assert config()["litellm_settings"]["disable_add_user_agent_to_request_tags"] is True
    assert config()["general_settings"]["reject_clientside_metadata_tags"] is True


def test_drained_server_gets_nothing() -> None:
    found = [entry["model_info"]["id"] for entry in config(litellm_drained=["10.0.0.1:8000"])["model_list"]]
    assert found == ["qwen@[fd77::1]:8000", "embed@gpu-1:8001"]


def test_prices_are_per_token_and_nothing_without_one() -> None:
    priced, _, free = (entry["litellm_params"] for entry in config()["model_list"])
    assert priced["input_cost_per_token"] == pytest.approx(0.15e-6)
    assert priced["output_cost_per_token"] == pytest.approx(0.6e-6)
    assert (free["input_cost_per_token"], free["output_cost_per_token"]) == (0.0, 0.0)


def test_no_secret_is_in_the_configuration() -> None:
    every = settings(
        litellm_database_url=REMOTE,
        litellm_redis_url="rediss://:redis-secret@redis:6379",
        redis=True,
        litellm_alert_slack_url="https://hooks.example.org/slack-secret",
        litellm_alert_webhook_url="https://hooks.example.org/webhook-secret",
    )
    text = str(_litellm_config.config(every))
    for secret in (SECRET, "m" * 20, "s" * 20, "pass", "redis-secret", "slack-secret", "webhook-secret"):
        assert secret not in text


def test_alerts_only_where_somebody_is_to_be_told() -> None:
    assert "alerting" not in config()["general_settings"]
    found = config(alerting=["slack"])["general_settings"]
    assert found["alerting"] == ["slack"]
    assert found["alert_types"] == ["budget_alerts"]


def test_redis_only_where_there_is_one() -> None:
    without, found = config()["general_settings"], config(redis=True)["general_settings"]
    assert not {"coordination_redis", "use_redis_transaction_buffer"} & set(without)
    assert found["coordination_redis"] == {"url": "os.environ/LITELLM_REDIS_URL"}
    assert found["use_redis_transaction_buffer"] is True


def test_fallbacks_are_as_litellm_has_them() -> None:
    assert config(litellm_fallbacks={"qwen": ["embed"]})["router_settings"]["fallbacks"] == [{"qwen": ["embed"]}]


def test_own_settings_go_over_those_of_the_role() -> None:
    own = {"router_settings": {"num_retries": 0}, "litellm_settings": {"callbacks": []}, "more": 1}
    found = config(litellm_config=own)
    assert found["router_settings"]["num_retries"] == 0
    assert found["router_settings"]["cooldown_time"] == 30
    assert found["litellm_settings"]["callbacks"] == []
    assert found["more"] == 1


# --- versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["1.84.0", "1.86.9", "1.100.4", "1.101.3", "1.102.2", "1.103.1", "1.104.0", "1.109.1"]
)
def test_versions_that_may_be_installed(version: str) -> None:
    assert _litellm_config.version_problems(version, []) == []


@pytest.mark.parametrize(
    ("version", "ids"),
    [
        ("1.83.14", ["CVE-2026-49468"]),
        ("1.83.6", ["CVE-2026-42208", "CVE-2026-42271"]),
        ("1.87.0", ["CVE-2026-114612"]),
        ("1.91.0", ["CVE-2026-114612"]),
        ("1.100.3", ["CVE-2026-114612"]),
        ("1.101.2", ["CVE-2026-114612"]),
        ("1.102.1", ["CVE-2026-114612"]),
        ("1.103.0", ["CVE-2026-114612"]),
    ],
)
def test_versions_with_known_vulnerabilities(version: str, ids: list[str]) -> None:
    (problem,) = _litellm_config.version_problems(version, [])
    assert all(each in problem for each in (version, *ids, "litellm_accept_known_vulnerabilities"))
    every = [each.id for each in _litellm_config.VULNERABILITIES if each.affects(Version(version))]
    assert set(ids) <= set(every)
    assert _litellm_config.version_problems(version, every) == []
    assert _litellm_config.version_problems(version, every[1:]) != []


@pytest.mark.parametrize("version", ["1.82.7", "1.82.8", "v1.82.8", "1.82.8.0"])
def test_stolen_releases_are_never_accepted(version: str) -> None:
    every = [each.id for each in _litellm_config.VULNERABILITIES]
    (problem,) = _litellm_config.version_problems(version, every)
    assert "steals" in problem


def test_what_is_no_version() -> None:
    assert "latest" in _litellm_config.version_problems("latest", [])[0]


def test_another_version_needs_its_packages() -> None:
    (problem,) = problems(litellm_version="1.109.1", requirements="")
    assert "litellm_requirements_file names no file" in problem


@pytest.mark.parametrize(
    ("requirements", "problem"),
    [
        ("litellm==1.106.2", ""),
        ("fastapi==0.1\nlitellm[proxy]==1.106.2 ; python_version > '3' \\\n    --hash=sha256:00", ""),
        ("litellm[proxy] == 1.106.2\\\n    --hash=sha256:00", ""),
        ("litellm==1.106.1 \\\n", "litellm_requirements_file pins 1.106.1: make them the same."),
        ("litellm==1.106.20", "pins 1.106.20"),
        ("litellm-enterprise==1.106.2", "litellm_requirements_file pins no litellm: give"),
        ("    # via litellm==1.106.2", "pins no litellm"),
    ],
)
def test_requirements_are_those_of_the_version(requirements: str, problem: str) -> None:
    found = problems(requirements=requirements)
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_requirements_of_the_role_are_those_of_its_version() -> None:
    version = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["litellm_version"]
    assert problems(requirements=(ROLE / f"files/requirements/{version}.txt").read_text()) == []


# --- the database -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [SOCKET, REMOTE, "postgres://a:b@127.0.0.1/c", f"{REMOTE}&sslcert=/etc/ssl/ca.pem"])
def test_databases_that_will_do(url: str) -> None:
    assert list(_litellm_config.database_problems(url)) == []


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("sqlite:///var/lib/litellm.db", "sqlite"),
        ("mysql://a:b@db/c", "mysql"),
        ("", "postgresql://"),
        ("postgresql://a:hunter2@db.example.org/c", "sslmode"),
        ("postgresql://a:hunter2@db.example.org/c?sslmode=prefer", "db.example.org without TLS"),
        ("postgresql://a:hunter2@db.example.org/c?sslmode=require", "is not checked: add sslaccept=strict"),
        (
            "postgresql://a:hunter2@db.example.org/c?sslmode=require&sslaccept=accept_invalid_certs",
            "is not checked: add sslaccept=strict",
        ),
        ("postgresql://a:hunter2@db.example.org/c?sslaccept=strict&sslmode=require&sslmode=disable", "without TLS"),
        (
            "postgresql://a:hunter2@db.example.org/c?sslmode=verify-ca",
            "has sslmode=verify-ca, which Prisma takes for prefer",
        ),
        (
            "postgresql://a:hunter2@db.example.org/c?sslmode=verify-full&sslrootcert=/ca.pem",
            "has sslmode=verify-full, which Prisma takes for prefer: write sslmode=require&sslaccept=strict&sslcert=",
        ),
        (
            "postgresql://a:hunter2@db.example.org/c?sslmode=require&sslaccept=strict&sslrootcert=/ca.pem",
            "has sslrootcert, which Prisma discards",
        ),
        ("postgresql://a:hunt@er2@db/c?sslmode=require", "percent-encoded"),
        ("postgresql://a:hunt er2@db/c?sslmode=require", "percent-encoded"),
        ("postgresql://a:hunt#er2@db/c?sslmode=require", "litellm_database_url"),
        ("postgresql://a:hunt/er2@db/c?sslmode=require", "litellm_database_url"),
        ("postgresql://db.example.org/c?sslmode=require", "lacks"),
        ("postgresql://a@db.example.org?sslmode=require", "lacks"),
        ("postgresql://a@[fd77::1/c", "no URL"),
        ("postgresql://a@db:99999/c", "no URL"),
    ],
)
def test_databases_that_will_not(url: str, word: str) -> None:
    (problem,) = _litellm_config.database_problems(url)
    assert problem.startswith("litellm_database_url ")
    assert word in problem
    assert "hunt" not in problem


def test_the_pool_is_as_large_as_asked() -> None:
    assert _litellm_config.database_url(SOCKET, 7) == f"{SOCKET}&connection_limit=7"
    assert _litellm_config.database_url("postgresql://a@b/c", 7) == "postgresql://a@b/c?connection_limit=7"
    assert _litellm_config.database_url(f"{SOCKET}&connection_limit=3", 7) == f"{SOCKET}&connection_limit=3"


def test_the_place_of_a_database_has_no_password() -> None:
    assert _litellm_config.database_place(SOCKET) == "litellm@/run/postgresql:5432/litellm"
    assert _litellm_config.database_place(REMOTE) == "litellm@db.example.org:5432/litellm"


def test_what_is_backed_up_before_a_migration_is_the_database_of_the_role_postgresql(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    backed_up = {  # "": what the role has by default
        "": True,
        f"{SOCKET}&connection_limit=3": True,
        REMOTE: False,
        "postgresql://app:secret@localhost/wiki": False,
        "postgresql://litellm@localhost/litellm?host=/srv/postgresql": False,
    }
    tasks = [
        {
            "ansible.builtin.assert": {"that": f"litellm_backup_before_migration | bool == {backs_up}"},
            "vars": {"litellm_database_url": url} if url else {},
        }
        for url, backs_up in backed_up.items()
    ]
    files = [str(ROLE / name / "main.yml") for name in ("defaults", "vars")]
    done = run_playbook([{"hosts": "all", "gather_facts": False, "vars_files": files, "tasks": tasks}])
    assert done.returncode == 0, done.stdout


def test_connections_of_two_instances_fit_into_the_database() -> None:
    """8 workers with 10 each, twice, and 10 more; of another database only its owner knows."""
    assert problems(postgresql_max_connections=170) == []
    assert problems(postgresql_max_connections=0) == []
    (problem,) = problems(postgresql_max_connections=169)
    assert problem.startswith("litellm_database_connections is 10: two instances with 8 workers each take 160, and 10 ")
    assert "postgresql_max_connections is 169: raise that to 170, or lower litellm_workers or " in problem


@pytest.mark.parametrize(
    ("inventory", "url", "most"),
    [
        (
            {},
            SOCKET,
            yaml.safe_load((ROLES / "postgresql/defaults/main.yml").read_text())["postgresql_max_connections"],
        ),
        ({"postgresql_max_connections": "30"}, SOCKET, 30),
        ({"postgresql_max_connections": 30}, REMOTE, 0),
        ({"postgresql_max_connections": 30, "litellm_database_url": SOCKET}, SOCKET, 0),
    ],
)
def test_connections_count_where_the_database_is_the_role_postgresqls(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    inventory: dict[str, Any],
    url: str,
    most: int,
) -> None:
    (tmp_path / "inventory/host_vars").mkdir(parents=True)
    (tmp_path / "inventory/host_vars/host1.yml").write_text(json.dumps(inventory))
    task = {
        "ansible.builtin.assert": {"that": f"__litellm_other_settings.postgresql_max_connections == {most}"},
        "vars": {"litellm_database_url": url},
    }
    files = [str(ROLE / name / "main.yml") for name in ("defaults", "vars")]
    done = run_playbook([{"hosts": "all", "gather_facts": False, "vars_files": files, "tasks": [task]}])
    assert done.returncode == 0, done.stdout


def test_which_database_is_local() -> None:
    assert _litellm_config.is_local(SOCKET)
    assert _litellm_config.is_local("postgresql://a:b@[::1]:5432/c")
    assert not _litellm_config.is_local(REMOTE)


# --- the other variables ------------------------------------------------------------------------------------


def test_nothing_is_wrong() -> None:
    assert problems() == []
    assert problems(gateways=2, litellm_database_url=REMOTE, litellm_redis_url="rediss://:x@redis:6379") == []
    assert problems(litellm_prices={"embed": {"input": 0.02}}) == []


def test_prices_may_be_text() -> None:
    text = {"qwen": {"input": "0.15", "output": "0.6"}}
    assert problems(litellm_prices=text) == []
    assert config(litellm_prices=text) == config(litellm_prices={"qwen": {"input": 0.15, "output": 0.6}})
    assert problems(litellm_redis_url="unix:///run/redis.sock", litellm_fallbacks={"qwen": ["embed"]}) == []
    for url in ("redis://localhost", "redis://[::1]:6380/1", "rediss://me:p%40ss@redis:6379/0?ssl_cert_reqs=none"):
        assert problems(litellm_redis_url=url) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"litellm_models": [], "litellm_prices": {}}, ["litellm_models is empty"]),
        ({"litellm_models": [{"model": "a b", "servers": ["h:1"]}], "litellm_prices": {}}, ["'a b'"]),
        ({"litellm_models": [{"model": "a", "servers": []}], "litellm_prices": {}}, ["no servers"]),
        ({"litellm_models": [{"model": "a", "servers": ["http://h:1"]}], "litellm_prices": {}}, ["http://h:1"]),
        ({"litellm_models": [{"model": "a", "servers": ["h:70000"]}], "litellm_prices": {}}, ["h:70000"]),
        ({"litellm_models": [{"model": "a", "servers": ["h:1"]}] * 2, "litellm_prices": {}}, ["twice"]),
        ({"litellm_prices": {"qwen": {"input": -1, "output": 1}}}, ["input", "-1"]),
        ({"litellm_prices": {"qwen": {"input": True, "output": 1}}}, ["True"]),
        ({"litellm_prices": {"qwen": {"input": 1, "output": "cheap"}}}, ["'cheap'", "give 0 or more"]),
        ({"litellm_prices": {"qwen": {"input": 1, "output": None}}}, ["nothing as the output"]),
        ({"litellm_prices": {"qwen": {"input": 1, "output": "nan"}}}, ["'nan'"]),
        ({"litellm_prices": {"qwen": {"input": 1, "output": 1, "cached": 1}}}, ["cached"]),
        ({"litellm_prices": {"qwen": {"input": 1}}}, ["no output for 'qwen'", "free"]),
        ({"litellm_prices": {"qwen": {"output": 1}}}, ["no input for 'qwen'", "free"]),
        ({"litellm_prices": {"embed": {"output": 1}}}, ["no input for 'embed'", "free"]),
        ({"litellm_prices": {"qwen": 1}}, ["1 for 'qwen'"]),
        ({"litellm_drained": ["10.0.0.9:8000"]}, ["litellm_drained has '10.0.0.9:8000'", "10.0.0.1:8000"]),
        ({"litellm_prices": {"other": {"input": 1, "output": 1}}}, ["'other', which no engine serves"]),
        ({"litellm_fallbacks": {"other": ["qwen"]}}, ["'other'"]),
        ({"litellm_fallbacks": {"qwen": ["other"]}}, ["'other'"]),
        ({"litellm_fallbacks": {"qwen": "embed"}}, ["list"]),
        ({"litellm_fallbacks": {"qwen": ["qwen"]}}, ["its own fallback"]),
        ({"litellm_ports": [4000]}, ["litellm_ports", "4000"]),
        ({"litellm_ports": [4000, 4000]}, ["litellm_ports"]),
        ({"litellm_ports": [80, 4001]}, ["80"]),
        ({"litellm_workers": -1}, ["litellm_workers", "-1"]),
        ({"litellm_request_timeout": 0}, ["litellm_request_timeout"]),
        ({"litellm_request_log_days": 0}, ["litellm_request_log_days is 0: use 1 to 3650"]),
        ({"litellm_request_log_days": 3651}, ["litellm_request_log_days is 3651"]),
        ({"litellm_alert_slack_url": "hooks.example.org"}, ["litellm_alert_slack_url"]),
        ({"litellm_environment": {"A-B": 1}}, ["'A-B'"]),
        ({"litellm_environment": {"DATABASE_URL": "x"}}, ["DATABASE_URL"]),
        ({"litellm_environment": {"A": "b\nc"}}, ["line break"]),
        ({"litellm_prisma_engines_dir": "engines"}, ["'engines'"]),
        ({"litellm_prisma_engines_dir": "/a b"}, ["/a b"]),
    ],
)
def test_something_is_wrong(changes: dict[str, Any], words: list[str]) -> None:
    (problem,) = problems(**changes)
    assert all(word in problem for word in words)
    assert problem.endswith(".")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("redis", "no URL of a Redis"),
        ("hunter2:6379", "no URL of a Redis"),
        ("http://:hunter2@redis:6379", "no URL of a Redis"),
        ("rediss://:hunter2@redis:99999", "no URL: percent-encode"),
        ("rediss://:hunter2@redis:port", "no URL: percent-encode"),
        ("rediss://:hunt#er2@redis:6379", "no URL: percent-encode"),
        ("rediss://:123#hunter2@redis:6379", "percent-encoded"),
        ("rediss://:hunt@er2@redis:6379", "percent-encoded"),
        ("rediss://:hunt er2@redis:6379", "percent-encoded"),
        ("rediss://me:123/hunter2@redis:6379", "percent-encoded"),
        ("rediss://me:123?hunter2@redis:6379", "percent-encoded"),
        ("rediss://:hunter2@:6379", "lacks a host"),
        ("rediss://:hunter2@redis:0", "port 0"),
        ("rediss://:hunter2@redis:6379/first", "no number of a database"),
        ("redis://:hunter2@redis.example.org:6379", "without TLS: give rediss://"),
        ("unix://run/redis.sock", "the path of a socket"),
        ("unix:///", "the path of a socket"),
    ],
)
def test_redis_that_will_not_do(url: str, word: str) -> None:
    (problem,) = problems(litellm_redis_url=url)
    assert problem.startswith("litellm_redis_url ")
    assert word in problem
    assert "hunt" not in problem
    assert problem.endswith(".")


@pytest.mark.parametrize("name", ["litellm_master_key", "litellm_salt_key", "litellm_backend_key"])
@pytest.mark.parametrize("value", ["", "short-1", "sk-with spaces in it, and long enough"])
def test_bad_secrets_are_not_shown(name: str, value: str) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name} ")
    assert not value or value not in problem


def test_the_salt_key_is_not_the_master_key() -> None:
    (problem,) = problems(litellm_salt_key="sk-" + "m" * 20)
    assert problem.startswith("litellm_salt_key is litellm_master_key")


def test_several_gateways_share_what_they_count_with() -> None:
    found = problems(gateways=2)
    assert len(found) == 2
    assert "litellm_database_url" in found[0]
    assert "litellm_redis_url" in found[1]
