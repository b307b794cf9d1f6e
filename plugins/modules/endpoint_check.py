#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: endpoint_check
author: llmfleet developers
version_added: 1.0.0
short_description: Check an OpenAI-compatible HTTPS endpoint as a client sees it
description:
  - Connects to the public name of an endpoint and checks its certificate, lists its models, streams one
    completion from each model and times it, and makes sure that a missing key, a wrong key and the paths that
    clients have no business with are refused.
  - Runs where the task runs, so delegate it to C(localhost), or to a host from which clients come.
  - Sends GET requests and chat completions, and nothing else. A completion costs at most O(max_tokens) tokens
    of the budget of O(api_key); one that arrives in a burst is asked for up to five times.
  - A reply is I(streamed) when its chunks arrive one by one, and came in a I(burst) when something on the way
    collected them. Chunks that leave the network less than 0.5 ms after each other are one arrival. A streamed
    reply has at least four arrivals, and at least O(spread_ratio) for each chunk. The notes say why.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  url:
    description: The endpoint as C(https://name) or C(https://name:port), without a path.
    type: str
    required: true
  api_key:
    description: A key that may use all O(models).
    type: str
    required: true
  models:
    description: Names of the models that must be listed and must stream a chat completion.
    type: list
    elements: str
    default: []
  embedding_models:
    description: Names of the models that must be listed and must answer with an embedding.
    type: list
    elements: str
    default: []
  ca_path:
    description:
      - File with the authorities to trust, in PEM format.
      - By default those that the system trusts. The variable E(REQUESTS_CA_BUNDLE) has no influence.
    type: path
  address:
    description:
      - IPv4 or IPv6 address, or another name, to connect to in place of what the name in O(url) resolves to.
      - The certificate must be valid for the name all the same, and the server is asked for the name. With it
        a gateway is checked before its DNS record is changed, or each of several gateways that share one
        name.
    type: str
  max_tokens:
    description: Length of the completions. Under 16 there are too few chunks to tell a stream from a burst.
    type: int
    default: 48
  timeout:
    description: Seconds that connecting, waiting for data and a whole completion may each take.
    type: float
    default: 60
  closed_paths:
    description:
      - Paths that must be refused although the key is good. Each is asked for by GET, which changes nothing.
      - Refused is a status of 401, 403, 404 or another 4xx, or a connection closed without an answer
        (C(return 444) of nginx).
      - 400, 405, 415 and 422 are no refusals, because they come from behind a path that is open to another
        method or another body, such as POST C(/invocations) of vLLM. Neither is 429, which says nothing about
        the path.
    type: list
    elements: str
    default: [/metrics, /health, /invocations, /docs, /v1/load_lora_adapter]
  spread_ratio:
    description: The least number of arrivals for each chunk of a streamed reply. V(0) accepts every reply.
    type: float
    default: 0.1
  fail_on_error:
    description: Whether a failed check is an error of the task. If not, look at RV(checks).
    type: bool
    default: true
requirements:
  - requests >= 2.32
  - urllib3 >= 2
notes:
  - Proxy variables and C(~/.netrc) are ignored, the connection is always direct.
  - Why arrivals for each chunk. They were measured with vLLM (400 tokens/s, a chunk is 220 bytes) behind nginx on two
    cores. With C(proxy_buffering off) each chunk arrives by itself, 2.4 to 6 ms after the one before, so 48 chunks
    are 45 to 48 arrivals. With C(proxy_buffering on) nginx sends blocks of 8 to 16 KiB, so 48 chunks are 1 to 3
    arrivals and 125 chunks are 3. That is 0.9 or more for a stream and 0.07 or less for a burst; V(0.1) and the
    minimum of four lie between them, nearer to the burst, because a busy machine makes a stream look like a burst
    and hardly ever the other way round.
  - A burst is confirmed for the same reason. With four more processes than cores nginx and the controller still saw
    6 to 28 arrivals in seven of ten streamed replies, but 1 in the others, so the best of five replies counts.
    Replies from the proxy that buffers had 1 to 3 each time.
  - Why not the time between the first and the last chunk alone. A buffering proxy that sends a reply as three blocks
    spreads them over most of it, and a cold engine that takes 2 seconds to the first token puts all chunks of a
    perfect stream into the last 0.1 seconds.
  - A reply of fewer than 16 chunks is not judged, because its burst has nearly as many arrivals as its stream;
    RV(checks) says so, and it is asked for again.
  - A model that makes more than 2000 chunks/s looks like a burst. Set O(spread_ratio=0) for such a model.
"""

EXAMPLES = r"""
- name: Check the endpoint as clients see it
  llmfleet.serving.endpoint_check:
    url: https://llm.example.org
    api_key: "{{ lookup('llmfleet.serving.secret', 'smoke_key') }}"
    models: [qwen, llama]
  delegate_to: localhost
  run_once: true
  register: endpoint

- name: Show what was seen
  ansible.builtin.debug:
    var: endpoint.summary
  run_once: true

- name: Check each gateway behind the one name, with a certificate of our own authority
  llmfleet.serving.endpoint_check:
    url: https://llm.example.org
    address: "{{ ansible_host }}"
    ca_path: /etc/ssl/our-ca.pem
    api_key: "{{ lookup('llmfleet.serving.secret', 'smoke_key') }}"
    models: [qwen]
  delegate_to: localhost

- name: Wait until the new gateway serves
  llmfleet.serving.endpoint_check:
    url: https://llm.example.org
    api_key: "{{ lookup('llmfleet.serving.secret', 'smoke_key') }}"
    models: [qwen]
    fail_on_error: false
  delegate_to: localhost
  register: endpoint
  until: endpoint.checks | rejectattr('ok') | length == 0
  retries: 10
  delay: 6
"""

RETURN = r"""
checks:
  description: Each check that was made. Without a connection there is only the first one.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description:
        - V(connection), V(models), V(completion NAME) and V(streaming NAME) or V(embedding NAME) for each
          model, V(missing key),
          V(wrong key), V(closed path PATH) for each path.
      type: str
    ok:
      description: Whether it has passed.
      type: bool
    detail:
      description: What was seen, in one sentence. For a failed check also what to do.
      type: str
  sample:
    - name: streaming qwen
      ok: true
      detail: 48 chunks in 48 arrivals
    - name: closed path /metrics
      ok: false
      detail: answered 200 to a good key; let the gateway pass only what clients need
models:
  description: What each model that answered has sent.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the model.
      type: str
    time_to_first_token_seconds:
      description: Time from sending the request to the first chunk with text.
      type: float
    chunks:
      description: Number of chunks with text.
      type: int
    tokens_per_second:
      description: Tokens of the reply by the time from the request to the last chunk.
      type: float
    text:
      description: The first 80 characters of the reply.
      type: str
  sample:
    - name: qwen
      time_to_first_token_seconds: 0.0312
      chunks: 48
      tokens_per_second: 96.4
      text: one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirt
certificate:
  description: The certificate of the endpoint. Empty if there was no connection.
  returned: always
  type: dict
  contains:
    not_after:
      description: End of its validity, in UTC.
      type: str
    issuer:
      description: Common name and organisation of its issuer.
      type: str
  sample: {not_after: "2027-02-19T11:02:45Z", issuer: "R11, Let's Encrypt"}
summary:
  description: RV(checks) as lines for the terminal.
  returned: always
  type: list
  elements: str
  sample:
    - "ok     streaming qwen: 48 chunks in 48 arrivals"
    - "FAILED closed path /metrics: answered 200 to a good key; let the gateway pass only what clients need"
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.llmfleet.serving.plugins.module_utils._endpoint import (
    REQUESTS_ERROR,
    Endpoint,
    Options,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "api_key": {"type": "str", "required": True, "no_log": True},
            "models": {"type": "list", "elements": "str", "default": []},
            "embedding_models": {"type": "list", "elements": "str", "default": []},
            "ca_path": {"type": "path"},
            "address": {"type": "str"},
            "max_tokens": {"type": "int", "default": 48},
            "timeout": {"type": "float", "default": 60},
            "closed_paths": {
                "type": "list",
                "elements": "str",
                "default": ["/metrics", "/health", "/invocations", "/docs", "/v1/load_lora_adapter"],
            },
            "spread_ratio": {"type": "float", "default": 0.1},
            "fail_on_error": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    if REQUESTS_ERROR:
        module.fail_json(msg=missing_required_lib("requests"), exception=REQUESTS_ERROR)
    fail_on_error = module.params.pop("fail_on_error")
    try:
        endpoint = Endpoint(Options(**module.params))
    except ValueError as error:
        module.fail_json(msg=str(error))
    report = endpoint.run()
    result = {"changed": False, **asdict(report), "summary": report.summary}
    if report.failed and fail_on_error:
        failed = "\n".join(f"- {check.name}: {check.detail}" for check in report.failed)
        count = f"{len(report.failed)} of {len(report.checks)}"
        module.fail_json(msg=f"{module.params['url']} failed {count} checks:\n{failed}", **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
