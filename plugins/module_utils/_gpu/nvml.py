# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: NVIDIA's cards as NVML shows them. No Ansible import.

NVML is libnvidia-ml.so.1, a part of the driver. It is spoken to by NVIDIA's own bindings, nvidia-ml-py, a single file
(pynvml.py) that needs nothing but Python.
"""

from __future__ import annotations

import base64
import importlib
import importlib.abc
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from .gpu import Gpu, Memory, Mig, MigInstance, Process
from .pci import Device

LOST = (
    "it has fallen off the bus. Look for Xid in the kernel's log (journalctl --dmesg --grep=Xid), and switch the host "
    "off and on. If it comes back, check the card's seat, its power cables and its temperature."
)
# By NVML's error: why a card cannot be used, and what to do.
REMEDIES = {
    "NVML_ERROR_GPU_IS_LOST": LOST,
    # What newer drivers answer instead, when they are asked for the handle of a lost card.
    "NVML_ERROR_UNKNOWN": f"most likely {LOST}",
    "NVML_ERROR_RESET_REQUIRED": "end what runs on it and reset it (nvidia-smi --gpu-reset), or reboot the host.",
    "NVML_ERROR_INSUFFICIENT_POWER": "connect all of the card's power cables.",
    "NVML_ERROR_NO_PERMISSION": "look again as root (become: true).",
}
ELSE = "look for NVRM and Xid in the kernel's log (journalctl --dmesg)."


class _Source(importlib.abc.InspectLoader):
    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source


def packed(source: bytes) -> str:
    """The text of pynvml.py as it is handed to the host, and to load."""
    return base64.b64encode(zlib.compress(source, 9)).decode()


def load(bindings: str | None) -> ModuleType | None:
    """The module pynvml: the one handed over, else the host's own, else None."""
    if bindings:
        source = zlib.decompress(base64.b64decode(bindings)).decode()
        spec = importlib.util.spec_from_loader("pynvml", _Source(source))
        module = importlib.util.module_from_spec(spec)
        sys.modules["pynvml"] = module  # it looks itself up there
        spec.loader.exec_module(module)
        return module
    try:
        module = importlib.import_module("pynvml")
    except ImportError:
        return None
    # Other packages have had this name, too, and so have versions of before 2022.
    return module if hasattr(module, "nvmlMemory_v2") else None


@dataclass(frozen=True)
class Session:
    """NVML between its init and its shutdown."""

    nvml: Any

    def __enter__(self) -> Session:
        self.nvml.nvmlInit()
        return self

    def __exit__(self, *error: object) -> None:
        self.ask("nvmlShutdown")

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer, or None where this card or this driver has none. Raises where the card has gone."""
        try:
            return getattr(self.nvml, question)(*arguments)
        except (AttributeError, UnicodeDecodeError):  # bindings of another version; a name that is no text
            return None
        except self.nvml.NVMLError as error:
            if error.value in (self.nvml.NVML_ERROR_GPU_IS_LOST, self.nvml.NVML_ERROR_RESET_REQUIRED):
                raise
            return None

    def driver_version(self) -> str | None:
        return self.ask("nvmlSystemGetDriverVersion")

    def cuda_version(self) -> str | None:
        """The newest CUDA that the driver can run, as 13.0."""
        version = self.ask("nvmlSystemGetCudaDriverVersion_v2")
        return f"{version // 1000}.{version % 1000 // 10}" if version else None


def init_problem(nvml: Any, error: Any, loaded: str | None, cards: bool) -> str | None:
    """Why NVML does not start, with the remedy. ``loaded`` is the version of the kernel module, if it is loaded.

    None where nothing is amiss: no driver, of which each card tells, or its library on a host without its cards.
    """
    texts = {
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            f"The kernel runs version {loaded} of NVIDIA's driver, and another one is installed, as after an upgrade: "
            "reboot the host."
        ),
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
            f"NVIDIA's kernel module {loaded} is loaded, but libnvidia-ml.so.1 is not to be found: "
            f"install the driver's libraries of version {loaded} as well."
        ),
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: (
            "NVIDIA's libraries are installed, but its kernel module is not loaded. `modprobe nvidia` says why: mostly "
            "it was not built for this kernel (`dkms status`), or Secure Boot refuses it (`mokutil --sb-state`)."
        ),
        nvml.NVML_ERROR_NO_PERMISSION: (
            "NVIDIA's driver does not let this user in: look again as root (become: true)."
        ),
    }
    no_driver = error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND and loaded is None
    no_card = error.value == nvml.NVML_ERROR_DRIVER_NOT_LOADED and not cards
    if no_driver or no_card:
        return None
    return texts.get(error.value, f"NVIDIA's driver does not answer ({error}): {ELSE}")


def address(bus_id: str) -> str:
    """NVML's ``00000000:0A:00.0`` as the kernel writes it."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


@dataclass(frozen=True)
class Host:
    """What NVML does not know of the host: cards on the PCI bus with their names, its memory, the unit of a process."""

    slots: Sequence[Device]
    name_of: Mapping[str, str]
    memory: Memory
    unit_of: Callable[[int], str | None]


