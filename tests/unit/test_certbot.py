# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""When certbot has to ask for a certificate, what it is told when it gets none, and the program that watches."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jinja2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).parents[2]
PLUGINS = "ansible_collections.llmfleet.serving.plugins"
certbot = importlib.import_module(f"{PLUGINS}.module_utils._certbot")
certbot_problems = importlib.import_module(f"{PLUGINS}.module_utils._certbot_problems")

SERVER = "https://acme.example.test:14000/dir"
NAMES = ["llm.example.test", "api.example.test"]
SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
NOW = datetime.now(timezone.utc).replace(microsecond=0)


def make_certificate(folder: Path, left: float, lifetime: float = 90, names: list[str] = NAMES) -> None:
    """A certificate with so many days left, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    end = NOW + timedelta(days=left)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(end - timedelta(days=lifetime))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fullchain.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    for part in ("cert", "chain"):
        (folder / f"{part}.pem").write_bytes((folder / "fullchain.pem").read_bytes())
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


# --- the variables ------------------------------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "site_names": NAMES,
        "http_port": 80,
        "ca_content": "",
        "certbot_names": NAMES,
        "certbot_email": "admin@example.test",
        "certbot_server": "https://acme-v02.api.letsencrypt.org/directory",
        "certbot_staging": False,
        "certbot_eab_kid": "",
        "certbot_eab_hmac_key": "",
        "certbot_ca_bundle": "",
        "certbot_challenge": "http-01",
        "certbot_webroot": "/var/lib/llmfleet/acme",
        "certbot_dns_plugin": "",
        "certbot_dns_credentials": {},
        "certbot_dns_propagation_seconds": 0,
        "certbot_deploy_hook_command": "true",
        "certbot_expiry_warning_days": 14,
        **changes,
    }


def problems(**changes: Any) -> list[str]:
    return certbot_problems.problems(settings(**changes))


def dns(plugin: str, **credentials: Any) -> dict[str, Any]:
    return {"certbot_challenge": "dns-01", "certbot_dns_plugin": plugin, "certbot_dns_credentials": credentials}


GARBAGE = "-----BEGIN CERTIFICATE-----\nZ2FyYmFnZQ==\n-----END CERTIFICATE-----"
RFC2136 = {"dns_rfc2136_server": "192.0.2.1", "dns_rfc2136_name": "k.", "dns_rfc2136_secret": SECRET}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"certbot_email": ""},
        {"certbot_staging": True},
        {"certbot_server": SERVER, "certbot_eab_kid": "kid-1", "certbot_eab_hmac_key": SECRET},
        {"certbot_server": SERVER, "certbot_names": ["gateway"], "site_names": ["gateway"]},
        {**dns("cloudflare", dns_cloudflare_api_token=SECRET), "certbot_names": ["*.example.test", "example.test"]},
        {**dns("cloudflare", dns_cloudflare_email="a@b.de", dns_cloudflare_api_key=SECRET), "http_port": 8080},
        dns("digitalocean", dns_digitalocean_token=SECRET),
        dns("rfc2136", **RFC2136),
        dns("rfc2136", **{**RFC2136, "dns_rfc2136_server": "2001:db8::1"}, dns_rfc2136_algorithm="hmac-sha512"),
        dns("route53"),
        dns("route53", aws_access_key_id="AKIA", aws_secret_access_key=SECRET),
        {"site_names": [], "http_port": 0},
    ],
)
def test_nothing_is_wrong(changes: dict[str, Any]) -> None:
    assert problems(**changes) == []


def test_bundle_is_read(tmp_path: Path) -> None:
    make_certificate(tmp_path, 1)
    pem = (tmp_path / "fullchain.pem").read_text()
    assert problems(certbot_ca_bundle="/ca.pem", ca_content=f"{pem}\n{pem}") == []


def test_of_a_bundle_the_certificates_count(tmp_path: Path, run_playbook: Any) -> None:
    """By the role's own variable: without comments, in whatever character set."""
    make_certificate(tmp_path / "ca", 1)
    bundle = tmp_path / "ca.pem"
    pem = (tmp_path / "ca/fullchain.pem").read_text()
    bundle.write_text(f"# Zertifizierungsstelle für Prüfungen\n{pem}# \u00a0\n{pem}")
    show = {"ansible.builtin.copy": {"content": "{{ __certbot_ca_content }}", "dest": str(tmp_path / "found")}}
    variables = str(ROOT / "roles/certbot/vars/main.yml")
    play = {"hosts": "all", "gather_facts": False, "vars_files": [variables], "tasks": [show]}
    done = run_playbook([{**play, "vars": {"certbot_ca_bundle": str(bundle)}}])
    assert (tmp_path / "found").read_text() == f"{pem}{pem}".rstrip(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"certbot_names": []}, "certbot_names is empty"),
        ({"certbot_names": [*NAMES, NAMES[0]]}, "a name twice"),
        ({"certbot_names": ["192.0.2.1"], "site_names": ["192.0.2.1"]}, "to be for 192.0.2.1"),
        ({"certbot_names": ["[fd77::1]"], "site_names": ["[fd77::1]"]}, "nginx_certificate_source"),
        ({"certbot_names": [*NAMES, "https://a.b"]}, "'https://a.b'"),
        ({"certbot_names": ["llm"], "site_names": ["llm"]}, "full names only"),
        ({"certbot_names": [*NAMES, "*.a.test"]}, "a wildcard needs certbot_challenge dns-01"),
        ({"certbot_names": [*NAMES, "other.test"]}, "'other.test', which nginx does not serve"),
        ({"certbot_names": NAMES[:1]}, "lacks 'api.example.test'"),
        ({"certbot_server": "http://a.test/dir"}, "https:// URL"),
        ({"certbot_server": "https://a:99999/"}, "https:// URL"),
        ({"certbot_server": "https://user:pass@a.test/"}, "https:// URL"),
        ({"certbot_server": SERVER, "certbot_staging": True}, "certbot_staging is for Let's Encrypt"),
        ({"certbot_ca_bundle": "/nowhere"}, "certbot_ca_bundle is '/nowhere'"),
        ({"certbot_ca_bundle": "/ca.pem", "ca_content": GARBAGE}, "one of them is damaged"),
        ({"certbot_names": "llm.example.test"}, "certbot_names is 'llm.example.test': write a list"),
        ({"certbot_names": [1]}, "certbot_names is [1]: write a list"),
        (dns("cloudflare") | {"certbot_dns_credentials": SECRET}, "certbot_dns_credentials is no dict"),
        ({"certbot_email": "admin"}, "certbot_email is 'admin'"),
        ({"certbot_email": "a@b.de,c@d.de"}, "write one address"),
        ({"certbot_eab_kid": "kid"}, "certbot_eab_hmac_key is not set"),
        ({"certbot_eab_hmac_key": SECRET}, "certbot_eab_kid is not set"),
        ({"certbot_eab_hmac_key": "a b", "certbot_eab_kid": "kid"}, "base64url"),
        ({"certbot_eab_hmac_key": SECRET, "certbot_eab_kid": "a\nb"}, "certbot_eab_kid is"),
        ({"http_port": 8080}, "nginx_http_port is 8080"),
        ({"certbot_webroot": "relative"}, "certbot_webroot is 'relative'"),
        ({"certbot_webroot": "/a/../b"}, "certbot_webroot is '/a/../b'"),
        (dns("", a="b"), "certbot_dns_plugin is ''"),
        (dns("godaddy"), "cloudflare, digitalocean, rfc2136, route53"),
        (dns("cloudflare"), "the plugin cloudflare takes dns_cloudflare_api_token or"),
        (dns("cloudflare", dns_cloudflare_api_token=SECRET, dns_cloudflare_email="a@b.de"), "the plugin cloudflare"),
        (dns("route53", aws_access_key_id="AKIA"), "the plugin route53"),
        (dns("digitalocean", dns_digitalocean_token=""), "dns_digitalocean_token is empty"),
        (dns("digitalocean", dns_digitalocean_token='a"b'), "a quote"),
        (dns("digitalocean", dns_digitalocean_token="a\nb"), "a line break"),
        (dns("rfc2136", **{**RFC2136, "dns_rfc2136_server": "ns.example.test"}), "the name server's IP address"),
        (dns("rfc2136", **RFC2136, dns_rfc2136_algorithm="sha256"), "HMAC-SHA256"),
        (dns("rfc2136", **RFC2136, dns_rfc2136_port="domain"), "write a number"),
        ({"certbot_dns_propagation_seconds": -1}, "certbot_dns_propagation_seconds is -1"),
        ({"certbot_expiry_warning_days": 30}, "use 1 to 29"),
        ({"certbot_deploy_hook_command": " "}, "certbot_deploy_hook_command is empty"),
    ],
)
def test_one_thing_is_wrong(changes: dict[str, Any], says: str) -> None:
    found = problems(**changes)
    assert len(found) == 1, found
    assert says in found[0]
    assert SECRET not in found[0]


