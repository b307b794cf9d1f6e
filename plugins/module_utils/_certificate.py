# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what a certificate says, read by any python3-cryptography.

No Ansible import and no I/O here. Callers have found python3-cryptography to be there.
"""

from __future__ import annotations

from datetime import datetime, timezone

try:
    from cryptography import x509
except ImportError:
    x509 = None


def validity(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    """Its begin and its end."""
    # Debian 12 has none of the names in UTC.
    begin, end = (
        getattr(certificate, f"{name}_utc", None) or getattr(certificate, name).replace(tzinfo=timezone.utc)
        for name in ("not_valid_before", "not_valid_after")
    )
    return begin, end


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
