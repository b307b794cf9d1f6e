# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""gpu_info run as a module: NVIDIA's own bindings speak to a library that plays cards, and /sys is a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
import yaml
from ansible_collections.llmfleet.serving.plugins.action import gpu_info as action
from ansible_collections.llmfleet.serving.plugins.module_utils._gpu import look, nvml, pci
from ansible_collections.llmfleet.serving.plugins.modules import gpu_info

ROOT = Path(__file__).parents[2]
MIB = 2**20
Look = Callable[..., dict[str, Any]]

MODULE = """\
import os
from pathlib import Path
from ansible_collections.llmfleet.serving.plugins.modules import gpu_info
gpu_info.ROOT = Path(os.environ["HOST"])
gpu_info.main()
"""
DRIVER = "driver=580.159.04\ncuda=13000\n"
PCI_IDS = """\
# A comment
0a89  BREA Technologies Inc
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t744c  Navi 31 [Radeon RX 7900 XT/7900 XTX/7900 GRE/7900M]
\t2684  not that one
10de  NVIDIA Corporation
\t2204  GA102 [GeForce RTX 3090]
\t2684  AD102 [GeForce RTX 4090]
\t\t1043 88e2  TUF Gaming
\t2e12  GB10
8086  Intel Corporation
C 03  Display controller
"""


def card_text(name: str, place: str, *more: str, number: int = 1, total: int = 24564, capability: str = "8.9") -> str:
    """A card for the library: 24 GB, of which the driver reserves 400 MiB and a little, with nothing on it."""
    reserved = 400 * MIB + 4096
    facts = {
        "uuid": f"GPU-00000000-0000-0000-0000-00000000000{number}",
        "name": f"NVIDIA {name}",
        "bus": f"0000{place}",
        "capability": capability,
        "total": total * MIB,
        "reserved": reserved,
        "free": total * MIB - reserved - MIB,
    }
    facts.update(fact.split("=", 1) for fact in more if fact.split("=", 1)[0] in facts)
    rest = [fact for fact in more if fact.split("=", 1)[0] not in facts]
    return "\n".join(["[gpu]", *(f"{key}={value}" for key, value in facts.items()), *rest, ""])


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the library and returns its folder."""
    if not shutil.which("cc"):
        pytest.fail("no C compiler: tests/bootstrap.sh installs gcc and libc6-dev")

    def run(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("nvml")
        command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
        source = ROOT / "tests/nvml/fake_nvml.c"
        subprocess.run([*command, "-o", folder / "libnvidia-ml.so.1", source], check=True)
        return folder

    return run


@pytest.fixture(scope="session")
def library(build: Callable[..., Path]) -> Path:
    return build()


@pytest.fixture(scope="session")
def no_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is no library, in the way of one that this machine may have."""
    folder = tmp_path_factory.mktemp("no-nvml")
    (folder / "libnvidia-ml.so.1").touch()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def look_at(tmp_path: Path, root: Path, no_library: Path) -> Look:
    """Runs the module on a host with this library, whose cards are ``cards``."""

    def run(
        library: Path = no_library, cards: str = "", *, bindings: str | None = None, **environment: str
    ) -> dict[str, Any]:
        (tmp_path / "cards").write_text(cards, encoding="latin-1")
        done = subprocess.run(
            [sys.executable, "-c", MODULE],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {"bindings": bindings}}),
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(library),
                "FAKE_NVML": str(tmp_path / "cards"),
                "HOST": str(root),
                "PYTHONPATH": os.pathsep.join(
                    [*filter(None, [environment.pop("path", "")]), str(ROOT / "collections")]
                ),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        answer = json.loads(done.stdout)
        assert answer["changed"] is False
        if "warnings" in answer:  # as Ansible writes them to the controller
            answer["warnings"] = [warning["event"]["msg"] for warning in answer["warnings"]]
        return answer

    return run


