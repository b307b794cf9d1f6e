# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what nginx_host_info decides by. No Ansible import and no I/O here."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._certificate import alternative_names, validity

try:
    from cryptography import exceptions, x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
except ImportError:  # a bare host: the role nginx installs it
    x509 = None

RENEW_BEFORE = timedelta(days=30)
DOWN = re.compile(r"^\s*server\s+(\S+)\s+down;", re.MULTILINE)


def drained(site: str) -> list[str]:
    """The servers of upstreams that a configuration of nginx has marked ``down``, each once."""
    return list(dict.fromkeys(DOWN.findall(site)))


def takes_requests(title: str) -> bool:
    """Whether this is the command line of a worker. After a reload an old one only ends what it has."""
    return "worker process" in title and "shutting down" not in title


def certificate_problem(ca: bytes, key: bytes, certificate: bytes, subject_alt_names: list[str], now: datetime) -> str:
    """Why another certificate is needed, or nothing."""
    if x509 is None:
        return "python3-cryptography, which reads it, is missing"
    try:
        issuer, leaf = x509.load_pem_x509_certificate(ca), x509.load_pem_x509_certificate(certificate)
        private_key = serialization.load_pem_private_key(key, None)
    except (TypeError, ValueError) as error:  # TypeError: the key is encrypted
        return f"it cannot be read ({error})"
    _, end = validity(leaf)
    problems = {
        "another CA signed it": not _signed_by(leaf, issuer),
        f"it expires on {end:%Y-%m-%d}": end - RENEW_BEFORE < now,
        "nginx_server_name or nginx_server_aliases has changed": _names(leaf) != set(subject_alt_names),
        "it does not belong to the key": _encoded(private_key.public_key()) != _encoded(leaf.public_key()),
    }
    return next((why for why, found in problems.items() if found), "")


def _signed_by(leaf: x509.Certificate, issuer: x509.Certificate) -> bool:
    public_key, digest = issuer.public_key(), leaf.signature_hash_algorithm
    # The role makes an EC key; a CA of the operator's own may have an RSA key.
    scheme = (padding.PKCS1v15(), digest) if isinstance(public_key, rsa.RSAPublicKey) else (ec.ECDSA(digest),)
    try:
        public_key.verify(leaf.signature, leaf.tbs_certificate_bytes, *scheme)
    except exceptions.InvalidSignature:
        return False
    return True


def _names(leaf: x509.Certificate) -> set[str]:
    names = alternative_names(leaf)
    if names is None:
        return set()
    addresses = {f"IP:{address}" for address in names.get_values_for_type(x509.IPAddress)}
    return addresses | {f"DNS:{name}" for name in names.get_values_for_type(x509.DNSName)}


def _encoded(public_key: Any) -> bytes:
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
