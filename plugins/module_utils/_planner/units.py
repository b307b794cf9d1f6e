# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: bytes in code, GiB on the screen."""

from __future__ import annotations

MIB = 1 << 20
GIB = 1 << 30


def gib(amount: float) -> str:
    return f"{amount / GIB:.2f} GiB"
