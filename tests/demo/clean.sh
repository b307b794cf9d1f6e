#!/usr/bin/env bash
# Destroys the demo's host and removes what the demo and the tests have made. Called by `make clean`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/demo/common.sh

for set in demo m-default m-fleet; do
    $sudo tests/hosts/hosts.py destroy --set $set
done
$sudo tests/hosts/hosts.py clean-cache
rm -rf build inventories/demo/.secrets .ansible .hypothesis .pytest_cache .ruff_cache .venv
