#!/usr/bin/env bash
# Destroys the demo's host and removes what the demo and the tests of this checkout have made. Called by `make clean`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/demo/common.sh

for set in demo m-default m-fleet m-plan m-tenants m-tls; do
    $sudo tests/hosts/hosts.py destroy --set $set --of "$PWD"
done
rm -rf build inventories/demo/.secrets inventories/demo/.backups inventories/demo/.plan.html .ansible .hypothesis .pytest_cache .ruff_cache .venv
# It refuses while other hosts run.
$sudo tests/hosts/hosts.py clean-cache || say "What has been downloaded stays, for the hosts of another checkout use it."
