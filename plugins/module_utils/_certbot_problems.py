# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what is wrong with the role certbot's variables. No Ansible import and no I/O."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ansible_collections.llmfleet.serving.plugins.module_utils._names import is_dns_name

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
ACME_PORT = 80
EMAIL = re.compile(r"[^\s@,\"'<>#;\\]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}")
KEY_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]+")
HMAC_KEY = re.compile(r"[A-Za-z0-9_-]+=*")
PATH = re.compile(r"(/[A-Za-z0-9_.-]+)+")

# What each plugin needs, and what it may have, by the names that it gives them. Of cloudflare's one or the other.
CREDENTIALS: dict[str, tuple[list[set[str]], set[str]]] = {
    "cloudflare": ([{"dns_cloudflare_api_token"}, {"dns_cloudflare_email", "dns_cloudflare_api_key"}], set()),
    "digitalocean": ([{"dns_digitalocean_token"}], set()),
    "rfc2136": (
        [{"dns_rfc2136_server", "dns_rfc2136_name", "dns_rfc2136_secret"}],
        {"dns_rfc2136_port", "dns_rfc2136_algorithm", "dns_rfc2136_sign_query"},
    ),
    # None at all where the host has a role of its own.
    "route53": ([{"aws_access_key_id", "aws_secret_access_key"}, set()], {"aws_session_token"}),
}
ALGORITHMS = {f"HMAC-{name}" for name in ("MD5", "SHA1", "SHA224", "SHA256", "SHA384", "SHA512")}


def problems(settings: dict[str, Any]) -> list[str]:
    shapes = [*_shapes(settings)]
    if shapes:  # what the other checks look into
        return shapes
    return [*_names(settings), *_server(settings), *_account(settings), *_challenge(settings), *_rest(settings)]


