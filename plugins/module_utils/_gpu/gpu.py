# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what is told of a GPU, as the module gpu_info describes it. No Ansible import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """What a program can have of a GPU's memory at most, what of it is free, and what the driver keeps beside it."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    reserved_bytes: int | None = None


@dataclass(frozen=True)
class Process:
    pid: int
    name: str | None
    unit: str | None
    kind: str
    memory_bytes: int | None


@dataclass(frozen=True)
class MigInstance:
    uuid: str
    profile: str | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None


@dataclass(frozen=True)
class Mig:
    enabled: bool
    instances: tuple[MigInstance, ...] = ()


@dataclass(frozen=True)
class Gpu:
    index: int | None
    uuid: str | None
    name: str
    vendor: str
    pci_bus_id: str | None
    numa_node: int | None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_unified: bool = False
    compute_capability: str | None = None
    mig: Mig | None = None
    processes: tuple[Process, ...] = ()
    nvlink: tuple[int, ...] = ()
    problem: str | None = None
