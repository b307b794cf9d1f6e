"""A database on another host, by TLS and with a password: PostgreSQL on the engine's host stands for a site's own.

The TLS of LiteLLM's side is that of the stand-in for Prisma's engines.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import support
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openai import OpenAI
from service import BATCH_SECONDS, GATEWAY, ask, key, running, serving, spend, sql
from testinfra.host import Host

pytestmark = pytest.mark.long

PASSWORD = "p@ss/w:rd %?#&=" + "0123456789" * 2
CA_FILE = "/etc/ssl/certs/llmfleet-test-ca.pem"
WRONG_CA_FILE = "/etc/ssl/certs/llmfleet-test-another-ca.pem"


def url(password: str = PASSWORD, authority: str = CA_FILE) -> str:
    options = f"sslmode=require&sslaccept=strict&sslcert={authority}"
    return f"postgresql://litellm:{quote(password, safe='')}@eng/litellm?{options}"


def authority() -> tuple[str, str, str]:
    """A CA's certificate, and one of its for the host `eng` with its key, in PEM."""
    now, one_day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    own, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = {who: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)]) for who in ("Test CA", "eng")}

    def certificate(who: str, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> str:
        made = (
            x509.CertificateBuilder(names["Test CA"], names[who], public, x509.random_serial_number())
            .not_valid_before(now - one_day)
            .not_valid_after(now + one_day)
            .add_extension(extension, critical=True)
            .sign(own, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM).decode()

    private = theirs.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (
        certificate("Test CA", own.public_key(), x509.BasicConstraints(ca=True, path_length=0)),
        certificate("eng", theirs.public_key(), x509.SubjectAlternativeName([x509.DNSName("eng")])),
        private.decode(),
    )


def put(host: Host, path: str, text: str) -> None:
    host.check_output("umask 022; printf %%s %s >%s", text, path)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Host]:
    """PostgreSQL as its administrator would have set it up for the gateway alone."""
    host, gateway = support.host("eng"), support.host("gw")
    trusted, certificate, private = authority()
    put(gateway, CA_FILE, trusted)
    put(gateway, WRONG_CA_FILE, authority()[0])
    opened = [{"ports": [5432], "sources": [GATEWAY], "comment": "PostgreSQL"}]
    support.apply("firewall", "--limit", "eng", variables={"firewall_allow_more": opened})
    quiet = "DEBIAN_FRONTEND=noninteractive apt-get -qq"
    host.check_output(f"apt-get update -qq && {quiet} install postgresql >/dev/null 2>&1")
    (folder,) = host.check_output("ls -d /etc/postgresql/*/main").split()
    put(host, f"{folder}/server.crt", certificate)
    put(host, f"{folder}/server.key", private)
    put(
        host,
        f"{folder}/conf.d/site.conf",
        f"listen_addresses = 'eng'\nssl_cert_file = '{folder}/server.crt'\nssl_key_file = '{folder}/server.key'\n",
    )
    host.check_output(
        f"chown postgres {folder}/server.key && chmod 600 {folder}/server.key && "
        f"echo 'hostssl litellm litellm {ipaddress.ip_network(GATEWAY)} scram-sha-256' >>{folder}/pg_hba.conf && "
        "systemctl restart 'postgresql@*'"
    )
    quoted = PASSWORD.replace("'", "''")
    sql(host, f"CREATE ROLE litellm LOGIN PASSWORD '{quoted}'; CREATE DATABASE litellm OWNER litellm", "postgres")
    yield host
    support.apply("gateway")
    support.wait_until(lambda: running(gateway) == {serving(gateway)}, 180)
    host.check_output(f"{quiet} purge 'postgresql*' >/dev/null 2>&1; rm -rf /var/lib/postgresql {folder}")
    support.apply("firewall", "--limit", "eng")
    gateway.check_output(f"rm {CA_FILE} {WRONG_CA_FILE}")


def apply(database: str, playbook: str = "gateway", *arguments: str) -> support.Run:
    return support.play(playbook, *arguments, variables={"litellm_database_url": database})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [(url(authority=WRONG_CA_FILE), "certificate"), (url("another-password"), "Authentication failed")],
    ids=["CA", "password"],
)
def test_database_that_does_not_let_in_leaves_what_served(
    gateway: Host, api: OpenAI, elsewhere: Host, wrong: str, says: str
) -> None:
    before = serving(gateway)
    run = apply(wrong)
    assert run.code != 0
    assert "could not migrate the database; what served before serves on" in run.said
    assert says in run.said
    assert sql(elsewhere, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"
    assert serving(gateway) == before
    assert ask(api, key("apps", "chat")) == 200


def test_it_serves_from_there_by_tls_alone(gateway: Host, api: OpenAI, elsewhere: Host) -> None:
    run = apply(url(), "gateway", "-vvv", "--diff")
    assert run.code == 0, run.output
    arguments = gateway.check_output("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")  # once the migration has ended
    assert "litellm" in arguments
    for shown in (PASSWORD, quote(PASSWORD, safe="")):
        assert shown not in run.output + arguments
    assert ask(api, key("apps", "chat")) == 200
    assert ask(api, key("research", "ci"), "second") in (401, 403)
    support.wait_until(lambda: spend(elsewhere, "apps/chat") > 0, 18 * BATCH_SECONDS)
    seen = "SELECT DISTINCT ssl, version FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'litellm'"
    assert sql(elsewhere, seen, "postgres") == "t|TLSv1.3"
    support.wait_until(lambda: running(gateway) == {serving(gateway)}, 180)
    own = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'litellm'"
    assert sql(gateway, own, "postgres") == "0"
    again = apply(url())
    assert (again.code, again.total("changed")) == (0, 0), again.output


def test_backups_of_it_are_not_ours(gateway: Host, elsewhere: Host) -> None:
    for playbook in ("backup", "restore"):
        run = apply(url(), playbook)
        assert run.code != 0
        assert "that database is backed up and restored by whoever runs it" in run.said
        assert run.total("changed") == 0


def test_back_to_its_own_what_was_spent_is_there(gateway: Host, api: OpenAI, elsewhere: Host) -> None:
    before: dict[str, Any] = {name: spend(gateway, name) for name in ("apps/chat", "research/ci")}
    support.apply("gateway")
    assert {name: spend(gateway, name) for name in before} == before
    assert ask(api, key("apps", "chat")) == 200
    support.wait_until(lambda: spend(gateway, "apps/chat") > before["apps/chat"], 18 * BATCH_SECONDS)