def slot(  # noqa: PLR0917 - as lspci lists them
    root: Path, place: str, ids: str, kind: str = "0300", driver: str | None = None, node: int = -1, **files: object
) -> Path:
    """A card in a slot."""
    vendor, _, device = ids.partition(":")
    folder = root / "sys/bus/pci/devices" / place
    folder.mkdir(parents=True)
    files = {"vendor": f"0x{vendor}", "device": f"0x{device}", "class": f"0x{kind}00", "numa_node": node, **files}
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    if driver:
        (folder / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- NVIDIA's driver ------------------------------------------------------------------------------------------


def test_one_rtx_4090(look_at: Look, library: Path, root: Path) -> None:
    """Everything that is told of a card."""
    slot(root, "0000:01:00.0", "10de:2684", driver="nvidia", node=0)
    found = look_at(library, DRIVER + card_text("GeForce RTX 4090", "0000:01:00.0"))
    assert "warnings" not in found
    assert (found["driver_version"], found["cuda_version"]) == ("580.159.04", "13.0")
    reserved = 400 * MIB + 4096
    assert found["gpus"] == [
        {
            "index": 0,
            "uuid": "GPU-00000000-0000-0000-0000-000000000001",
            "name": "NVIDIA GeForce RTX 4090",
            "vendor": "nvidia",
            "pci_bus_id": "0000:01:00.0",
            "numa_node": 0,
            "memory_total_bytes": 24564 * MIB - reserved,
            "memory_free_bytes": 24563 * MIB - reserved,
            "memory_reserved_bytes": reserved,
            "memory_unified": False,
            "compute_capability": "8.9",
            "mig": None,
            "processes": [],
            "nvlink": [],
            "problem": None,
        }
    ]


def test_total_is_what_cuda_says(look_at: Look, library: Path) -> None:
    """Measured on an H200: NVML said 143771 MiB, with 615 and a little reserved, and CUDA 150109880320 bytes."""
    facts = ("reserved=644939776", "free=149598175232")
    found = look_at(library, DRIVER + card_text("H200", "0000:06:00.0", *facts, total=143771, capability="9.0"))
    (gpu,) = found["gpus"]
    assert gpu["memory_total_bytes"] == 150_109_880_320
    assert gpu["memory_reserved_bytes"] == 644_939_776
    assert gpu["memory_free_bytes"] == 149_598_175_232
    assert gpu["compute_capability"] == "9.0"


def test_driver_before_510(look_at: Look, build: Callable[..., Path]) -> None:
    """It has no functions with versioned structs, and what it reserves is in none of its figures."""
    cards = "driver=470.256.02\ncuda=11040\n" + card_text(
        "A100-SXM4-80GB", "0000:07:00.0", "compute=7 1 x", total=81920
    )
    found = look_at(build("-DOLD_DRIVER"), cards)
    (gpu,) = found["gpus"]
    assert gpu["memory_total_bytes"] == 81920 * MIB - 400 * MIB - 4096
    assert gpu["memory_free_bytes"] == 81919 * MIB - 400 * MIB - 4096
    assert gpu["memory_reserved_bytes"] is None
    assert (gpu["processes"], gpu["problem"], found["cuda_version"]) == ([], None, "11.4")


def test_card_with_a_driver_that_knows_but_a_card_that_does_not(look_at: Look, library: Path) -> None:
    """The older question is asked then, whose total has the reserve in it; nobody tells how much it is."""
    (gpu,) = look_at(library, card_text("L4", "0000:01:00.0", "error.nvmlDeviceGetMemoryInfo_v2=3"))["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_reserved_bytes"]) == (24564 * MIB, None)
    assert (gpu["memory_unified"], gpu["problem"]) == (False, None)


def test_two_3090_with_a_bridge(look_at: Look, library: Path) -> None:
    cards = [
        card_text("GeForce RTX 3090", "0000:21:00.0", "nvlink=1", number=1, capability="8.6"),
        card_text("GeForce RTX 3090", "0000:4b:00.0", "nvlink=0", number=2, capability="8.6"),
    ]
    found = look_at(library, DRIVER + "".join(cards))["gpus"]
    assert [(gpu["index"], gpu["nvlink"]) for gpu in found] == [(0, [1]), (1, [0])]
    assert [gpu["pci_bus_id"] for gpu in found] == ["0000:21:00.0", "0000:4b:00.0"]


def test_two_3090_without_a_bridge(look_at: Look, library: Path) -> None:
    cards = [card_text("GeForce RTX 3090", f"0000:2{n}:00.0", number=n) for n in (1, 2)]
    found = look_at(library, DRIVER + "".join(cards))["gpus"]
    assert [gpu["nvlink"] for gpu in found] == [[], []]


def test_four_cards_in_bridged_pairs(look_at: Look, library: Path) -> None:
    peers = {1: 1, 2: 0, 3: 3, 4: 2}
    cards = [card_text("A100-PCIE-80GB", f"0000:2{n}:00.0", f"nvlink={peer}", number=n) for n, peer in peers.items()]
    found = look_at(library, DRIVER + "".join(cards))["gpus"]
    assert [gpu["nvlink"] for gpu in found] == [[1], [0], [3], [2]]


def test_nvlink_that_cannot_be_asked_for(look_at: Look, library: Path) -> None:
    cards = [card_text("L4", f"0000:2{n}:00.0", "error.nvmlDeviceGetP2PStatus=999", number=n) for n in (1, 2)]
    found = look_at(library, DRIVER + "".join(cards))["gpus"]
    assert [(gpu["nvlink"], gpu["problem"]) for gpu in found] == [([], None)] * 2


def test_domain_of_the_bus(look_at: Look, library: Path, root: Path) -> None:
    """The kernel writes it with four digits, NVML with eight and large letters."""
    slot(root, "000f:0a:00.0", "10de:2321", driver="nvidia", node=3)
    found = look_at(library, card_text("H100 NVL", "000F:0A:00.0"))["gpus"]
    assert [(gpu["pci_bus_id"], gpu["numa_node"], gpu["problem"]) for gpu in found] == [("000f:0a:00.0", 3, None)]