# --- what a host needs --------------------------------------------------------------------------------------

RENEWAL = """# renew_before_expiry = 30 days
version = 4.0.0
cert = /etc/letsencrypt/live/llmfleet/cert.pem

# Options used in the renewal process
[renewalparams]
account = 5963c839
server = {server}
authenticator = webroot
renew_hook = /usr/local/sbin/llmfleet-certificate deploy
webroot_path = /var/lib/llmfleet/acme,
[[webroot_map]]
server = not this one
"""
PARAMETERS = {
    "server": SERVER,
    "authenticator": "webroot",
    "renew_hook": "/usr/local/sbin/llmfleet-certificate deploy",
    "webroot_path": "/var/lib/llmfleet/acme",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """certbot's folder with a certificate that nothing is wrong with."""
    folder = tmp_path / "letsencrypt"
    make_certificate(folder / "live/llmfleet", 60)
    (folder / "renewal").mkdir()
    (folder / "renewal/llmfleet.conf").write_text(RENEWAL.format(server=SERVER))
    account = folder / "accounts/acme.example.test:14000/dir/5963c839"
    account.mkdir(parents=True)
    (account / "regr.json").write_text("{}")
    return folder


@pytest.fixture
def look(folder: Path, run_module: Any, systemd: Any) -> Callable[..., dict[str, Any]]:
    def look(**changes: Any) -> dict[str, Any]:
        asked = {
            "lineage": "llmfleet",
            "names": NAMES,
            "parameters": PARAMETERS,
            "expiry_days": 14,
            "folder": str(folder),
            **changes,
        }
        return run_module("certbot_host_info", asked, environment=systemd.environment)

    return look


def test_present_certificate_will_do_and_nobody_is_asked(look: Callable[..., dict[str, Any]]) -> None:
    found = look()
    assert (found["certificate_to_do"], found["server_problem"]) == ("", "")
    assert look(names=[NAMES[1], NAMES[0].upper()])["certificate_to_do"] == ""


def test_timers_that_do_not_run_or_will_not_after_a_boot(look: Callable[..., dict[str, Any]], systemd: Any) -> None:
    shown = {"on": ("active", "enabled"), "stopped": ("inactive", "enabled"), "disabled": ("active", "disabled")}
    blocks = [
        f"Id={name}.timer\nActiveState={active}\nUnitFileState={enabled}\n" for name, (active, enabled) in shown.items()
    ]
    (systemd.folder / "shown").write_text("\n".join(blocks))
    (systemd.bin / "systemctl").write_text(f"#!/bin/sh\ncat {systemd.folder}/shown\n")
    timers = ["missing.timer", *(f"{name}.timer" for name in shown)]
    assert look(timers=timers)["timers_off"] == ["missing.timer", "stopped.timer", "disabled.timer"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"names": NAMES[:1]}, "it is for api.example.test, llm.example.test"),
        ({"parameters": {**PARAMETERS, "server": "https://127.0.0.1:1/"}}, "certbot_server has changed"),
        ({"parameters": {**PARAMETERS, "authenticator": "dns-rfc2136"}}, "certbot_challenge or certbot_dns_plugin"),
        ({"parameters": {**PARAMETERS, "webroot_path": "/srv"}}, "certbot_webroot has changed"),
        ({"parameters": {**PARAMETERS, "dns_rfc2136_propagation_seconds": 5}}, "propagation_seconds has changed"),
        ({"lineage": "other"}, "it is missing"),
    ],
)
def test_what_has_changed_is_asked_for_again(
    look: Callable[..., dict[str, Any]], changes: dict[str, Any], says: str
) -> None:
    parameters = {**changes.get("parameters", PARAMETERS)}
    found = look(**{**changes, "parameters": parameters})
    assert says in found["certificate_to_do"]