def cards(session: Session, host: Host) -> list[Gpu]:
    """NVIDIA's cards in NVML's order."""
    nvml = session.nvml
    found: dict[int, Gpu] = {}
    handles: dict[int, Any] = {}
    gone: dict[int, str] = {}
    by_address = {device.address: device for device in host.slots}
    for index in range(session.ask("nvmlDeviceGetCount") or 0):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            place = address(nvml.nvmlDeviceGetPciInfo(handle).busId)
        except nvml.NVMLError as error:
            gone[index] = _why(nvml, error)  # NVML crashes when it is asked about a card without its handle
            continue
        device = by_address.get(place)
        known = Gpu(
            index, None, host.name_of.get(place, "NVIDIA GPU"), "nvidia", place, device.numa_node if device else None
        )
        try:
            found[index] = _card(session, handle, known, host)
            handles[index] = handle
        except nvml.NVMLError as error:
            found[index] = _broken(known, _why(nvml, error))
    # NVML says nothing of a card without a handle, not even where it is. The bus does, if no other card is missing.
    shown = {gpu.pci_bus_id for gpu in found.values()}
    missing = [device for device in host.slots if device.driver == "nvidia" and device.address not in shown]
    for number, index in enumerate(gone):
        device = missing[number] if len(missing) == len(gone) else None
        name, node = (host.name_of[device.address], device.numa_node) if device else ("NVIDIA GPU", None)
        known = Gpu(index, None, name, "nvidia", device.address if device else None, node)
        found[index] = _broken(known, gone[index])
    return [
        replace(found[index], nvlink=_peers(nvml, index, handles)) if index in handles else found[index]
        for index in sorted(found)
    ]


def _why(nvml: Any, error: Any) -> str:
    remedy = next((text for name, text in REMEDIES.items() if getattr(nvml, name) == error.value), ELSE)
    return f"does not answer ({error}): {remedy}"


def _broken(known: Gpu, why: str) -> Gpu:
    return replace(known, problem=f"GPU {known.index}, {known.name} ({known.pci_bus_id or 'place unknown'}), {why}")


def _card(session: Session, handle: Any, known: Gpu, host: Host) -> Gpu:
    capability = session.ask("nvmlDeviceGetCudaComputeCapability", handle)
    mig = _mig(session, handle)
    memory, error = _memory(session, handle)
    # A GPU without memory of its own (GB10, Jetson) has no answer. Nor may one with MIG, whose instances have it.
    whole = not (mig and mig.enabled)
    unified = whole and error is not None and error.value == session.nvml.NVML_ERROR_NOT_SUPPORTED
    gpu = replace(
        known,
        name=session.ask("nvmlDeviceGetName", handle) or known.name,
        uuid=session.ask("nvmlDeviceGetUUID", handle),
        compute_capability="{}.{}".format(*capability) if capability else None,
        mig=mig,
        processes=_processes(session, handle, host.unit_of),
        memory_total_bytes=host.memory.total_bytes if unified else memory.total_bytes,
        memory_free_bytes=host.memory.free_bytes if unified else memory.free_bytes,
        memory_reserved_bytes=memory.reserved_bytes,
        memory_unified=unified,
    )
    if mig and mig.enabled and not mig.instances:
        return _broken(
            gpu,
            "is in MIG mode and has no instance, so nothing can run on it: make instances (nvidia-smi mig -cgi), "
            f"or switch MIG off (nvidia-smi -i {gpu.pci_bus_id} -mig 0).",
        )
    if whole and gpu.memory_total_bytes is None:
        return _broken(gpu, f"does not tell its memory ({error}): {ELSE}")
    return gpu


def _memory(session: Session, handle: Any) -> tuple[Memory, Any]:
    """What CUDA has of a card or of an instance: its total is NVML's without what the driver reserves."""
    now = session.ask("nvmlDeviceGetMemoryInfo", handle, session.nvml.nvmlMemory_v2)
    if now:
        return Memory(now.total - now.reserved, now.free, now.reserved), None
    try:
        # Drivers older than branch 510 have only this, and what they reserve is in none of its figures.
        old = session.nvml.nvmlDeviceGetMemoryInfo(handle)
    except session.nvml.NVMLError as error:
        return Memory(), error
    return Memory(old.total, old.free), None


def _mig(session: Session, handle: Any) -> Mig | None:
    mode = session.ask("nvmlDeviceGetMigMode", handle)
    if mode is None:
        return None
    if mode[0] != session.nvml.NVML_DEVICE_MIG_ENABLE:
        return Mig(enabled=False)
    slots = range(session.ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
    made = (session.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot) for slot in slots)
    return Mig(enabled=True, instances=tuple(_instance(session, instance) for instance in made if instance is not None))


def _instance(session: Session, handle: Any) -> MigInstance:
    memory, _ = _memory(session, handle)
    profile = re.search(r" MIG (\S+)$", session.ask("nvmlDeviceGetName", handle) or "")
    return MigInstance(
        uuid=session.ask("nvmlDeviceGetUUID", handle),
        profile=profile[1] if profile else None,
        memory_total_bytes=memory.total_bytes,
        memory_free_bytes=memory.free_bytes,
    )


def _processes(session: Session, handle: Any, unit_of: Callable[[int], str | None]) -> tuple[Process, ...]:
    """Those that compute or draw. One that does both is listed once, as one that computes."""
    found: dict[int, Process] = {}
    for kind in ("Graphics", "Compute"):
        for process in session.ask(f"nvmlDeviceGet{kind}RunningProcesses_v3", handle) or ():
            name = session.ask("nvmlSystemGetProcessName", process.pid)
            found[process.pid] = Process(
                process.pid, _program(name), unit_of(process.pid), kind.lower(), process.usedGpuMemory
            )
    return tuple(found[pid] for pid in sorted(found))


def _program(title: str | None) -> str | None:
    """A process's title without arguments, which browsers write into it, and which may be secrets."""
    return re.split(r"\s+-", title)[0] if title else None


def _peers(nvml: Any, index: int, handles: Mapping[int, Any]) -> tuple[int, ...]:
    """The cards that this one reaches over NVLink, directly or through switches: the question that vLLM asks."""
    return tuple(peer for peer in handles if peer != index and _linked(nvml, handles[index], handles[peer]))


def _linked(nvml: Any, one: Any, other: Any) -> bool:
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:
        return False
    return status == nvml.NVML_P2P_STATUS_OK