def _shapes(settings: dict[str, Any]) -> Iterator[str]:
    names = settings["certbot_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"certbot_names is {names!r}: write a list of DNS names, as [llm.example.org], with -e as JSON."
    if not isinstance(settings["certbot_dns_credentials"], dict):
        yield (
            "certbot_dns_credentials is no dict: write the names and values that the plugin needs, "
            "as {dns_cloudflare_api_token: ...}, in a vault."
        )


def _names(settings: dict[str, Any]) -> Iterator[str]:
    names, site_names = [name.lower() for name in settings["certbot_names"]], settings["site_names"]
    if not names:
        yield "certbot_names is empty: list the DNS names that the certificate is for."
    if len(set(names)) < len(names):
        yield "certbot_names has a name twice: list each once."
    for name in names:
        if _is_address(name):
            yield (
                f"The certificate is to be for {name}, and certbot asks for DNS names only: give the service one "
                "(nginx_server_name), or use another nginx_certificate_source."
            )
        elif not is_dns_name(re.sub(r"\A\*\.", "w.", name)):
            yield f"certbot_names has {name!r}: write a DNS name, without scheme or port."
        elif "." not in name and settings["certbot_server"] == LETS_ENCRYPT:
            yield f"certbot_names has {name!r}: Let's Encrypt signs full names only, as llm.example.org."
        elif name.startswith("*.") and settings["certbot_challenge"] != "dns-01":
            yield f"certbot_names has {name!r}: a wildcard needs certbot_challenge dns-01."
        elif site_names and settings["certbot_challenge"] == "http-01" and name not in site_names:
            yield (
                f"certbot_names has {name!r}, which nginx does not serve, and so cannot show to be yours: "
                "add it to nginx_server_aliases, or set certbot_challenge to dns-01."
            )
    for name in site_names:
        if names and name not in names and f"*.{name.partition('.')[2]}" not in names and not _is_address(name):
            yield f"certbot_names lacks {name!r}, which clients use: add it (nginx_server_name, nginx_server_aliases)."


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _server(settings: dict[str, Any]) -> Iterator[str]:
    server = settings["certbot_server"]
    try:
        url = urlsplit(server)
        good = (
            url.scheme == "https" and bool(url.hostname) and "@" not in url.netloc and not re.search(r"[\s#]", server)
        )
        good = good and (url.port is None or url.port > 0)
    except ValueError:
        good = False
    if not good:
        yield f"certbot_server is {server!r}: write the https:// URL of the ACME server's directory."
    if settings["certbot_staging"] and server != LETS_ENCRYPT:
        yield (
            f"certbot_staging is for Let's Encrypt, and certbot_server is {server}: "
            "set certbot_server to the test server of that authority instead."
        )
    if settings["certbot_ca_bundle"] and not _are_certificates(settings["ca_content"]):
        yield (
            f"certbot_ca_bundle is {settings['certbot_ca_bundle']!r}: there is no file with certificates "
            "(PEM, in UTF-8) there on the controller that you may read, or one of them is damaged."
        )


def _are_certificates(pem: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ValueError, TypeError, ssl.SSLError):
        return False
    return True


def _account(settings: dict[str, Any]) -> Iterator[str]:
    email, key_id, key = (settings[f"certbot_{name}"] for name in ("email", "eab_kid", "eab_hmac_key"))
    if email and not EMAIL.fullmatch(email):
        yield f"certbot_email is {email!r}: write one address, as admin@example.org, or none."
    if bool(key_id) != bool(key):
        missing, given = (
            ("certbot_eab_hmac_key", "certbot_eab_kid") if key_id else ("certbot_eab_kid", "certbot_eab_hmac_key")
        )
        yield f"{missing} is not set, and {given} is: set both, or neither."
    if key_id and not KEY_ID.fullmatch(key_id):
        yield f"certbot_eab_kid is {key_id!r}: write it as the ACME server's operator gave it, without spaces."
    if key and not HMAC_KEY.fullmatch(key):
        yield "certbot_eab_hmac_key has a character that base64url does not have: write it as you were given it."


def _challenge(settings: dict[str, Any]) -> Iterator[str]:
    plugin, credentials = settings["certbot_dns_plugin"], settings["certbot_dns_credentials"]
    if settings["certbot_challenge"] == "http-01":
        if settings["http_port"] not in (0, ACME_PORT):
            yield (
                f"nginx_http_port is {settings['http_port']}, and ACME servers ask at port {ACME_PORT}: "
                f"set it to {ACME_PORT}, or certbot_challenge to dns-01."
            )
        if not PATH.fullmatch(settings["certbot_webroot"]) or ".." in settings["certbot_webroot"].split("/"):
            yield f"certbot_webroot is {settings['certbot_webroot']!r}: write an absolute path, of A-Z a-z 0-9 _ . -."
        return
    if plugin not in CREDENTIALS:
        known = ", ".join(CREDENTIALS)
        yield f"certbot_dns_plugin is {plugin!r}: with certbot_challenge dns-01 set it to one of {known}."
        return
    needed, allowed = CREDENTIALS[plugin]
    if not any(some <= set(credentials) <= some | allowed for some in needed):
        ways = " or ".join(" and ".join(sorted(some)) or "nothing at all" for some in needed)
        more = f" (and perhaps {', '.join(sorted(allowed))})" if allowed else ""
        yield (
            f"certbot_dns_credentials has {', '.join(sorted(credentials)) or 'nothing'}: "
            f"the plugin {plugin} takes {ways}{more}."
        )
    for key, value in credentials.items():
        if not re.fullmatch(r'[^\s"](?:[^\n"]*[^\s"])?', str(value)):
            yield f"certbot_dns_credentials.{key} is empty, or has a quote, a line break or spaces around: correct it."
    if plugin == "rfc2136":
        yield from _rfc2136(credentials)


def _rfc2136(credentials: dict[str, Any]) -> Iterator[str]:
    where = "certbot_dns_credentials.dns_rfc2136"
    server, algorithm = credentials.get("dns_rfc2136_server"), credentials.get("dns_rfc2136_algorithm", "HMAC-SHA256")
    if server and not _is_address(str(server)):
        yield f"{where}_server is {server!r}: write the name server's IP address."
    if str(algorithm).upper() not in ALGORITHMS:
        yield f"{where}_algorithm is {algorithm!r}: use one of {', '.join(sorted(ALGORITHMS))}."
    if not str(credentials.get("dns_rfc2136_port", 53)).isdigit():
        yield f"{where}_port is {credentials['dns_rfc2136_port']!r}: write a number."


def _rest(settings: dict[str, Any]) -> Iterator[str]:
    if not 0 <= settings["certbot_dns_propagation_seconds"] <= 3600:
        yield f"certbot_dns_propagation_seconds is {settings['certbot_dns_propagation_seconds']}: use 0 to 3600."
    if not 1 <= settings["certbot_expiry_warning_days"] <= 29:
        yield (
            f"certbot_expiry_warning_days is {settings['certbot_expiry_warning_days']}: use 1 to 29, "
            "for certbot renews 30 days before the end."
        )
    command = settings["certbot_deploy_hook_command"]
    if not command.strip() or "\n" in command:
        yield "certbot_deploy_hook_command is empty or has several lines: write one line for the shell, as `true`."
