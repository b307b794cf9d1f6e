#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: vllm_ready
author: llmfleet developers
version_added: 1.0.0
short_description: Wait until vLLM instances are healthy and have answered one real request
description:
  - Waits for C(/health), then sends each instance the smallest request that makes its engine compute. A health check
    alone is not enough, because an engine can be healthy and die at its first token.
  - Ends in an error as soon as an instance fails or crashes, with the end of its journal.
  - Reads each instance's key on the host, so that none passes through Ansible.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  instances:
    description: The instances to wait for.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the model.
        type: str
        required: true
      host:
        description: Address that the instance listens on.
        type: str
        required: true
      port:
        description: Its port.
        type: int
        required: true
      kind:
        description: Whether to ask the model for a completion or an embedding.
        type: str
        choices: [completion, embedding]
        default: completion
  timeout:
    description:
      - Seconds to wait in this call. Not to be ready by then is no error, so that a task can show progress by C(until).
    type: int
    default: 30
  config_dir:
    description: Where C(<name>.env) with C(VLLM_API_KEY) lies.
    type: path
    default: /etc/vllm
"""

EXAMPLES = r"""
- name: Wait at most 15 minutes, with a sign of life every 30 seconds
  llmfleet.serving.vllm_ready:
    instances: [{name: qwen, host: 127.0.0.1, port: 8000}]
  register: ready
  until: ready is failed or ready.ready
  retries: 30
  delay: 0
"""

RETURN = r"""
ready:
  description: Whether all instances have answered.
  returned: always
  type: bool
waiting_for:
  description: For each instance that is not ready, the last line of its journal.
  returned: success
  type: dict
  sample: {qwen: "Loading safetensors checkpoint shards: 40% Completed"}
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._instances import (
    answered,
    environment_value,
    probe,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._systemd import failure, journal, show

# One token on an idle engine takes milliseconds; the first one may compile kernels.
REQUEST_TIMEOUT = 120
PAUSE = 1.0
UNREACHABLE = (OSError, http.client.HTTPException)


class NotReadyError(Exception):
    """The server does not listen yet or is not healthy yet."""


class BrokenError(Exception):
    """The server is healthy but does not compute."""


def base_url(instance: dict[str, Any]) -> str:
    host = instance["host"]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound to
    return f"http://[{host}]:{instance['port']}" if ":" in host else f"http://{host}:{instance['port']}"


def ask(instance: dict[str, Any], key: str | None) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = base_url(instance)
    try:
        opener.open(f"{url}/health", timeout=PAUSE * 5).close()
    except UNREACHABLE as error:
        raise NotReadyError from error
    request = probe(instance["name"], instance["kind"])
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with opener.open(
            urllib.request.Request(url + request.path, data=request.body, headers=headers),
            timeout=REQUEST_TIMEOUT,
        ) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        raise BrokenError(f"{request.path} answers {error.code}: {message(error.read())}") from error
    except UNREACHABLE as error:
        raise BrokenError(f"{request.path}: {error}") from error
    if not answered(instance["kind"], body):
        raise BrokenError(f"{request.path} answers without a token: {body[:200]!r}")


def message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return repr(body[:200])


def main() -> None:
    instance = {
        "name": {"type": "str", "required": True},
        "host": {"type": "str", "required": True},
        "port": {"type": "int", "required": True},
        "kind": {"type": "str", "choices": ["completion", "embedding"], "default": "completion"},
    }
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "required": True, "options": instance},
            "timeout": {"type": "int", "default": 30},
            "config_dir": {"type": "path", "default": "/etc/vllm"},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, ready=True, waiting_for={}, msg="not asked in check mode")
    pending = {item["name"]: item for item in module.params["instances"]}
    config_dir = Path(module.params["config_dir"])
    keys = {
        name: environment_value((config_dir / f"{name}.env").read_text(encoding="utf-8"), "VLLM_API_KEY")
        for name in pending
    }
    module.no_log_values.update(key for key in keys.values() if key)

    def fail(name: str, what: str) -> None:
        module.fail_json(ready=False, **failure(module.run_command, name, what))

    deadline = time.monotonic() + module.params["timeout"]
    restarts: dict[str, int] = {}
    while pending:
        for name, unit in show(module.run_command, pending).items():
            if not unit.active:
                fail(name, f"is not running ({unit.result})")
            if unit.restarting or unit.restarts > restarts.setdefault(name, unit.restarts):
                fail(name, f"has crashed and is being started again ({unit.result})")
            try:
                ask(pending[name], keys[name])
            except NotReadyError:
                continue
            except BrokenError as error:
                fail(name, f"is healthy but does not answer: {error}")
            del pending[name]
        if not pending or time.monotonic() > deadline:
            break
        time.sleep(PAUSE)
    last = {name: (journal(module.run_command, name, 1).strip()) for name in pending}
    late = "; ".join(f"{name}: {line}" for name, line in last.items())
    module.exit_json(
        changed=False,
        ready=not pending,
        waiting_for=last,
        msg=f"Not answering yet: {late}. vllm_start_timeout gives it longer." if late else "",
    )


if __name__ == "__main__":
    main()
