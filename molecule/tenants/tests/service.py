"""The service as the scenario's inventory declares it, and what is asked of it."""

from __future__ import annotations

from typing import Any

import openai
import support
import yaml
from openai import OpenAI
from testinfra.host import Host

DECLARED: dict[str, Any] = yaml.safe_load((support.INVENTORY / "hosts.yml").read_text())["all"]
GATEWAY, ENGINE = (DECLARED["hosts"][name]["ansible_host"] for name in ("gw", "eng"))
METRICS = {"tiny": f"http://{ENGINE}:8000/metrics", "second": f"http://{ENGINE}:8001/metrics"}
BATCH_SECONDS = 10  # litellm_batch_write_seconds


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


def spend(gateway: Host, alias: str) -> float:
    """By what has been written to the database."""
    program = "su postgres -c 'psql -XAtq litellm --set=alias='%s"
    sql = "SELECT spend FROM \"LiteLLM_VerificationToken\" WHERE key_alias = :'alias'"
    return float(gateway.check_output(f"echo %s | {program}", sql, alias))


def serving(gateway: Host) -> str:
    """The port of the instance that serves."""
    return next(port for port in ("4000", "4001") if gateway.run(f"systemctl is-enabled litellm@{port}").rc == 0)
