# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: the GPUs of a host. ``look`` puts together what ``pci`` and ``nvml`` find."""
