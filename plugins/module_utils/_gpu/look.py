# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: everything that a host tells of its GPUs. No Ansible import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import nvml, pci
from .gpu import Gpu

NO_BINDINGS = (
    "NVIDIA's driver cannot be asked without nvidia-ml-py: install it on the controller (it is in the collection's "
    "requirements.txt), or on the host."
)
NOT_STARTED = (
    "NVIDIA's driver has taken it and does not show it, so it has not started. "
    "Look for NVRM in the kernel's log (journalctl --dmesg --grep=NVRM)."
)


@dataclass
class Nvidia:
    """What NVML says, and why it says nothing."""

    gpus: list[Gpu] = field(default_factory=list)
    driver_version: str | None = None
    cuda_version: str | None = None
    problem: str | None = None


def look(root: Path = Path("/"), bindings: str | None = None) -> dict[str, Any]:
    """All GPUs of the host whose files lie under ``root``. ``bindings`` is pynvml.py, packed."""
    slots = pci.devices(root)
    name_of = pci.names(root, slots)
    nvidia = _nvidia(root, [device for device in slots if device.vendor == "nvidia"], name_of, bindings)
    shown = {gpu.pci_bus_id for gpu in nvidia.gpus}
    silent = "NVIDIA's driver has taken it and cannot be asked." if nvidia.problem else NOT_STARTED
    hidden = [
        pci.without_nvml(device, name_of[device.address], silent)
        for device in slots
        if device.vendor == "nvidia" and device.address not in shown
    ]
    unified = [
        f"GPU {gpu.index}, {gpu.name}, has no memory of its own: the figures are those of the host's memory, "
        "of which everything else on the host needs a part."
        for gpu in nvidia.gpus
        if gpu.memory_unified
    ]
    return {
        "gpus": [asdict(gpu) for gpu in [*nvidia.gpus, *hidden, *pci.others(slots, name_of)]],
        "driver_version": nvidia.driver_version,
        "cuda_version": nvidia.cuda_version,
        "warnings": ([nvidia.problem] if nvidia.problem else []) + unified,
    }


def _nvidia(root: Path, slots: list[pci.Device], name_of: dict[str, str], bindings: str | None) -> Nvidia:
    loaded = pci.content(root / "sys/module/nvidia/version")
    bound = nvml.load(bindings)
    if bound is None:
        return Nvidia(problem=NO_BINDINGS if slots or loaded else None)
    host = nvml.Host(slots, name_of, pci.host_memory(root), partial(pci.unit, root))
    try:
        with nvml.Session(bound) as session:
            return Nvidia(
                nvml.cards(session, host),
                session.driver_version(),
                session.cuda_version(),
            )
    except bound.NVMLError as error:
        return Nvidia(problem=nvml.init_problem(bound, error, loaded, bool(slots)))