def test_session_is_ended(look_at: Look, library: Path, tmp_path: Path) -> None:
    look_at(library, DRIVER, FAKE_NVML_SHUTDOWN=str(tmp_path / "ended"))
    assert (tmp_path / "ended").exists()


# --- processes ------------------------------------------------------------------------------------------------


def test_card_with_a_desktop_on_it(look_at: Look, library: Path, root: Path) -> None:
    write(root / "proc/4711/cgroup", "0::/system.slice/system-vllm.slice/vllm@qwen.service\n")
    write(root / "proc/1688/cgroup", "0::/user.slice/user-1000.slice/session-2.scope\n")
    facts = [
        "graphics=1688 314572800 /usr/lib/xorg/Xorg",
        "graphics=2230 - /usr/bin/gnome-shell",
        "compute=4711 20000000000 VLLM::EngineCore",
        "graphics=3001 1000 /opt/chrome/chrome --type=gpu-process --token=secret",
        "compute=3001 2000 /opt/chrome/chrome --type=gpu-process --token=secret",
        "compute=900 5 -",
    ]
    (gpu,) = look_at(library, DRIVER + card_text("GeForce RTX 4090", "0000:01:00.0", *facts))["gpus"]
    assert [tuple(process.values()) for process in gpu["processes"]] == [
        (900, None, None, "compute", 5),
        (1688, "/usr/lib/xorg/Xorg", None, "graphics", 314572800),
        (2230, "/usr/bin/gnome-shell", None, "graphics", None),
        (3001, "/opt/chrome/chrome", None, "compute", 2000),
        (4711, "VLLM::EngineCore", "vllm@qwen.service", "compute", 20000000000),
    ]
    assert list(gpu["processes"][0]) == ["pid", "name", "unit", "kind", "memory_bytes"]


def test_name_that_is_no_text(look_at: Look, library: Path) -> None:
    (gpu,) = look_at(library, card_text("L4", "0000:01:00.0", "compute=5 6 /opt/\xff\xfe"))["gpus"]
    assert gpu["processes"] == [{"pid": 5, "name": None, "unit": None, "kind": "compute", "memory_bytes": 6}]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("VLLM::Worker_TP0", "VLLM::Worker_TP0"),
        ("/opt/my app/server", "/opt/my app/server"),
        ("Web Content -childID 5", "Web Content"),
        ("x  --api-key=1", "x"),
        ("", None),
        (None, None),
    ],
)
def test_name_without_arguments(title: str | None, name: str | None) -> None:
    assert nvml._program(title) == name


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/system-vllm.slice/vllm@my-model.v1.service\n", "vllm@my-model.v1.service"),
        ("1:name=systemd:/system.slice/vllm@a.service\n0::/\n", "vllm@a.service"),
        ("0::/system.slice/docker.service/x\n", "docker.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", None),
        (None, None),
    ],
)
def test_unit_of_a_process(root: Path, text: str | None, unit: str | None) -> None:
    if text is not None:
        write(root / "proc/7/cgroup", text)
    assert pci.unit(root, 7) == unit


# --- MIG ------------------------------------------------------------------------------------------------------


def mig_text(slot_number: int, profile: str, total: int, *more: str) -> str:
    return (
        f"[mig]\nslot={slot_number}\nuuid=MIG-0000000{slot_number}\nname=NVIDIA H100 80GB HBM3 MIG {profile}\n"
        f"total={total * MIB}\nreserved={3 * MIB}\nfree={(total - 10) * MIB}\n" + "".join(f"{fact}\n" for fact in more)
    )


def h100(*more: str) -> str:
    return card_text("H100 80GB HBM3", "0000:18:00.0", *more, total=81559, capability="9.0")


def test_h100_with_mig(look_at: Look, library: Path) -> None:
    """Instances need not begin at the first place, nor follow on each other. The next card has none of them."""
    instances = mig_text(1, "3g.40gb", 40448) + mig_text(5, "1g.10gb+me", 9984) + mig_text(6, "1c.2g.20gb", 19968)
    after = card_text("L4", "0000:3b:00.0", number=2)
    found = look_at(library, DRIVER + h100("mig=1") + instances + after)["gpus"]
    assert found[0]["problem"] is None
    assert found[0]["mig"] == {
        "enabled": True,
        "instances": [
            {
                "uuid": uuid,
                "profile": profile,
                "memory_total_bytes": (total - 3) * MIB,
                "memory_free_bytes": (total - 10) * MIB,
            }
            for uuid, profile, total in [
                ("MIG-00000001", "3g.40gb", 40448),
                ("MIG-00000005", "1g.10gb+me", 9984),
                ("MIG-00000006", "1c.2g.20gb", 19968),
            ]
        ],
    }
    assert [(gpu["index"], gpu["mig"]) for gpu in found[1:]] == [(1, None)]


