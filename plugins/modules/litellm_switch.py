#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: litellm_switch
author: llmfleet developers
version_added: 1.0.0
short_description: Have an instance of LiteLLM serve, once it has answered
description:
  - Starts C(litellm@<port>.service), waits until it is ready and has answered one real request, and enables it in place
    of the others.
  - The others run on. Whoever sends them requests is to send them to this one first.
  - Where it does not get ready or cannot answer, it is stopped, and what served before is as it was.
extends_documentation_fragment:
  - llmfleet.serving.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: partial
    details: With O(restart) the instance is started anew each time.
options:
  port:
    description: The port of the instance that is to serve.
    type: int
    required: true
  others:
    description: The ports of the instances that are not to be started with the host any more.
    type: list
    elements: int
    default: []
  restart:
    description: Stop the instance first if it runs, for its files have changed. what it does comes to its end before.
    type: bool
    default: false
  models:
    description: Models that complete text. One of these or of O(embedding_models) has to answer, if there are any.
    type: list
    elements: str
    default: []
  embedding_models:
    description: Models that make embeddings.
    type: list
    elements: str
    default: []
  master_key:
    description: LiteLLM's master key, which the request is made with.
    type: str
    required: true
  timeout:
    description: Seconds that the instance has to get ready.
    type: int
    default: 300
"""

EXAMPLES = r"""
- name: Have the new instance serve
  llmfleet.serving.litellm_switch:
    port: 4001
    others: [4000]
    restart: true
    models: [qwen]
    master_key: "{{ litellm_master_key }}"
"""

RETURN = r"""
seconds:
  description: How long it took until the instance had answered.
  returned: when not in check mode
  type: float
answered:
  description: The model that answered.
  returned: when not in check mode
  type: str
journal:
  description: The last lines of the instance's journal that say what is wrong.
  returned: failure
  type: list
  elements: str
"""

import http.client
import time
import urllib.error
import urllib.request
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._instances import answered, probe
from ansible_collections.llmfleet.serving.plugins.module_utils._litellm_host import (
    Unit,
    last_words,
    parse_show,
    readiness,
    refusal,
    show,
    unit_name,
)

PAUSE = 0.5
ANSWER_SECONDS = 120
LINES = "200"
UNREACHABLE = (OSError, http.client.HTTPException)


class NotServingError(Exception):
    """One sentence on why the instance cannot serve."""


def ask(url: str, body: bytes | None = None, key: str = "", timeout: float = 10) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data=body, headers=headers), timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Instance:
    def __init__(self, module: AnsibleModule, port: int):
        self.module, self.port = module, port
        self.url = f"http://127.0.0.1:{port}"
        self.restarts = 0

    def systemctl(self, *arguments: str) -> None:
        self.module.run_command(["systemctl", *arguments], check_rc=True)

    def units(self, *ports: int) -> dict[int, Unit]:
        return parse_show(self.module.run_command(show(ports), check_rc=True)[1])

    def unit(self) -> Unit:
        return self.units(self.port)[self.port]

    def start(self, restart: bool) -> None:
        unit = self.unit()
        if restart or unit.state in ("failed", "deactivating"):
            self.systemctl("stop", unit_name(self.port))
            self.module.run_command(["systemctl", "reset-failed", unit_name(self.port)])
        else:
            self.restarts = unit.restarts
        code, _, error = self.module.run_command(["systemctl", "start", unit_name(self.port)])
        if code:
            raise NotServingError(f"systemd could not start it ({' '.join(error.split())})")

    def wait(self, timeout: int) -> None:
        deadline, why = time.monotonic() + timeout, "it does not answer"
        while True:
            unit = self.unit()
            if unit.state != "active" or unit.restarts > self.restarts:
                raise NotServingError(f"it has ended ({unit.result})")
            try:
                why = readiness(*ask(f"{self.url}/health/readiness"))
            except UNREACHABLE:
                why = "it does not answer"
            if not why:
                return
            if time.monotonic() > deadline:
                raise NotServingError(f"after {timeout} s {why}; litellm_start_timeout gives it longer")
            time.sleep(PAUSE)

    def answer(self, models: list[tuple[str, str]], key: str) -> str:
        """The first model that answers. One whose engines are away must not keep all others from being served."""
        refusals = []
        for model, kind in models:
            request = probe(model, kind)
            try:
                status, body = ask(self.url + request.path, request.body, key, ANSWER_SECONDS)
            except UNREACHABLE as error:
                refusals.append(f"{model}: {error}")
                continue
            if status == 200 and answered(kind, body):
                return model
            refusals.append(f"{model}: {refusal(status, body)}")
        if refusals:
            raise NotServingError(f"it is ready, but no model answers: {'; '.join(refusals)}")
        return ""

    def give_up(self, why: str, stop: bool, others: list[int]) -> NoReturn:
        log = self.module.run_command(
            ["journalctl", "--no-pager", "--output=cat", "--lines", LINES, "--unit", unit_name(self.port)]
        )[1]
        if stop:
            self.module.run_command(["systemctl", "stop", unit_name(self.port)])
            self.module.run_command(["systemctl", "reset-failed", unit_name(self.port)])
        words = last_words(log)
        end = "It was stopped. " if stop else ""
        if others and any(unit.state == "active" for unit in self.units(*others).values()):
            end += "What served before serves on. "
        self.module.fail_json(
            msg=f"{unit_name(self.port)} cannot serve: {why}. {end}See: journalctl -u {unit_name(self.port)}",
            journal=words,
        )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "others": {"type": "list", "elements": "int", "default": []},
            "restart": {"type": "bool", "default": False},
            "models": {"type": "list", "elements": "str", "default": []},
            "embedding_models": {"type": "list", "elements": "str", "default": []},
            "master_key": {"type": "str", "required": True, "no_log": True},
            "timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=True)
    asked = module.params
    models = [(name, "completion") for name in asked["models"]]
    models += [(name, "embedding") for name in asked["embedding_models"]]
    instance, began = Instance(module, asked["port"]), time.monotonic()
    try:
        instance.start(asked["restart"])
        instance.wait(asked["timeout"])
        by = instance.answer(models, asked["master_key"])
    except NotServingError as error:
        instance.give_up(str(error), stop=asked["restart"], others=asked["others"])
    instance.systemctl("enable", unit_name(asked["port"]))
    if asked["others"]:
        instance.systemctl("disable", *map(unit_name, asked["others"]))
    module.exit_json(changed=True, seconds=round(time.monotonic() - began, 1), answered=by)


if __name__ == "__main__":
    main()
