# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations


class ModuleDocFragment:
    """What every module says of itself.

    ``llmfleet.serving.attributes`` goes with one more section: ``.info`` for a module that only looks,
    ``.state`` for one that changes a host and can say beforehand how; or with ``support`` set in the module itself.
    """

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and tell truthfully what it would change, without changing it.
  diff_mode:
    description: Returns what changed, or would change in C(check_mode), when in diff mode.
  idempotent:
    description: A second run with the same options changes nothing, if nothing else did in between.
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    support: full
    details: Nothing is ever changed.
  diff_mode:
    support: N/A
    details: Nothing is ever changed.
  idempotent:
    support: full
    details: Nothing is ever changed.
"""

    STATE = r"""
options: {}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
"""