def test_mig_that_only_root_sees_whole(look_at: Look, library: Path) -> None:
    """The card's own memory is told to root, its instances' to everybody."""
    forbidden = [f"error.nvmlDeviceGetMemoryInfo{version}=4" for version in ("", "_v2")]
    (gpu,) = look_at(library, h100("mig=1", *forbidden) + mig_text(0, "7g.80gb", 80384))["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_unified"], gpu["problem"]) == (None, False, None)
    assert gpu["mig"]["instances"][0]["memory_total_bytes"] == 80381 * MIB


def test_mig_without_an_instance(look_at: Look, library: Path) -> None:
    (gpu,) = look_at(library, h100("mig=1"))["gpus"]
    assert gpu["mig"] == {"enabled": True, "instances": []}
    assert gpu["problem"] == (
        "GPU 0, NVIDIA H100 80GB HBM3 (0000:18:00.0), is in MIG mode and has no instance, so nothing can run on it: "
        "make instances (nvidia-smi mig -cgi), or switch MIG off (nvidia-smi -i 0000:18:00.0 -mig 0)."
    )


def test_mig_that_is_off(look_at: Look, library: Path) -> None:
    (gpu,) = look_at(library, h100("mig=0") + mig_text(0, "7g.80gb", 80384))["gpus"]
    assert (gpu["mig"], gpu["problem"]) == ({"enabled": False, "instances": []}, None)
    assert gpu["memory_total_bytes"] == 81159 * MIB - 4096


def test_mig_memory_that_is_not_told_is_not_the_hosts(look_at: Look, library: Path, root: Path) -> None:
    write(root / "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    unsupported = [f"error.nvmlDeviceGetMemoryInfo{version}=3" for version in ("", "_v2")]
    (gpu,) = look_at(library, h100("mig=1", *unsupported) + mig_text(0, "7g.80gb", 80384, *unsupported))["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_unified"]) == (None, False)
    assert gpu["mig"]["instances"][0]["memory_total_bytes"] is None


# --- memory that is the host's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mig", ["", "mig=0\n"])
def test_gb10(look_at: Look, library: Path, root: Path, mig: str) -> None:
    write(
        root / "proc/meminfo",
        "MemTotal:       127600748 kB\nMemFree: 1 kB\nMemAvailable:   118566368 kB\nHugePages: 0\n",
    )
    facts = ["[gpu]", "uuid=GPU-1", "name=NVIDIA GB10", "bus=0000000F:01:00.0", "capability=12.1", ""]
    found = look_at(library, DRIVER + "\n".join(facts) + mig)
    (gpu,) = found["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_free_bytes"]) == (127600748 * 1024, 118566368 * 1024)
    assert (gpu["memory_reserved_bytes"], gpu["memory_unified"], gpu["problem"]) == (None, True, None)
    (warning,) = found["warnings"]
    assert warning.startswith("GPU 0, NVIDIA GB10, has no memory of its own")


def test_memory_that_is_not_told(look_at: Look, library: Path, root: Path) -> None:
    """That is not the host's memory, unless the card does not know the question."""
    write(root / "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
    errors = [f"error.nvmlDeviceGetMemoryInfo{version}=999" for version in ("", "_v2")]
    (gpu,) = look_at(library, card_text("L4", "0000:01:00.0", *errors))["gpus"]
    assert (gpu["memory_total_bytes"], gpu["memory_unified"]) == (None, False)
    assert gpu["problem"].startswith("GPU 0, NVIDIA L4 (0000:01:00.0), does not tell its memory (Unknown Error): look")


# --- cards that have broken down ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (15, "does not answer (GPU is lost): it has fallen off the bus. Look for Xid"),
        (999, "does not answer (Unknown Error): most likely it has fallen off the bus. Look for Xid"),
        (16, "does not answer (GPU requires restart): end what runs on it and reset it (nvidia-smi --gpu-reset)"),
        (8, "does not answer (Insufficient External Power): connect all of the card's power cables."),
        (4, "does not answer (Insufficient Permissions): look again as root (become: true)."),
        (11, "does not answer (Interrupt Request Issue): look for NVRM and Xid in the kernel's log"),
    ],
)
def test_card_that_fell_off_the_bus(look_at: Look, library: Path, root: Path, error: int, says: str) -> None:
    """NVML tells nothing but its number; where it is and what it is says the bus."""
    write(root / "usr/share/misc/pci.ids", PCI_IDS)
    for place, node in (("0000:01:00.0", 0), ("0000:41:00.0", 1), ("0000:81:00.0", 1)):
        slot(root, place, "10de:2204", driver="nvidia", node=node)
    cards = [
        card_text("GeForce RTX 3090", "0000:01:00.0", "nvlink=1", number=1),
        card_text("GeForce RTX 3090", "0000:41:00.0", "nvlink=0", f"error={error}", number=2),
        card_text("GeForce RTX 3090", "0000:81:00.0", number=3),
    ]
    found = look_at(library, DRIVER + "".join(cards))
    assert [gpu["index"] for gpu in found["gpus"]] == [0, 1, 2]
    whole, lost, other = found["gpus"]
    assert (whole["problem"], other["problem"]) == (None, None)
    assert whole["nvlink"] == []
    assert lost["problem"].startswith(f"GPU 1, NVIDIA GeForce RTX 3090 (0000:41:00.0), {says}")
    assert (lost["pci_bus_id"], lost["numa_node"], lost["uuid"]) == ("0000:41:00.0", 1, None)
    assert (lost["memory_total_bytes"], lost["memory_free_bytes"], lost["compute_capability"]) == (None, None, None)
    assert found["driver_version"] == "580.159.04"


