#!/usr/bin/env bash
# One test host, one run of site.yml, one streamed answer. Called by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/demo/common.sh

start=$SECONDS
$sudo tests/hosts/hosts.py up demo1=bookworm:10.77.1.11 --set demo --subnet 10.77.1.0/24 --subnet6 fd77:1::/64 \
    --bind "$PWD/tests/cpu:/opt/llmfleet-demo"
python tests/tiny_model/make_tiny_model.py build/demo/tiny
ansible-playbook -i inventories/demo site.yml

key=inventories/demo/.secrets/api_key ca=inventories/demo/.secrets/ca.crt
say "The answer, as it streams (the model is random, and so is what it says):"
curl --silent --show-error --no-buffer --cacert $ca --resolve llm.demo.test:443:10.77.1.11 \
    --header @<(echo "Authorization: Bearer $(cat $key)") --header "Content-Type: application/json" --data @tests/demo/question.json \
    https://llm.demo.test/v1/chat/completions | python tests/demo/show_stream.py

say "Up in $((SECONDS - start)) s. Try it yourself, from this folder:"
cat <<EOF
  curl --cacert $ca --resolve llm.demo.test:443:10.77.1.11 \\
      --header @<(echo "Authorization: Bearer \$(cat $key)") \\
      --header "Content-Type: application/json" --data '{"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}' \\
      https://llm.demo.test/v1/chat/completions

  # The OpenAI client, once "10.77.1.11 llm.demo.test" is in /etc/hosts (pip install openai):
  SSL_CERT_FILE=$ca OPENAI_BASE_URL=https://llm.demo.test/v1 OPENAI_API_KEY=\$(cat $key) python3 -c '
from openai import OpenAI
for chunk in OpenAI().chat.completions.create(model="tiny", stream=True, max_tokens=32,
                                              messages=[{"role": "user", "content": "Hello"}]):
    print(chunk.choices[0].delta.content or "", end="", flush=True)'

  .venv/bin/ansible-playbook -i inventories/demo site.yml    # again: it changes nothing
  $sudo tests/hosts/hosts.py ssh --set demo demo1  # look around on the host
  make clean                                       # take everything away
EOF
