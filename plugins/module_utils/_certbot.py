# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: when certbot has to ask for a certificate, and why it got none.

No Ansible import and no I/O here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from ansible_collections.llmfleet.serving.plugins.module_utils._certificate import alternative_names, validity

try:
    from cryptography import x509
except ImportError:  # a bare host: certbot brings it
    x509 = None

# certbot's name for what a certificate was asked for with, and ours.
VARIABLES = {
    "server": "certbot_server",
    "authenticator": "certbot_challenge or certbot_dns_plugin",
    "webroot_path": "certbot_webroot",
    "renew_hook": "certbot's deploy hook",
}
PARTS = ("cert", "chain", "fullchain", "privkey")
LOST_ACCOUNT = "urn:ietf:params:acme:error:accountDoesNotExist"
BUSY = "Another instance of Certbot is already running"


@dataclass(frozen=True)
class Certificate:
    names: frozenset[str]
    begin: datetime
    end: datetime


def read_certificate(pem: bytes) -> Certificate:
    """Raises ValueError where it is none, or cannot be read without python3-cryptography."""
    if x509 is None:
        raise ValueError("python3-cryptography, which reads it, is missing")
    leaf = x509.load_pem_x509_certificate(pem)
    names = alternative_names(leaf)
    if names is None:
        raise ValueError("it is for no DNS name")
    return Certificate(frozenset(names.get_values_for_type(x509.DNSName)), *validity(leaf))


def parse_renewal(text: str) -> dict[str, str]:
    """What certbot's renewal/<name>.conf says in [renewalparams]. A list's last comma is left out."""
    section = re.search(r"^\[renewalparams\]\n((?:(?!\[).*\n?)*)", text, re.MULTILINE)
    pairs = re.findall(r"^(\w+) *= *(.*?),? *$", section[1] if section else "", re.MULTILINE)
    return dict(pairs)


def may_need_more(text: str) -> bool:
    """Whether another certificate's renewal may do what confinement forbids: plugins that write below /etc, hooks."""
    asked = {key: value for key, value in parse_renewal(text).items() if value != "None"}
    plugin = asked.get("authenticator", "")
    return (
        not (plugin == "webroot" or plugin.startswith("dns-"))
        or asked.get("installer", plugin) != plugin
        or any(hook in asked for hook in ("pre_hook", "post_hook", "renew_hook"))
    )


def account_folder(server: str, account: str) -> str:
    """Where certbot keeps the account, below /etc/letsencrypt."""
    url = urlsplit(server)
    return f"accounts/{url.netloc}{url.path}/{account}"


def time_to_mend(certificate: Certificate, days: int) -> timedelta:
    """The time left from which on the timer has failed to renew it: fewer for certificates that last but weeks."""
    return min(timedelta(days=days), (certificate.end - certificate.begin) / 4)


def why_to_ask(
    asked: Mapping[str, str],
    wanted: Mapping[str, str],
    *,
    certificate: Certificate,
    names: Iterable[str],
    days: int,
    now: datetime,
) -> str:
    """Why another certificate is needed, or nothing. ``asked`` is what the present one was asked for with."""
    for key in sorted({*wanted, *(key for key in asked if key.endswith("_propagation_seconds"))}):
        if asked.get(key, "") != wanted.get(key, ""):
            variable = "certbot_dns_propagation_seconds" if key.endswith("_propagation_seconds") else VARIABLES[key]
            return f"{variable} has changed"
    if certificate.names != {name.lower() for name in names}:
        return f"it is for {', '.join(sorted(certificate.names))}"
    if certificate.end - now < time_to_mend(certificate, days):
        return f"it expires on {certificate.end:%Y-%m-%d} and has not been renewed"
    return ""


def directory_problem(answer: object, server: str, eab: bool) -> str:
    """What is wrong with an ACME server's directory."""
    if not isinstance(answer, dict) or "newOrder" not in answer:
        return f"certbot_server is {server}, and what answers there is no ACME directory: correct the URL."
    meta = answer.get("meta")
    if isinstance(meta, dict) and meta.get("externalAccountRequired") and not eab:
        return (
            f"{server} wants an account that its operator has made: set certbot_eab_kid and certbot_eab_hmac_key "
            "to what they gave you."
        )
    return ""


def unreachable(server: str, error: object) -> str:
    return (
        f"certbot_server is {server}, and it cannot be reached from this host ({error}): "
        "correct the URL, open the way to it, or try again later. Nothing has changed."
    )


def untrusted(server: str, error: object) -> str:
    return (
        f"certbot_server is {server}, and its certificate is not trusted ({error}): "
        "set certbot_ca_bundle to a file with the authority that signed it."
    )


CHALLENGE = re.compile(r"^ *Domain: +(?P<name>\S+)\n *Type: +(?P<type>\S+)\n *Detail: +(?P<detail>.+)$", re.MULTILINE)
NETWORK = (
    r"Connection refused|Connection reset|timed out|Name or service not known|Temporary failure in name resolution"
    r"|No route to host|Network is unreachable|Remote end closed|RemoteDisconnected|Max retries exceeded|getaddrinfo"
)
NOISE = re.compile(
    r"^(Saving debug log|Ask for help|See the logfile|Requesting a cert|Renewing an existing|Account registered"
    r"|An unexpected error occurred|Some challenges have failed|Hint:|Waiting \d+ seconds)|^\s*$"
)


def _challenge_refused(output: str, server: str, challenge: str) -> str:
    seen = " ".join(f"{match['name']}: {match['detail']} ({match['type']})." for match in CHALLENGE.finditer(output))
    remedy = (
        "the names in certbot_names must lead to this host, by IPv4 and by IPv6 where they have both, "
        "and its port 80 must be open to the ACME server; or set certbot_challenge to dns-01"
        if challenge == "http-01"
        else "certbot_dns_credentials must be for the zone of these names; "
        "where the record was not seen yet, raise certbot_dns_propagation_seconds"
    )
    return f"{server} could not make sure that the names are yours. {seen} Remedy: {remedy}."


# What certbot or the server says, and what to make of it. The first that is found counts.
REFUSALS = {
    r"CERTIFICATE_VERIFY_FAILED|SSLError": untrusted,
    r"(?i)external account|the field 'kid'": (
        "{server} refuses the account: {said} Correct certbot_eab_kid and certbot_eab_hmac_key."
    ),
    r"email|contact": "{server} refuses the account: {said} Correct certbot_email.",
    r"rateLimited|too many": (
        "{server} has given too many certificates: {said} Wait, and try out with certbot_staging: true."
    ),
    BUSY: "certbot is at work on this host already: see `systemctl status certbot.service`, and try again.",
    NETWORK: unreachable,
}


def explain(output: str, server: str, challenge: str) -> str:
    """Why certbot got no certificate, with the variable to change."""
    if CHALLENGE.search(output):
        return _challenge_refused(output, server, challenge)
    said = " ".join(line.strip() for line in output.splitlines() if not NOISE.search(line))
    for pattern, message in REFUSALS.items():
        if re.search(pattern, output):
            return message(server, said) if callable(message) else message.format(server=server, said=said)
    if challenge == "dns-01":
        return (
            f"certbot could not write the record of the challenge: {said} "
            "See certbot_dns_plugin and certbot_dns_credentials."
        )
    return f"certbot got no certificate from {server} (certbot_server): {said}"