def test_two_lost_cards_in_the_order_of_the_bus(look_at: Look, library: Path, root: Path) -> None:
    for place in ("0000:c1:00.0", "0000:01:00.0", "0000:41:00.0"):
        slot(root, place, "10de:2204", driver="nvidia")
    slot(root, "0000:21:00.0", "10de:2204", driver="vfio-pci")
    cards = [
        card_text("GeForce RTX 3090", place, *more)
        for place, more in [("0000:01:00.0", ["error=15"]), ("0000:41:00.0", []), ("0000:c1:00.0", ["error=15"])]
    ]
    found = look_at(library, "".join(cards))["gpus"]
    assert [(gpu["index"], gpu["pci_bus_id"], bool(gpu["problem"])) for gpu in found] == [
        *(
            (0, "0000:01:00.0", True),
            (1, "0000:41:00.0", False),
            (2, "0000:c1:00.0", True),
            (None, "0000:21:00.0", True),
        )
    ]


def test_lost_card_that_the_bus_does_not_tell_from_another(look_at: Look, library: Path, root: Path) -> None:
    """One lost, two not shown: no guess at which it is, and no card left out."""
    for place in ("0000:01:00.0", "0000:41:00.0"):
        slot(root, place, "10de:2204", driver="nvidia")
    found = look_at(library, card_text("GeForce RTX 3090", "0000:41:00.0", "error=15"))["gpus"]
    assert [(gpu["index"], gpu["pci_bus_id"]) for gpu in found] == [
        *((0, None), (None, "0000:01:00.0"), (None, "0000:41:00.0"))
    ]
    assert found[0]["problem"].startswith("GPU 0, NVIDIA GPU (place unknown), does not answer (GPU is lost)")
    assert "it has not started" in found[1]["problem"]


