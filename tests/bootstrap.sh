#!/usr/bin/env bash
# Installs what `make demo` and `make test` need on a Debian or Ubuntu machine: packages, and Python's in .venv.
#     tests/bootstrap.sh REQUIREMENTS.txt
set -euo pipefail
cd "$(dirname "$0")/.."
sudo=$([ "$(id -u)" = 0 ] || echo sudo)

packages=(curl debootstrap gcc iproute2 iptables libc6-dev openssh-client python3-venv rsync systemd-container)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || { echo "Install these first, for there is no apt-get here: ${missing[*]}" >&2; exit 1; }
    echo "Installing ${missing[*]}"
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# ansible-core 2.19 wants Python 3.11; where the system's is older, uv brings one.
if [ ! -x .venv/bin/python ]; then
    if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python3 -m venv .venv
    else
        python3 -m venv build/uv
        build/uv/bin/pip install --quiet uv==0.13.8
        build/uv/bin/uv venv --seed --python 3.12 .venv
    fi
fi
echo "Installing Python packages into .venv"
.venv/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --requirement "$1"
echo "install            passed  $SECONDS s"
