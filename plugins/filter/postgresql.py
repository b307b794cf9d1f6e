# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Filters of the role postgresql."""

from __future__ import annotations

import secrets
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils import _postgresql


def scram_verifier(password: str) -> str:
    return _postgresql.scram_verifier(str(password), secrets.token_bytes(16))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "postgresql_host_problems": _postgresql.host_problems,
            "postgresql_problems": _postgresql.problems,
            "postgresql_tuning": _postgresql.tuning,
            "scram_verifier": scram_verifier,
        }