@pytest.mark.parametrize(
    "question", ["nvmlDeviceGetName", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetMemoryInfo_v2"]
)
def test_card_that_is_lost_while_it_is_looked_at(look_at: Look, library: Path, root: Path, question: str) -> None:
    write(root / "usr/share/misc/pci.ids", PCI_IDS)
    slot(root, "0000:01:00.0", "10de:2684", driver="nvidia")
    (gpu,) = look_at(library, card_text("GeForce RTX 4090", "0000:01:00.0", f"error.{question}=15"))["gpus"]
    assert gpu["problem"].startswith("GPU 0, NVIDIA GeForce RTX 4090 (0000:01:00.0), does not answer (GPU is lost)")
    assert (gpu["index"], gpu["memory_total_bytes"]) == (0, None)


def test_card_that_knows_little(look_at: Look, library: Path) -> None:
    """Nothing but memory is needed to list a card."""
    errors = ["Name", "UUID", "CudaComputeCapability", "MigMode", "ComputeRunningProcesses_v3"]
    facts = [f"error.nvmlDeviceGet{question}=3" for question in errors]
    found = look_at(library, card_text("L4", "0000:01:00.0", *facts))
    (gpu,) = found["gpus"]
    assert (found["driver_version"], found["cuda_version"]) == (None, None)
    assert (gpu["name"], gpu["uuid"], gpu["compute_capability"], gpu["mig"]) == ("NVIDIA GPU", None, None, None)
    assert (gpu["processes"], gpu["problem"]) == ([], None)


# --- a driver that does not start ---------------------------------------------------------------------------------

NOT_ASKED = "NVIDIA GeForce RTX 4090 (0000:01:00.0): NVIDIA's driver has taken it and cannot be asked."
NO_DRIVER = "No driver has taken NVIDIA GeForce RTX 4090 (0000:01:00.0): install NVIDIA's."


@pytest.mark.parametrize(
    ("error", "loaded", "says", "problem"),
    [
        (18, "580.95.05", "The kernel runs version 580.95.05 of NVIDIA's driver, and another one is", NOT_ASKED),
        (9, None, "NVIDIA's libraries are installed, but its kernel module is not loaded.", NO_DRIVER),
        (4, "580.95.05", "NVIDIA's driver does not let this user in: look again as root", NOT_ASKED),
        (999, "580.95.05", "NVIDIA's driver does not answer (Unknown Error): look for NVRM", NOT_ASKED),
    ],
)
def test_driver_that_does_not_start(  # noqa: PLR0917
    look_at: Look, library: Path, root: Path, error: int, loaded: str | None, says: str, problem: str
) -> None:
    write(root / "usr/share/misc/pci.ids", PCI_IDS)
    slot(root, "0000:01:00.0", "10de:2684", driver="nvidia" if loaded else None)
    if loaded:
        write(root / "sys/module/nvidia/version", f"{loaded}\n")
    found = look_at(library, f"error.nvmlInitWithFlags={error}\n")
    (warning,) = found["warnings"]
    assert warning.startswith(says)
    assert [(gpu["index"], gpu["problem"]) for gpu in found["gpus"]] == [(None, problem)]
    assert (found["driver_version"], found["cuda_version"]) == (None, None)


def test_library_that_is_missing(look_at: Look, root: Path) -> None:
    write(root / "sys/module/nvidia/version", "580.95.05\n")
    (warning,) = look_at()["warnings"]
    assert warning.startswith("NVIDIA's kernel module 580.95.05 is loaded, but libnvidia-ml.so.1 is not to be found")


def test_library_on_a_host_without_a_card(look_at: Look, library: Path) -> None:
    """It comes with other packages, too, and is no problem."""
    assert look_at(library, "error.nvmlInitWithFlags=9\n") == look_at()


# --- what speaks to the driver -------------------------------------------------------------------------------------


def hidden(folder: Path, text: str = "raise ImportError") -> str:
    """A folder for Python's path with another module in place of the host's own bindings."""
    write(folder / "path/pynvml.py", text)
    return str(folder / "path")


def test_bindings_are_the_controllers(look_at: Look, library: Path, tmp_path: Path) -> None:
    """Whatever the host has."""
    handed = action.bindings()
    assert handed
    assert len(handed) < 100_000
    path = hidden(tmp_path, "raise SystemExit('the host has some of its own')")
    cards = DRIVER + h100("mig=1", "compute=7 8 x") + mig_text(0, "7g.80gb", 80384)
    found = look_at(library, cards, bindings=handed, path=path)
    assert found["gpus"][0]["processes"][0]["pid"] == 7
    del found["invocation"]
    own = look_at(library, cards)
    del own["invocation"]
    assert found == own


def test_bindings_are_the_packages_own_file() -> None:
    assert action.bindings() == nvml.packed(Path(pynvml.__file__).read_bytes())


def test_controller_without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert action.bindings() is None


@pytest.mark.parametrize("text", ["raise ImportError", "def nvmlInit(): raise SystemExit('too old')"])
def test_neither_has_bindings(look_at: Look, library: Path, root: Path, tmp_path: Path, text: str) -> None:
    """What the bus shows is told all the same; and nothing is amiss on a host without a card."""
    path = hidden(tmp_path, text)
    assert "warnings" not in look_at(library, path=path)
    slot(root, "0000:01:00.0", "10de:2684", driver="nvidia")
    found = look_at(library, DRIVER + card_text("GeForce RTX 4090", "0000:01:00.0"), path=path)
    assert found["warnings"] == [look.NO_BINDINGS]
    assert [gpu["name"] for gpu in found["gpus"]] == ["NVIDIA 10de:2684"]
    assert found["gpus"][0]["problem"].endswith("NVIDIA's driver has taken it and cannot be asked.")


def test_neither_has_bindings_for_a_card_that_is_not_on_the_bus(look_at: Look, root: Path, tmp_path: Path) -> None:
    write(root / "sys/module/nvidia/version", "580.95.05\n")
    assert look_at(path=hidden(tmp_path))["warnings"] == [look.NO_BINDINGS]


# --- without NVIDIA's driver: the bus ------------------------------------------------------------------------------


def test_bare_host(look_at: Look) -> None:
    found = look_at()
    assert {key: found[key] for key in found if key != "invocation"} == {
        **{"changed": False, "gpus": [], "driver_version": None, "cuda_version": None}
    }


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        (None, "NVIDIA 10de:2684"),
        ("usr/share/misc/pci.ids", "NVIDIA GeForce RTX 4090"),
        ("usr/share/hwdata/pci.ids", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_card_without_a_driver(look_at: Look, root: Path, ids: str | None, name: str) -> None:
    slot(root, "0000:01:00.0", "10de:2684")
    if ids:
        write(root / ids, PCI_IDS)
    found = look_at()
    assert "warnings" not in found
    assert found["driver_version"] is None
    (gpu,) = found["gpus"]
    assert {key: value for key, value in gpu.items() if value} == {
        "name": name,
        "vendor": "nvidia",
        "pci_bus_id": "0000:01:00.0",
        "problem": f"No driver has taken {name} (0000:01:00.0): install NVIDIA's.",
    }


def test_names(root: Path) -> None:
    write(root / "usr/share/misc/pci.ids", PCI_IDS)
    for number, ids in enumerate(["10de:2e12", "10de:ffff", "1002:744c", "8086:2684"]):
        slot(root, f"0000:0{number}:00.0", ids)
    assert list(pci.names(root, pci.devices(root)).values()) == [
        *("NVIDIA GB10", "NVIDIA 10de:ffff", "AMD Radeon RX 7900 XT/7900 XTX/7900 GRE/7900M", "Intel 8086:2684")
    ]


@pytest.mark.parametrize(
    ("ids", "kind", "listed"),
    [
        ("10de:2684", "0300", True),  # a card with outputs
        ("10de:2330", "0302", True),  # H100
        ("1002:740f", "0380", True),  # MI210
        ("1002:74a1", "1200", True),  # MI300X
        ("8086:56c0", "0380", True),  # Flex 170
        ("1a03:2000", "0300", False),  # the VGA of a board's ASPEED
        ("102b:0536", "0300", False),  # Matrox, the same
        ("1234:1111", "0300", False),  # QEMU's
        ("10de:22ba", "0403", False),  # a card's sound
        ("10de:22a3", "0680", False),  # NVSwitch
        ("8086:7d1d", "1200", False),  # Intel's NPU
    ],
)
def test_what_is_a_gpu(root: Path, ids: str, kind: str, listed: bool) -> None:
    slot(root, "0000:01:00.0", ids, kind)
    assert [f"{device.vendor_id}:{device.device_id}" for device in pci.devices(root)] == [ids] * listed


def test_slices_for_virtual_machines_are_no_gpus(root: Path) -> None:
    slot(root, "0000:01:00.0", "10de:2235", "0302")
    (slot(root, "0000:01:00.4", "10de:2235", "0302") / "physfn").symlink_to("../0000:01:00.0")
    assert [device.address for device in pci.devices(root)] == ["0000:01:00.0"]


def test_order_of_the_bus(root: Path) -> None:
    places = ["0000:0a:00.0", "0000:09:00.0", "10000:01:00.0", "0000:09:01.0", "b7f2:00:00.0"]
    for place in places:
        slot(root, place, "10de:2684")
    write(root / "sys/bus/pci/devices/stray", "")
    assert [device.address for device in pci.devices(root)] == [
        *("0000:09:00.0", "0000:09:01.0", "0000:0a:00.0", "b7f2:00:00.0", "10000:01:00.0")
    ]


def test_card_that_goes_while_it_is_looked_at(root: Path) -> None:
    slot(root, "0000:01:00.0", "10de:2684")
    (root / "sys/bus/pci/devices/0000:02:00.0").mkdir()
    assert [device.address for device in pci.devices(root)] == ["0000:01:00.0"]


# --- other makes ---------------------------------------------------------------------------------------------------


def test_amd(look_at: Look, root: Path) -> None:
    memory = {"mem_info_vram_total": 206141652992, "mem_info_vram_used": 301989888}
    slot(root, "0000:05:00.0", "1002:74a1", "1200", "amdgpu", 0, unique_id="6b3d9d30e8e2a6a7", **memory)
    slot(root, "0000:26:00.0", "1002:74a1", "1200", "amdgpu", 1, product_name="AMD Instinct MI300X OAM", **memory)
    found = look_at()
    assert [tuple(gpu[key] for key in list(gpu)[:9]) for gpu in found["gpus"]] == [
        (0, "GPU-6b3d9d30e8e2a6a7", "AMD 1002:74a1", "amd", "0000:05:00.0", 0, 206141652992, 205839663104, None),
        (1, None, "AMD Instinct MI300X OAM", "amd", "0000:26:00.0", 1, 206141652992, 205839663104, None),
    ]
    assert [gpu["problem"] for gpu in found["gpus"]] == [None, None]
    assert (found["driver_version"], "warnings" in found) == (None, False)


@pytest.mark.parametrize(
    ("driver", "files"), [(None, {}), ("vfio-pci", {}), ("amdgpu", {"mem_info_vram_total": "junk"})]
)
def test_amd_without_its_driver(look_at: Look, root: Path, driver: str | None, files: dict[str, object]) -> None:
    slot(root, "0000:05:00.0", "1002:744c", "0300", driver, **files)
    (gpu,) = look_at()["gpus"]
    assert (gpu["index"], gpu["memory_total_bytes"]) == (None, None)
    assert gpu["problem"] == (
        "AMD 1002:744c (0000:05:00.0) does not tell its memory: it needs the driver amdgpu, and has "
        f"{driver or 'none'}."
    )


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({"mem_info_vram_total": 100, "mem_info_vram_used": 30}, (100, 70)),
        ({"mem_info_vram_total": 100, "mem_info_vram_used": 101}, (100, 0)),
        ({"mem_info_vram_total": 100, "mem_info_vram_used": ""}, (100, None)),
        ({"mem_info_vram_total": 100}, (100, None)),
        ({"mem_info_vram_used": 30}, (None, None)),
    ],
)
def test_amd_memory(root: Path, files: dict[str, object], memory: tuple[int | None, int | None]) -> None:
    found = pci.amd_memory(slot(root, "0000:05:00.0", "1002:744c", **files))
    assert (found.total_bytes, found.free_bytes) == memory


