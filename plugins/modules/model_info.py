#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: model_info
author: llmfleet developers
version_added: 1.0.0
short_description: What a model needs, without downloading it
description:
  - Reads a model's C(config.json) and the headers of its safetensors files, from the Hugging Face hub or from a folder,
    and says what it is, how large it is, and what a token of it takes in the KV cache. The weights stay where they are.
  - Of a model on the hub each file is asked for once. What was read is kept in O(cache_dir), so that a run that was cut
    short goes on where it stopped, and a commit that is known needs no network. A branch or a tag is asked for with one
    request; where the hub does not answer, it stands for the commit that was last seen, and the task warns.
  - Delegate a task with O(source) to C(localhost), whose Python has the requirements if it is the one that runs
    C(ansible-playbook). The implicit C(localhost) uses that one; for one in the inventory, or where the play sets
    another, give the task C(ansible_python_interpreter={{ ansible_playbook_python }}) among its C(vars). A task with
    O(path) runs on the host that has the folder, which needs nothing but Python.
extends_documentation_fragment:
  - llmfleet.serving.attributes
attributes:
  check_mode:
    support: full
    details: Nothing is ever changed but the module's own cache.
  diff_mode:
    support: N/A
    details: Nothing is ever changed.
  idempotent:
    support: full
    details: A branch may stand for another commit later.
