# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: GPUs as the kernel shows them in /sys and /proc. No Ansible import."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .gpu import Gpu, Memory

VENDORS = {"10de": "nvidia", "1002": "amd", "8086": "intel"}
NAMES = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}
# Classes of the PCI Code and ID Assignment Specification: VGA, 3D and other display controllers.
DISPLAY = {"0300", "0302", "0380"}
# AMD's Instinct since MI300 say that they are processing accelerators. Of Intel that would be an NPU.
ACCELERATORS = {("amd", "1200")}
ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
IDS = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids")


@dataclass(frozen=True)
class Device:
    """A GPU in a slot. ``driver`` is the kernel module that has taken it."""

    address: str
    vendor: str
    vendor_id: str
    device_id: str
    driver: str | None
    numa_node: int | None
    folder: Path


def content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def number(path: Path) -> int | None:
    text = content(path) or ""
    return int(text) if re.fullmatch(r"\d+", text) else None


def order(address: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in re.split("[:.]", address))


def devices(root: Path) -> list[Device]:
    """All GPUs in the order of their addresses, which is NVML's, too. Boards' own VGA chips and the like are none."""
    folder = root / "sys/bus/pci/devices"
    try:
        addresses = [name for name in os.listdir(folder) if ADDRESS.fullmatch(name)]
    except OSError:
        return []
    found = (_device(folder / address) for address in sorted(addresses, key=order))
    return [device for device in found if device]


def _device(folder: Path) -> Device | None:
    ids = {name: (content(folder / name) or "")[2:] for name in ("vendor", "device", "class")}
    vendor = VENDORS.get(ids["vendor"])
    kind = ids["class"][:4]
    if not vendor or not (kind in DISPLAY or (vendor, kind) in ACCELERATORS):
        return None
    if (folder / "physfn").exists():  # a slice of a card, made for a virtual machine
        return None
    driver = os.path.basename(os.readlink(folder / "driver")) if (folder / "driver").is_symlink() else None
    # -1 on a host without NUMA is no number here, and becomes None.
    return Device(folder.name, vendor, ids["vendor"], ids["device"], driver, number(folder / "numa_node"), folder)


def names(root: Path, wanted: Iterable[Device]) -> dict[str, str]:
    """A name for each address: from the host's list of PCI ids, else of the ids themselves."""
    wanted = list(wanted)
    lists = (content(root / path) for path in IDS) if wanted else ()
    known = dict(_known(next((text for text in lists if text), ""), {device.vendor_id for device in wanted}))

    def model(device: Device) -> str:
        return known.get((device.vendor_id, device.device_id)) or f"{device.vendor_id}:{device.device_id}"

    return {device.address: f"{NAMES[device.vendor]} {model(device)}" for device in wanted}


def _known(text: str, vendors: set[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """Names by vendor and device of a pci.ids. ``AD102 [GeForce RTX 4090]`` goes by what stands in brackets."""
    vendor = ""
    for line in text.splitlines():
        if re.match(r"[0-9a-f]{4}\s", line):
            vendor = line[:4]
        elif vendor in vendors and (match := re.match(r"\t([0-9a-f]{4})\s+(.+)", line)):
            marketed = re.search(r"\[(.+)\]$", match[2])
            yield (vendor, match[1]), marketed[1] if marketed else match[2]


def undriven(device: Device, name: str, reason: str) -> Gpu:
    return Gpu(
        index=None,
        uuid=None,
        name=name,
        vendor=device.vendor,
        pci_bus_id=device.address,
        numa_node=device.numa_node,
        problem=reason,
    )


def without_nvml(device: Device, name: str, driven: str) -> Gpu:
    """An NVIDIA card that NVML does not show. ``driven`` tells why, where NVIDIA's driver has taken it."""
    if device.driver == "nvidia":
        return undriven(device, name, f"{name} ({device.address}): {driven}")
    if device.driver:
        return undriven(
            device, name, f"{name} ({device.address}) is driven by {device.driver}, not by NVIDIA's driver."
        )
    return undriven(device, name, f"No driver has taken {name} ({device.address}): install NVIDIA's.")


def others(found: Iterable[Device], name_of: dict[str, str]) -> list[Gpu]:
    """The cards that are not NVIDIA's."""
    gpus: list[Gpu] = []
    for device in found:
        name = name_of[device.address]
        if device.vendor == "amd":
            gpus.append(_amd(device, name, sum(gpu.index is not None for gpu in gpus)))
        elif device.vendor != "nvidia":
            gpus.append(
                undriven(device, name, f"{name} ({device.address}): only NVIDIA's and AMD's cards are known here.")
            )
    return gpus


def _amd(device: Device, name: str, index: int) -> Gpu:
    name = content(device.folder / "product_name") or name
    memory = amd_memory(device.folder)
    if memory.total_bytes is None:
        return undriven(
            device,
            name,
            f"{name} ({device.address}) does not tell its memory: it needs the driver amdgpu, and has "
            f"{device.driver or 'none'}.",
        )
    unique = content(device.folder / "unique_id")
    return Gpu(
        index=index,
        uuid=f"GPU-{unique}" if unique else None,
        name=name,
        vendor="amd",
        pci_bus_id=device.address,
        numa_node=device.numa_node,
        memory_total_bytes=memory.total_bytes,
        memory_free_bytes=memory.free_bytes,
    )


def amd_memory(folder: Path) -> Memory:
    """What amdgpu tells of a card: Documentation/gpu/amdgpu/driver-misc.rst of the kernel, "GPU Memory Usage"."""
    total, used = (number(folder / f"mem_info_vram_{name}") for name in ("total", "used"))
    return Memory(total, None if total is None or used is None else max(total - used, 0))


def host_memory(root: Path) -> Memory:
    """The host's own memory, which is that of a GPU without one of its own."""
    text = content(root / "proc/meminfo") or ""
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return Memory(sizes.get("MemTotal"), sizes.get("MemAvailable"))


def unit(root: Path, pid: int) -> str | None:
    """The systemd unit that a process belongs to."""
    match = re.search(r"/([^/\n]+\.service)", content(root / f"proc/{pid}/cgroup") or "")
    return match[1] if match else None