def test_mixed_cards(look_at: Look, library: Path, root: Path) -> None:
    """Each is listed once, NVIDIA's first and as its driver numbers them, and says so if it cannot be used."""
    memory = {"mem_info_vram_total": 100, "mem_info_vram_used": 30}
    slot(root, "0000:00:02.0", "8086:a780", driver="i915")
    slot(root, "0000:01:00.0", "10de:2684", driver="vfio-pci")
    slot(root, "0000:02:00.0", "1002:744c", driver="amdgpu", **memory)
    slot(root, "0000:03:00.0", "10de:27b8", "0302", "nvidia")
    slot(root, "0000:04:00.0", "10de:1eb8", "0302", "nvidia")
    slot(root, "0000:05:00.0", "10de:2204", driver="nouveau")
    slot(root, "0000:06:00.0", "1a03:2000")
    cards = [
        card_text("L4", "0000:03:00.0", number=1, capability="8.9"),
        card_text("Tesla T4", "0000:04:00.0", number=2, total=15360, capability="7.5"),
    ]
    found = look_at(library, DRIVER + "".join(cards))["gpus"]
    assert [(gpu["vendor"], gpu["index"], gpu["pci_bus_id"], gpu["compute_capability"]) for gpu in found] == [
        ("nvidia", 0, "0000:03:00.0", "8.9"),
        ("nvidia", 1, "0000:04:00.0", "7.5"),
        ("nvidia", None, "0000:01:00.0", None),
        ("nvidia", None, "0000:05:00.0", None),
        ("intel", None, "0000:00:02.0", None),
        ("amd", 0, "0000:02:00.0", None),
    ]
    assert [gpu["problem"] for gpu in found] == [
        None,
        None,
        "NVIDIA 10de:2684 (0000:01:00.0) is driven by vfio-pci, not by NVIDIA's driver.",
        "NVIDIA 10de:2204 (0000:05:00.0) is driven by nouveau, not by NVIDIA's driver.",
        "Intel 8086:a780 (0000:00:02.0): only NVIDIA's and AMD's cards are known here.",
        None,
    ]