@pytest.mark.parametrize(
    ("left", "lifetime", "to_do"), [(15, 90, False), (13, 90, True), (3, 10, False), (2, 10, True), (-1, 90, True)]
)
def test_what_the_timer_has_not_renewed_is_asked_for(
    look: Callable[..., dict[str, Any]], folder: Path, left: int, lifetime: int, to_do: bool
) -> None:
    make_certificate(folder / "live/llmfleet", left, lifetime)
    assert ("has not been renewed" in look()["certificate_to_do"]) == to_do


def test_lost_account_is_found(look: Callable[..., dict[str, Any]], folder: Path) -> None:
    (folder / "accounts/acme.example.test:14000/dir/5963c839/regr.json").unlink()
    assert look()["certificate_to_do"] == f"the account at {SERVER} is lost"


def test_broken_certificate_is_found(look: Callable[..., dict[str, Any]], folder: Path) -> None:
    (folder / "live/llmfleet/fullchain.pem").write_text("no certificate")
    assert "cannot be read" in look()["certificate_to_do"]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("authenticator = webroot\ninstaller = None", False),
        ("authenticator = dns-rfc2136", False),
        ("authenticator = nginx\ninstaller = nginx", True),
        ("authenticator = webroot\ninstaller = apache", True),
        ("authenticator = standalone", True),
        ("authenticator = webroot\npost_hook = cp a /etc/b", True),
        ("authenticator = webroot\nrenew_hook = cp a /etc/b", True),
        ("", True),
    ],
)
def test_other_certificates_may_need_more(
    look: Callable[..., dict[str, Any]], folder: Path, text: str, more: bool
) -> None:
    (folder / "renewal/other.conf").write_text(f"[renewalparams]\naccount = x\n{text}\n")
    assert look()["confinement_breaks"] == (["other"] if more else [])