options:
  path:
    description: Folder with the model, as an absolute path on the host that the task runs on.
    type: path
  source:
    description: The model's id on the hub, as C(organisation/name).
    type: str
  revision:
    description:
      - Branch, tag or commit of O(source), by default V(main). A commit in full, with its 40 digits, never changes.
    type: str
  token:
    description:
      - Token for a gated or private model. By default the value of E(HF_TOKEN).
      - The token that C(hf auth login) has stored is not used.
    type: str
  endpoint:
    description:
      - Address of the hub, or of a mirror of it. By default the value of E(HF_ENDPOINT), else V(https://huggingface.co).
    type: str
  cache_dir:
    description:
      - Folder that keeps what the hub has said. It is made when it is not there, for its owner alone.
      - By default C(llmfleet/models) below E(XDG_CACHE_HOME), or below C(~/.cache).
    type: path
requirements:
  - huggingface_hub >= 2, with O(source)
notes:
  - The hub gets at most four requests at a time. After an error of its own, or when it answers that these are too many,
    it is asked up to four more times, later each time or when it says, and after 90 seconds no more.
  - E(HTTPS_PROXY), E(NO_PROXY), E(SSL_CERT_FILE) and E(HF_HUB_OFFLINE) are heeded.
  - Files that vLLM does not load are left out, such as C(original/), C(consolidated*.safetensors) beside other
    safetensors, C(*.bin) beside safetensors, and C(*.gguf). A model without any file that it loads is an error, as are
    adapters, diffusers pipelines and files that are cut short.
  - No code of the model is run, whether or not vLLM needs C(trust_remote_code) for it.
"""

EXAMPLES = r"""
- name: Look at a model on the hub
  llmfleet.serving.model_info:
    source: Qwen/Qwen3-8B
    token: "{{ vllm_hf_token }}"
  delegate_to: localhost
  run_once: true
  register: qwen
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"

- name: Look at a model in a folder of the engine host
  llmfleet.serving.model_info:
    path: /srv/models/llama
  register: llama

- name: Show how large they are
  ansible.builtin.debug:
    msg: "{{ item.source }}: {{ (item.weights_bytes / 1073741824) | round(1) }} GiB"
  loop: ["{{ qwen.model }}", "{{ llama.model }}"]
  loop_control:
    label: "{{ item.source }}"
"""

RETURN = r"""
model:
  description: The model, as M(llmfleet.serving.engine_plan) takes it. Sizes are bytes.
  returned: success
  type: dict
  contains:
    architecture:
      description: The first of the C(architectures) in C(config.json) that is known, else the first.
      type: str
      sample: Qwen3ForCausalLM
    parameters:
      description: Number of parameters, or null where the planner does not know the architecture.
      type: int
      sample: 8190735360
    weights_bytes:
      description: What the tensors take in the files. Null where neither safetensors nor the planner tell it.
      type: int
      sample: 16381470720
    dtype:
      description: The dtype of what is not quantized.
      type: str
      sample: bfloat16
    quantization:
      description: The method of quantization, or null.
      type: str
      sample: fp8
    max_position_embeddings:
      description: Tokens of the longest request, as vLLM derives them, or null.
      type: int
      sample: 40960
    kv:
      description:
        - The KV cache in bfloat16 on one GPU, or null. C(layers) of the model have one. A token takes
          C(bytes_per_token), a request C(state_bytes) however long it is. C(groups) are the layers that are alike.
      type: dict
      sample:
        layers: 36
        bytes_per_token: 147456
        state_bytes: 0
        groups:
          - {kind: full, layers: 36, kv_heads: 8, head_dim: 128, window: null, bytes_per_token: 4096}
    source:
      description: O(source) or O(path).
      type: str
      sample: Qwen/Qwen3-8B
    revision:
      description: The commit that O(revision) stands for. Null for a folder.
      type: str
      sample: b968826d9c46dd6066d109eabc6255188de91218
    config:
      description: C(config.json), with C(quantization_config) from C(hf_quant_config.json) where it has none itself.
      type: dict
    tensors:
      description:
        - The tensors of the safetensors files. Numbers in names are C(*), and C(count) says how many are alike. Null
          where the weights have another format.
      type: list
      elements: dict
      sample:
        - {name: model.layers.*.self_attn.q_proj.weight, dtype: BF16, shape: [4096, 4096], count: 36}
    files:
      description: The files that vLLM may need, with their sizes.
      type: list
      elements: dict
      sample:
        - {name: model-00001-of-00005.safetensors, bytes: 3996250744}
problem:
  description: Why the planner does not know the architecture, or null. It is up to the caller whether that matters.
  returned: success
  type: str
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib
from ansible_collections.llmfleet.serving.plugins.module_utils._checkpoint import Folder, ModelError
from ansible_collections.llmfleet.serving.plugins.module_utils._model_info import look


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path"},
            "source": {"type": "str"},
            "revision": {"type": "str"},
            "token": {"type": "str", "no_log": True, "fallback": (env_fallback, ["HF_TOKEN"])},
            "endpoint": {"type": "str", "fallback": (env_fallback, ["HF_ENDPOINT"])},
            "cache_dir": {"type": "path"},
        },
        mutually_exclusive=[("path", "source"), ("path", "revision")],
        required_one_of=[("path", "source")],
        supports_check_mode=True,
    )
    try:
        if module.params["path"] is not None:
            model, problem = look(Folder(module.params["path"]), module.params["path"], None)
        else:
            model, problem = from_hub(module)
    except ModelError as error:
        module.fail_json(msg=f"{error}.")
    module.exit_json(changed=False, model=model, problem=problem)


def from_hub(module):
    # A host that has a folder needs none of it.
    from ansible_collections.llmfleet.serving.plugins.module_utils import _hub  # noqa: PLC0415

    if _hub.HUB_ERROR:
        module.fail_json(msg=missing_required_lib("huggingface_hub"), exception=_hub.HUB_ERROR)
    given = module.params
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hub = _hub.Hub(
        _hub.Options(
            source=given["source"],
            revision=given["revision"] or "main",
            cache_dir=Path(given["cache_dir"] or os.path.join(caches, "llmfleet", "models")),
            endpoint=given["endpoint"] or _hub.HUB,
            token=(given["token"] or "").strip() or None,
        )
    )
    answer = look(hub, given["source"], hub.commit)
    hub.remember()
    for warning in hub.warnings:
        module.warn(warning)
    return answer


if __name__ == "__main__":
    main()