# --- as Ansible runs it ---------------------------------------------------------------------------------------------


def play(library: Path, cards: Path, path: str, **more: object) -> list[dict[str, Any]]:
    tasks = [
        {
            "llmfleet.serving.gpu_info": None,
            "register": "found",
            "environment": {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(cards), "PYTHONPATH": path},
            **more,
        },
        {"ansible.builtin.copy": {"content": "{{ found | to_json }}", "dest": f"{cards}.found"}, "check_mode": False},
    ]
    return [{"hosts": "host1", "gather_facts": False, "tasks": tasks}]


@pytest.mark.parametrize(
    ("more", "arguments"),
    [
        ({"vars": {"ansible_pipelining": True}}, ["--check", "--diff"]),
        ({"vars": {"ansible_pipelining": False}}, []),
        ({"vars": {"ansible_pipelining": True}, "become": True, "become_method": "ansible.builtin.su"}, []),
        ({"async": 30, "poll": 1}, []),
    ],
    ids=["pipelining-check", "files", "become", "async"],
)
def test_host_with_nothing_but_the_driver(
    run_playbook: Any, library: Path, tmp_path: Path, more: dict[str, Any], arguments: list[str]
) -> None:
    if "become" in more and os.geteuid() != 0:
        pytest.skip("su asks for a password")
    cards = tmp_path / "cards"
    cards.write_text(DRIVER + card_text("GeForce RTX 4090", "0000:01:00.0"))
    done = run_playbook(play(library, cards, hidden(tmp_path), **more), "-vvv", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path(f"{cards}.found").read_text())
    (gpu,) = (gpu for gpu in found["gpus"] if gpu["index"] == 0)
    assert (gpu["name"], gpu["memory_total_bytes"]) == ("NVIDIA GeForce RTX 4090", 24164 * MIB - 4096)
    assert (found["changed"], found["driver_version"]) == (False, "580.159.04")
    assert "bindings: VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in done.stdout
    assert action.bindings()[:60] not in done.stdout


def test_warnings_are_shown_and_registered(run_playbook: Any, library: Path, tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    cards.write_text("error.nvmlInitWithFlags=18\n")
    done = run_playbook(play(library, cards, hidden(tmp_path)))
    assert "reboot the host." in " ".join((done.stdout + done.stderr).split())
    (warning,) = json.loads(Path(f"{cards}.found").read_text())["warnings"]
    assert warning.endswith("reboot the host.")


def test_documentation_has_what_is_told(look_at: Look, library: Path) -> None:
    documented = yaml.safe_load(gpu_info.RETURN)
    found = look_at(library, DRIVER + h100("mig=1", "compute=7 8 x") + mig_text(0, "7g.80gb", 80384))
    assert set(documented) == set(found) - {"changed", "invocation"}

    def same(described: dict[str, Any], value: dict[str, Any]) -> None:
        assert list(described) == list(value)
        for key, entry in described.items():
            if "contains" in entry:
                same(entry["contains"], value[key][0] if entry["type"] == "list" else value[key])

    same(documented["gpus"]["contains"], found["gpus"][0])
