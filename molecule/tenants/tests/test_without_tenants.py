"""A gateway whose tenants are gone, and then everything else. Last of all tests, for nothing is left after it."""

from __future__ import annotations

import pytest
import support
from openai import OpenAI
from service import ask, key
from testinfra.host import Host

pytestmark = pytest.mark.long

FILES = (
    "/etc/litellm /opt/litellm /opt/uv /run/litellm /run/litellm-redis /var/lib/litellm-redis /var/cache/litellm "
    "/etc/llmfleet"
)
LEFT = (
    f"ls -d {FILES} 2>/dev/null; "
    "find /etc/systemd/system /usr/local/sbin -name '*litellm*.service' -o -name '*llmfleet*'; "
    "getent passwd litellm; getent group litellm; pgrep -a redis; systemctl --failed --plain --no-legend; "
    "systemctl list-units --all --plain --no-legend 'litellm*' 'llmfleet*'"
)
ROWS = 'su postgres -c "psql -XAtqc \'SELECT count(*) FROM \\"LiteLLM_VerificationToken\\"\' litellm"'


def test_without_tenants_nginx_serves_alone(gateway: Host, api: OpenAI) -> None:
    none = {"serving_tenants": []}
    run = support.apply("gateway", variables=none)
    assert "serving_tenants is empty: nginx serves without LiteLLM" in run.said
    assert (ask(api, support.secret("api_key")), ask(api, key("apps", "chat"))) == (200, 401)
    support.wait_until(lambda: gateway.run("pgrep -u litellm").rc == 1, 180)
    assert gateway.run("ls /etc/systemd/system/multi-user.target.wants | grep litellm").stdout == ""
    gateway.check_output("systemctl start llmfleet-backup.service")
    assert support.apply("gateway", variables=none).total("changed") == 0


def test_with_tenants_all_is_as_it_was(api: OpenAI) -> None:
    support.apply("gateway")
    assert (ask(api, support.secret("api_key")), ask(api, key("apps", "chat"))) == (401, 200)
    assert support.apply("gateway").total("changed") == 0


def test_removal_leaves_data_until_it_is_asked_for(gateway: Host) -> None:
    run = support.apply("remove").said
    assert gateway.run(LEFT).stdout == ""
    assert int(gateway.check_output(ROWS)) > 0
    assert "postgresql_remove_data=true" in run
    assert "serving_backup_remove_data=true" in run
    support.apply("remove", variables={"postgresql_remove_data": True, "serving_backup_remove_data": True})
    assert gateway.run("su postgres -c 'pg_dumpall --globals-only; psql -XAtql' | grep litellm").stdout == ""
    assert not gateway.file("/var/backups/llmfleet").exists