@pytest.fixture
def acme(tmp_path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A server that answers like an ACME server's directory: its URL, what it says, and its own authority."""
    make_certificate(tmp_path / "acme", 1, names=["localhost"])
    answer: dict[str, Any] = {"newOrder": "x"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer.get("status", 200))
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "acme/fullchain.pem", tmp_path / "acme/privkey.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}/dir", answer, (tmp_path / "acme/fullchain.pem").read_text()
    server.shutdown()
    server.server_close()


def test_server_is_asked_before_a_certificate_is(look: Callable[..., dict[str, Any]], acme: Any) -> None:
    url, answer, authority = acme

    def problem(**changes: Any) -> str:
        return look(parameters={**PARAMETERS, "server": url}, ca_content=authority, **changes)["server_problem"]

    assert problem() == ""
    answer["meta"] = {"externalAccountRequired": True}
    assert "set certbot_eab_kid and certbot_eab_hmac_key" in problem()
    assert problem(external_account=True) == ""
    del answer["newOrder"]
    assert "no ACME directory" in problem()
    answer["status"] = 503
    assert "cannot be reached from this host (HTTP status 503)" in problem()
    answer["meta"] = "none"
    assert "cannot be reached" in problem()
    answer["status"] = 200
    assert "no ACME directory" in problem()
    answer["newOrder"] = "x"
    assert problem() == ""
    other = look(parameters={**PARAMETERS, "server": url}, ca_content="")
    assert "certbot_ca_bundle" in other["server_problem"]
    nobody = look(parameters={**PARAMETERS, "server": "https://localhost:1/"}, ca_content=authority)
    assert "cannot be reached from this host" in nobody["server_problem"]


def test_what_is_no_web_server_is_told(look: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    make_certificate(tmp_path / "server", 1, names=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server/fullchain.pem", tmp_path / "server/privkey.pem")

    def answer() -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as client:
            client.recv(4096)
            client.sendall(b"220 mail.example.test\r\n")

    with socket.create_server(("localhost", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        server = f"https://localhost:{listener.getsockname()[1]}/dir"
        authority = (tmp_path / "server/fullchain.pem").read_text()
        found = look(parameters={**PARAMETERS, "server": server}, ca_content=authority)
        thread.join()
    assert "cannot be reached from this host (220 mail.example.test" in found["server_problem"]


# --- asking -------------------------------------------------------------------------------------------------

REFUSED = """Certbot failed to authenticate some domains (authenticator: webroot). The Certificate Authority reported:
  Domain: llm.example.test
  Type:   connection
  Detail: 192.0.2.1: Fetching http://llm.example.test/.well-known/acme-challenge/x: Connection refused

Hint: The Certificate Authority failed to download the temporary challenge files.
"""


@pytest.mark.parametrize(
    ("output", "challenge", "says"),
    [
        (REFUSED, "http-01", "certbot_names must lead to this host"),
        (REFUSED, "dns-01", "raise certbot_dns_propagation_seconds"),
        ("ValueError: Requesting out/dir: Connection refused", "http-01", "cannot be reached from this host"),
        ("requests.exceptions.SSLError: HTTPSConnectionPool(host='out')", "http-01", "set certbot_ca_bundle"),
        ("Server requires external account binding. Please use --eab-kid", "http-01", "certbot_eab_kid"),
        ("the field 'kid' references a key that is not known to the ACME server", "http-01", "certbot_eab_kid"),
        ("The ACME server believes a@ is an invalid email address.", "http-01", "certbot_email"),
        ("too many certificates already issued", "http-01", "certbot_staging: true"),
        ("Another instance of Certbot is already running.", "http-01", "at work on this host already"),
        ("Received response from server: NOTAUTH", "dns-01", "certbot_dns_credentials"),
        ("Something else.\nAsk for help or search for solutions", "http-01", "(certbot_server): Something else."),
    ],
)
def test_failures_name_the_variable(output: str, challenge: str, says: str) -> None:
    assert says in certbot.explain(output, SERVER, challenge)


# Plays the lines of a script: exit status and words of each call, and what it logs.
FAKE_CERTBOT = """#!/bin/sh
echo "$@ $REQUESTS_CA_BUNDLE" >> {folder}/calls
n=$(wc -l < {folder}/calls)
cat {folder}/log$n >> {folder}/log 2>/dev/null
cat {folder}/says$n
exit $(cat {folder}/exits$n)
"""


@pytest.fixture
def ask(tmp_path: Path, folder: Path, run_module: Any) -> Callable[..., dict[str, Any]]:
    (tmp_path / "certbot").write_text(FAKE_CERTBOT.format(folder=tmp_path))
    (tmp_path / "certbot").chmod(0o755)

    def ask(*answers: tuple[int, str, str], check: bool = False) -> dict[str, Any]:
        for number, (code, says, logs) in enumerate(answers, 1):
            for name, text in (("exits", code), ("says", says), ("log", logs)):
                (tmp_path / f"{name}{number}").write_text(f"{text}\n")
        return run_module(
            "certbot_certificate",
            {
                "config": "/etc/letsencrypt/llmfleet.ini",
                "lineage": "llmfleet",
                "server": SERVER,
                "challenge": "http-01",
                "environment": {"REQUESTS_CA_BUNDLE": "/ca.pem"},
                "pending": str(tmp_path / "pending"),
                "folder": str(folder),
            },
            patch={"LOG": tmp_path / "log", "PAUSE": 0},
            environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=check,
        )

    return ask


def test_certbot_is_told_by_its_file_alone(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert ask((0, "Successfully received certificate.", ""))["changed"]
    assert (tmp_path / "calls").read_text() == (
        "certonly --config /etc/letsencrypt/llmfleet.ini --force-renewal --renew-with-new-domains"
        " --account 5963c839 /ca.pem\n"
    )


def test_check_mode_asks_nobody(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert ask(check=True)["changed"]
    assert not (tmp_path / "calls").exists()


def test_account_that_the_server_does_not_know_is_replaced(ask: Callable[..., dict[str, Any]], folder: Path) -> None:
    other = folder / "accounts/acme.example.test:14000/dir/other/regr.json"
    other.parent.mkdir()
    other.touch()
    answer = ask((1, "Account x not found.", f"acme.messages.Error: {certbot.LOST_ACCOUNT} :: x"), (0, "Here.", ""))
    assert answer["changed"]
    assert not (folder / "accounts/acme.example.test:14000/dir/5963c839").exists()
    assert other.exists()
    (aside,) = answer["put_aside"]
    assert (Path(aside) / "accounts-acme.example.test:14000-dir-5963c839/regr.json").exists()
    assert (folder / "live/llmfleet/fullchain.pem").exists()


def test_lost_account_of_nobody_knows_whom_stays(ask: Callable[..., dict[str, Any]], folder: Path) -> None:
    """Two accounts, and no certificate that says which of them is ours."""
    (folder / "renewal/llmfleet.conf").unlink()
    other = folder / "accounts/acme.example.test:14000/dir/other/regr.json"
    other.parent.mkdir()
    other.touch()
    answer = ask((1, "Account x not found.", f"acme.messages.Error: {certbot.LOST_ACCOUNT} :: x"))
    assert answer["failed"]
    assert len(list((folder / "accounts/acme.example.test:14000/dir").iterdir())) == 2


def test_only_account_is_replaced_without_a_certificate_too(ask: Callable[..., dict[str, Any]], folder: Path) -> None:
    (folder / "renewal/llmfleet.conf").unlink()
    ask((1, "Account x not found.", f"acme.messages.Error: {certbot.LOST_ACCOUNT} :: x"), (0, "Here.", ""))
    assert not list((folder / "accounts/acme.example.test:14000/dir").iterdir())


@pytest.mark.parametrize("lost", ["live/llmfleet/cert.pem", "live/llmfleet/fullchain.pem", "renewal/llmfleet.conf"])
def test_what_is_left_of_a_certificate_is_put_aside(
    ask: Callable[..., dict[str, Any]], look: Callable[..., dict[str, Any]], folder: Path, lost: str
) -> None:
    (folder / lost).unlink()
    assert look(parameters={**PARAMETERS, "server": "https://localhost:1/"})["certificate_to_do"] == "it is missing"
    (aside,) = ask((0, "Here.", ""))["put_aside"]
    assert (Path(aside) / "live-llmfleet").is_dir()
    assert not (folder / "live/llmfleet").exists()
    assert not (folder / "renewal/llmfleet.conf").exists()


@pytest.mark.parametrize("lost", ["live/llmfleet/cert.pem", "renewal/llmfleet.conf"])
def test_what_is_left_of_a_certificate_is_put_back_where_none_comes(
    ask: Callable[..., dict[str, Any]], folder: Path, lost: str
) -> None:
    (folder / "archive/llmfleet").mkdir(parents=True)
    (folder / lost).unlink()
    before = sorted(folder.rglob("*"))
    answer = ask((1, REFUSED, ""))
    assert answer["put_aside"] == []
    assert sorted(folder.rglob("*")) == before


def test_another_certbot_is_waited_for(ask: Callable[..., dict[str, Any]]) -> None:
    assert ask((1, certbot.BUSY, ""), (1, certbot.BUSY, ""), (0, "Here.", ""))["changed"]


def test_failure_is_explained(ask: Callable[..., dict[str, Any]], folder: Path) -> None:
    answer = ask((1, REFUSED, ""))
    assert "could not make sure that the names are yours" in answer["msg"]
    assert (folder / "live/llmfleet/fullchain.pem").exists()


def test_failed_hook_is_a_failure(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "pending").touch()
    assert "certbot_deploy_hook_command has failed" in ask((0, "Here.", ""))["msg"]


# --- the program that deploys and watches -------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)  # noqa: S701 (shell, not HTML)
    environment.filters |= {
        "comment": lambda text: f"# {text}",
        "quote": shlex.quote,
        "regex_replace": lambda text, what, by: re.sub(what, by, text),
    }
    template = environment.from_string((ROOT / "roles/certbot/templates/certificate.sh.j2").read_text())

    def run(verb: str, hook: str = "true", timer: str = "exit 0") -> subprocess.CompletedProcess[str]:
        text = template.render(
            ansible_managed="Ansible managed",
            certbot_deploy_hook_command=hook,
            certbot_expiry_warning_days=14,
            __certbot_lineage="llmfleet",
            __certbot_pending_file=tmp_path / "pending",
        )
        (tmp_path / "program").write_text(text.replace("/etc/letsencrypt", str(folder)))
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{timer}\n")
        (tmp_path / "systemctl").chmod(0o755)
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["sh", str(tmp_path / "program"), verb]
        return subprocess.run(command, env=path, capture_output=True, text=True, check=False)

    return run


def test_good_certificate_is_not_worth_a_word(program: Any) -> None:
    done = program("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("left", "lifetime", "ok"), [(15, 90, True), (13, 90, False), (3, 10, True), (2, 10, False)])
def test_expiry_is_watched(program: Any, folder: Path, left: int, lifetime: int, ok: bool) -> None:
    make_certificate(folder / "live/llmfleet", left, lifetime)
    done = program("check")
    assert (done.returncode == 0) == ok
    assert ("has not been renewed" in done.stderr) != ok


def test_missing_certificate_and_stopped_timer_are_told(program: Any, folder: Path) -> None:
    (folder / "live/llmfleet/fullchain.pem").unlink()
    done = program("check", timer="exit 3")
    assert done.returncode == 1
    assert "There is no " in done.stderr
    assert "certbot.timer does not run" in done.stderr


def test_hook_that_failed_is_tried_again(program: Any, tmp_path: Path) -> None:
    quoted = """test "it's" = 'so'"""
    done = program("deploy", hook=quoted)
    assert done.returncode == 1
    assert "not in use" in done.stderr
    assert program("check", hook="false").returncode == 1
    assert (tmp_path / "pending").exists()
    assert program("check", hook="true").returncode == 0
    assert not (tmp_path / "pending").exists()
    assert program("elsewhere").returncode == 2
