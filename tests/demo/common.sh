# Sourced by the demo's scripts.
sudo=$([ "$(id -u)" = 0 ] || echo "sudo --preserve-env=LLMFLEET_HOSTS_DIR,LLMFLEET_CACHE_DIR,PIP_FIND_LINKS")
say() { printf '\n%s\n' "$*"; }
