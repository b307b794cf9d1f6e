#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: engine_plan
author: llmfleet developers
version_added: 1.0.0
short_description: Compute which flags of vLLM start the first time and never run out of memory
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
description:
  - From a model, the GPUs of a host and what is wished for, says on which GPUs the model runs, with which flags, and
    how many tokens its KV cache will have; or refuses, with numbers and with the nearest things that fit.
  - Pure arithmetic. It needs no GPU, no network and no weights, and runs on the controller.
  - Of several O(models) each gets GPUs of its own while there are some. Then those that one GPU can carry share one.
  - What O(flags) fixes is kept and checked. Nothing that changes a model's answers, such as another KV cache dtype,
    is chosen; it is offered in a refusal.
options:
  model:
    description: The RV(llmfleet.serving.model_info#module:model) of M(llmfleet.serving.model_info).
    type: dict
  gpus:
    description: The RV(llmfleet.serving.gpu_info#module:gpus) of M(llmfleet.serving.gpu_info). Sizes are bytes.
    type: list
    elements: dict
    required: true
  engine_version:
    description: Version of vLLM, from 0.22.0 on. Versions account for memory in different ways.
    type: str
    required: true
  users:
    description:
      - Requests that must fit into the KV cache at the same time, each with O(context) tokens. It becomes
        C(max_num_seqs).
    type: int
  context:
    description:
      - Tokens of the longest request with its answer. It becomes C(max_model_len). By default as many as fit, up to
        the model's own limit.
    type: int
  flags:
    description: Flags of C(vllm serve) that are not to change, with C(-) or C(_).
    type: dict
    default: {}
  environment:
    description:
      - Environment of the engine. C(CUDA_VISIBLE_DEVICES) limits the GPUs, by index in PCI bus order or by UUID.
    type: dict
    default: {}
  variants:
    description: Other models, as O(model), that would do as well. A refusal says which of them fit.
    type: list
    elements: dict
    default: []
  models:
    description:
      - Several models for one host, instead of O(model), O(users), O(context), O(flags), O(environment) and
        O(variants).
    type: list
    elements: dict
    options:
      name:
        description: What the answer calls it.
        type: str
        required: true
      model:
        description: As O(model).
        type: dict
        required: true
      users:
        description: As O(users).
        type: int
      context:
        description: As O(context).
        type: int
      flags:
        description: As O(flags).
        type: dict
        default: {}
      environment:
        description: As O(environment).
        type: dict
        default: {}
      variants:
        description: As O(variants).
        type: list
        elements: dict
        default: []
  host:
    description: What the host has besides GPUs. What is not given is not checked.
    type: dict
    default: {}
    options:
      ram_bytes:
        description: Memory for engines, in bytes.
        type: int
      shm_bytes:
        description: Room in C(/dev/shm), in bytes.
        type: int
      disk_bytes:
        description: Room for models, in bytes.
        type: int
  previous:
    description:
      - The plans that the host runs, by name. They are returned as they are while nothing that they hang on has
        changed, so that the
        memory that happens to be free never restarts an engine.
    type: dict
    default: {}
  own_unit:
    description:
      - What processes of systemd units that begin so hold of a GPU counts as free, for they are the engines that
        are planned.
    type: str
    default: vllm@
"""

EXAMPLES = r"""
- name: Plan a model for eight users of 16384 tokens each
  llmfleet.serving.engine_plan:
    model: "{{ model.model }}"
    gpus: "{{ host.gpus }}"
    engine_version: 0.32.0
    users: 8
    context: 16384
  delegate_to: localhost
  register: answer

- name: Plan two models on one host
  llmfleet.serving.engine_plan:
    models:
      - name: chat
        model: "{{ chat.model }}"
        users: 8
        context: 16384
      - name: embed
        model: "{{ embed.model }}"
    gpus: "{{ host.gpus }}"
    engine_version: 0.32.0
  delegate_to: localhost
"""

RETURN = r"""
plan:
  description: What was decided for O(model). All sizes are bytes.
  type: dict
  returned: when O(model) is given and fits
  contains:
    gpus:
      description: Indices of the GPUs that it runs on.
      type: list
      elements: int
    flags:
      description: Flags of C(vllm serve), with C(_).
      type: dict
    environment:
      description: Environment that belongs to the flags.
      type: dict
    memory:
      description:
        - For each GPU its C(total_bytes) and what they go to, C(other_bytes) to other processes, C(context_bytes)
          to the CUDA context,
          C(weights_bytes), C(activation_bytes) to what the profile run needs, C(non_torch_bytes), C(cudagraph_bytes)
          as vLLM estimates them,
          C(unaccounted_bytes) to what vLLM allocates after its own accounting, C(kv_cache_bytes), and C(spare_bytes).
        - C(kv_cache_bytes) is what vLLM logs as available KV cache memory on a first, cold start.
      type: list
      elements: dict
    kv_cache_tokens:
      description: What vLLM logs as GPU KV cache size.
      type: int
    max_concurrency:
      description: Requests of C(max_model_len) tokens that the KV cache holds. Null for a model without one.
      type: float
    host:
      description: What it takes of the host, as C(ram_bytes), C(shm_bytes) and C(disk_bytes).
      type: dict
    reasons:
      description: Why each flag that was chosen is as it is.
      type: list
      elements: str
    warnings:
      description: What the owner should know.
      type: list
      elements: str
refusal:
  description: Why O(model) does not fit.
  type: dict
  returned: when O(model) is given and does not fit
  contains:
    reason:
      description: One sentence with numbers.
      type: str
    needs:
      description: What is needed, as C(what) and C(bytes).
      type: dict
    has:
      description: What is there, as C(what) and C(bytes).
      type: dict
    fits:
      description:
        - The nearest things that fit, each with C(change), C(users), C(context), C(gpus), C(flags), C(source),
          C(kv_cache_bytes) and C(max_concurrency).
      type: list
      elements: dict
plans:
  description: For each of O(models) its C(name), and C(plan) or C(refusal).
  type: list
  elements: dict
  returned: when O(models) is given
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import pack, support, wish
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError

WISH = {
    "users": {"type": "int"},
    "context": {"type": "int"},
    "flags": {"type": "dict", "default": {}},
    "environment": {"type": "dict", "default": {}},
    "variants": {"type": "list", "elements": "dict", "default": []},
}
SIZES = {name: {"type": "int"} for name in ("ram_bytes", "shm_bytes", "disk_bytes")}


def main():
    module = AnsibleModule(
        argument_spec={
            "model": {"type": "dict"},
            **WISH,
            "models": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "name": {"type": "str", "required": True},
                    "model": {"type": "dict", "required": True},
                    **WISH,
                },
            },
            "gpus": {"type": "list", "elements": "dict", "required": True},
            "engine_version": {"type": "str", "required": True},
            "host": {"type": "dict", "default": {}, "options": SIZES},
            "previous": {"type": "dict", "default": {}},
            "own_unit": {"type": "str", "default": "vllm@"},
        },
        mutually_exclusive=[("model", "models")],
        required_one_of=[("model", "models")],
        supports_check_mode=True,
    )
    given = module.params
    several = given["models"] is not None
    documents = given["models"] if several else [{"name": "", **{key: given[key] for key in ("model", *WISH)}}]
    try:
        plans = pack.pack(
            [wish.wish(each, f"vllm_models[{place}]") for place, each in enumerate(documents)],
            wish.gpus(given["gpus"], given["own_unit"]),
            support.version(given["engine_version"]),
            wish.Host(**given["host"]),
            given["previous"],
            no_gpus=wish.without_gpus(given["gpus"]),
        )
    except PlanError as error:
        module.fail_json(msg=str(error))
    if several:
        module.exit_json(changed=False, plans=plans)
    module.exit_json(changed=False, **{key: value for key, value in plans[0].items() if key != "name"})


if __name__ == "__main__":
    main()
