"""Certificates from a real ACME server, pebble on `out`: issued, renewed, and what happens when that does not work."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
import yaml
from cryptography import x509
from testinfra.host import Host

GATEWAY = os.environ.get("LLMFLEET_GATEWAY", "10.77.5.10")
OUT = os.environ.get("LLMFLEET_OUT", "10.77.5.20")
AUTHORITIES = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "acme-ca.pem"
LIVE = "/etc/letsencrypt/live/llmfleet"
RENEWAL = "/etc/letsencrypt/renewal/llmfleet.conf"
BROKEN_SITE = "/etc/nginx/sites-enabled/zz-broken"
INVENTORY = yaml.safe_load((Path(__file__).parents[1] / "inventory/hosts.yml").read_text())["all"]["vars"]
TSIG_KEY, EAB_KEY = INVENTORY["__tsig_key"], INVENTORY["certbot_eab_hmac_key"]
ALIAS = {"nginx_server_aliases": ["api.example.test"]}
DNS = {
    **ALIAS,
    "certbot_challenge": "dns-01",
    "certbot_names": ["*.example.test"],
    "certbot_dns_plugin": "rfc2136",
    "certbot_dns_propagation_seconds": 1,
    "certbot_dns_credentials": {
        "dns_rfc2136_server": OUT,
        "dns_rfc2136_name": "acme.",
        "dns_rfc2136_secret": TSIG_KEY,
        "dns_rfc2136_algorithm": "hmac-sha256",
    },
}


@pytest.fixture(scope="module")
def gateway() -> Host:
    return support.host("gw")


@pytest.fixture(scope="module")
def out() -> Host:
    return support.host("out")


def served(name: str = support.NAME) -> x509.Certificate:
    """What clients get, trusted or not."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((GATEWAY, 443), 10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(True))


def replaced(serial_number: int) -> None:
    """By another certificate. A former worker of nginx takes connections for a moment after the reload."""
    support.wait_until(lambda: served().serial_number != serial_number, 5)


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return sorted(extension.value.get_values_for_type(x509.DNSName))


def trust_pebble(out: Host) -> None:
    """pebble forgets everything when it ends, and has another authority when it starts again."""
    program = (
        "import ssl, urllib.request as u;"
        "print(u.urlopen('https://127.0.0.1:15000/roots/0', context=ssl._create_unverified_context()).read().decode())"
    )
    support.wait_until(lambda: out.run("python3 -c %s", program).rc == 0, 20)
    AUTHORITIES.write_text(
        f"{out.file('/srv/acme/ca.pem').content_string}\n{out.check_output('python3 -c %s', program)}\n"
    )


@contextmanager
def stopped(host: Host, unit: str) -> Iterator[None]:
    host.check_output(f"systemctl stop {unit}")
    try:
        yield
    finally:
        host.check_output(f"systemctl start {unit}")


def due(gateway: Host) -> None:
    """certbot renews what has 200 days left, of 90."""
    gateway.check_output(f"sed -i 's/^#* *renew_before_expiry.*/renew_before_expiry = 200 days/' {RENEWAL}")


def watch(gateway: Host) -> tuple[bool, str]:
    """Whether llmfleet-certificate.service is content, and what it says."""
    since = gateway.check_output("date +%s.%N")
    ok = gateway.run("systemctl start llmfleet-certificate.service").rc == 0
    return ok, gateway.check_output(
        f"journalctl --quiet --output cat --since @{since} --unit llmfleet-certificate.service"
    )


def point(out: Host, name: str, address: str) -> None:
    """Have the name lead there, for the ACME server."""
    update = f"server {OUT}\nupdate delete {name}. A\nupdate add {name}. 1 A {address}\nsend"
    out.check_output(f"echo '{update}' | nsupdate -y hmac-sha256:acme.:{TSIG_KEY}")
    time.sleep(1.1)  # its time to live


def test_one_run_on_a_bare_host_brought_the_certificate(gateway: Host) -> None:
    """The run is the scenario's own."""
    certificate = served()
    assert names(certificate) == [support.NAME]
    assert "Pebble" in certificate.issuer.rfc4514_string()
    assert certificate.public_key().curve.name == "secp256r1"
    with support.client(GATEWAY, AUTHORITIES) as api:
        assert support.stream(api, "tiny", 16)
    for timer in ("certbot.timer", "llmfleet-certificate.timer"):
        assert gateway.service(timer).is_running
        assert gateway.service(timer).is_enabled
    assert watch(gateway)[0]
    assert support.exposure(gateway, "certbot.service") < 3
    assert support.exposure(gateway, "llmfleet-certificate.service") < 3


def test_renewal_cuts_no_stream(gateway: Host) -> None:
    """Answers go on being streamed while certbot.service renews, and one is under way when nginx is reloaded."""
    before = served().serial_number
    spans: list[tuple[float, float]] = []
    failures: list[Exception] = []
    renewed = threading.Event()

    def client() -> None:
        while not renewed.is_set():
            start = time.monotonic()
            try:
                support.stream(api, "tiny", 1500)
            except Exception as error:
                failures.append(error)
                return
            spans.append((start, time.monotonic()))

    due(gateway)
    with support.client(GATEWAY, AUTHORITIES) as api:
        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.7)  # so that they do not end at the same time
        try:
            gateway.check_output("systemctl start certbot.service")
            reloaded = time.monotonic()
            replaced(before)
        finally:
            renewed.set()
            for thread in threads:
                thread.join()
        assert support.stream(api, "tiny", 16)
    assert failures == []
    assert any(start < reloaded - 0.5 and end > reloaded for start, end in spans)


