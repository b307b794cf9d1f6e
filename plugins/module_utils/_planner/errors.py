# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the planner says when it cannot plan."""

from __future__ import annotations


class PlanError(ValueError):
    """What is asked for cannot be planned; the message names the variable or key, the value and the remedy."""


class UnknownArchitecture(PlanError):  # noqa: N818 (it reads as what it says)
    """The model's architecture is not in the planner's table."""