def test_failing_hook_is_seen_and_made_up_for(gateway: Host) -> None:
    before = served().serial_number
    due(gateway)
    gateway.check_output(f"echo 'server {{ listen 80 broken; }}' > {BROKEN_SITE}")
    try:
        gateway.check_output("systemctl start certbot.service")
        assert served().serial_number == before
        ok, text = watch(gateway)
        assert not ok
        assert "not in use" in text
    finally:
        gateway.check_output(f"rm {BROKEN_SITE}")
    assert watch(gateway)[0]
    replaced(before)


def test_run_that_changes_nothing_asks_the_acme_server_nothing(gateway: Host, out: Host) -> None:
    """It is down. The old certificate serves, and the renewal says that it failed."""
    before = served().serial_number
    with stopped(out, "pebble.service"):
        run = support.apply("gateway")
        assert run.total("changed") == 0
        due(gateway)
        assert gateway.run("systemctl start certbot.service").rc != 0
        assert gateway.service("certbot.service").is_running is False
        assert "failed" in gateway.run("systemctl is-failed certbot.service").stdout
        # Asked for another name, the role finds out before it changes anything.
        run = support.play("gateway", variables=ALIAS)
        assert run.code != 0
        assert "certbot_server is" in run.output
        assert "cannot be reached" in run.output
        assert run.total("changed") == 0
    assert served().serial_number == before
    trust_pebble(out)


def test_challenge_that_fails_leaves_what_serves_and_says_why(gateway: Host, out: Host) -> None:
    """The name leads elsewhere. pebble has forgotten the account in the test before: another is made."""
    before = served().serial_number
    point(out, support.NAME, OUT)
    try:
        run = support.play("gateway", variables=ALIAS)
    finally:
        point(out, support.NAME, GATEWAY)
    assert run.code != 0
    assert "could not make sure that the names are yours" in run.output
    assert "certbot_names must lead to this host" in run.output
    assert served().serial_number == before
    support.apply("gateway", variables=ALIAS)
    assert names(served("api.example.test")) == ["api.example.test", support.NAME]


def test_coming_from_the_own_ca_keeps_its_certificate_until_there_is_another(gateway: Host, out: Host) -> None:
    support.apply("gateway", variables={"nginx_certificate_source": "own_ca"})
    before = served().serial_number
    assert not gateway.file(LIVE).exists
    point(out, support.NAME, OUT)
    try:
        run = support.play("gateway")
        assert run.code != 0
        assert "could not make sure that the names are yours" in run.output
        assert served().serial_number == before
        gateway.check_output("nginx -t -q && systemctl reload nginx.service")
        assert served().serial_number == before
    finally:
        point(out, support.NAME, GATEWAY)
    support.apply("gateway", variables=ALIAS)
    assert "Pebble" in served().issuer.rfc4514_string()


def test_challenge_by_dns_brings_a_wildcard(gateway: Host, out: Host) -> None:
    """And an account, where the host has lost its own."""
    gateway.check_output("rm -r /etc/letsencrypt/accounts")
    support.apply("gateway", variables=DNS)
    assert names(served()) == ["*.example.test"]
    due(gateway)
    before = served().serial_number
    gateway.check_output("systemctl start certbot.service")
    replaced(before)
    # nothing of the challenge is left in the zone
    assert out.check_output(f"dig +short @{OUT} _acme-challenge.example.test TXT") == ""


def test_secrets_are_for_root_only(gateway: Host) -> None:
    for file in ("llmfleet.ini", "llmfleet-dns.ini"):
        found = gateway.file(f"/etc/letsencrypt/{file}")
        assert (found.mode, found.user, found.group) == (0o600, "root", "root")
    gateway.check_output("su -s /bin/sh nobody -c '! cat /etc/letsencrypt/live/llmfleet/privkey.pem' 2>&1")
    places = "/var/log /etc/systemd /etc/nginx /usr/local /var/lib/llmfleet"
    for secret in (EAB_KEY, TSIG_KEY):
        assert gateway.run(f"grep --recursive --files-with-matches {secret} {places}").stdout == ""
        assert gateway.run(f"journalctl --quiet --output cat | grep --fixed-strings {secret}").stdout == ""


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"certbot_names": ["*.example.test"]}, "a wildcard needs certbot_challenge dns-01"),
        ({"certbot_server": "http://out:14000/dir"}, "write the https:// URL"),
        ({**DNS, "certbot_dns_credentials": {"dns_rfc2136_secret": TSIG_KEY}}, "the plugin rfc2136 takes"),
        ({"certbot_eab_kid": ""}, "certbot_eab_kid is not set"),
    ],
    ids=["wildcard", "server", "credentials", "eab"],
)
def test_bad_input_is_refused_before_anything_is_changed(variables: dict[str, Any], says: str) -> None:
    run = support.play("gateway", variables=variables)
    assert run.code != 0
    assert says in run.output.replace("\n", " ")
    assert run.total("changed") == 0
    assert TSIG_KEY not in run.output


def test_back_to_what_the_inventory_says(gateway: Host) -> None:
    """For the tests of the other files."""
    support.apply("gateway")
    assert names(served()) == [support.NAME]
    assert not gateway.file("/etc/letsencrypt/llmfleet-dns.ini").exists
