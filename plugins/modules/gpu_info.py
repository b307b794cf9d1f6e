#!/usr/bin/python
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_info
author: llmfleet developers
version_added: 1.0.0
short_description: The GPUs of a host, and what is free of them
description:
  - NVIDIA's cards as their driver shows them by its library NVML, AMD's as the kernel does, and of a card without a
    driver what the PCI bus shows.
  - No missing GPU, driver or library, and no broken card, is an error. What cannot be used says why in its C(problem).
  - The host needs nothing installed. What speaks to NVML, C(nvidia-ml-py), comes from the controller, where it is one
    of the collection's Python packages. Where the controller does not have it, the host's own is used.
extends_documentation_fragment:
  - llmfleet.serving.attributes
  - llmfleet.serving.attributes.info
options:
  bindings:
    description:
      - Not for you to set. This is how the controller's C(nvidia-ml-py) comes to the host; whatever a task says here is
        replaced by it.
    type: str
notes:
  - The order is that of the PCI bus, as in C(nvidia-smi). CUDA's own is another one, fastest card first. Who hands
    RV(gpus[].index) on to CUDA sets E(CUDA_DEVICE_ORDER=PCI_BUS_ID) with it, or names cards and instances by their
    C(uuid), which goes on to be right where a card has broken down.
"""

EXAMPLES = r"""
- name: Look at the GPUs
  llmfleet.serving.gpu_info:
  register: found

- name: Say which cards cannot be used
  ansible.builtin.debug:
    msg: "{{ found.gpus | selectattr('problem') | map(attribute='problem') }}"
"""

RETURN = r"""
gpus:
  description:
    - First NVIDIA's cards in the order of their index, then those that NVIDIA's driver does not show, then the others.
  returned: always
  type: list
  elements: dict
  contains:
    index:
      description:
        - The card's number among those of its vendor, in the order of the PCI bus. For NVIDIA's it is NVML's, which
          counts cards that have broken down, too. Null for a card without its driver.
      type: int
      sample: 0
    uuid:
      description: What E(CUDA_VISIBLE_DEVICES) or E(ROCR_VISIBLE_DEVICES) take for it, or null.
      type: str
      sample: GPU-8f5a0b0e-6f0c-4cf2-9c2d-1d0a7c3b9e11
    name:
      description: The card's name. Without a driver it is that of the host's list of PCI ids, or the ids.
      type: str
      sample: NVIDIA H200
    vendor:
      description: C(nvidia), C(amd) or C(intel).
      type: str
      sample: nvidia
    pci_bus_id:
      description: Address on the PCI bus, as the kernel writes it.
      type: str
      sample: "0000:01:00.0"
    numa_node:
      description: The NUMA node that the card is next to, or null.
      type: int
      sample: 0
    memory_total_bytes:
      description:
        - What programs can have of the card's memory. This is CUDA's total (C(cudaMemGetInfo)), which vLLM's
          C(gpu_memory_utilization) is a part of, not NVML's, which counts what the driver reserves. Null if unknown.
      type: int
      sample: 150109880320
    memory_free_bytes:
      description: What of it is free now, or null.
      type: int
      sample: 149598175232
    memory_reserved_bytes:
      description: What the driver keeps beside the total, or null. The two together are NVML's total.
      type: int
      sample: 644939776
    memory_unified:
      description:
        - Whether the GPU has no memory of its own and uses the host's, as GB10 and Jetson do. Total and free memory are
          then C(MemTotal) and C(MemAvailable) of the host.
      type: bool
    compute_capability:
      description: CUDA's compute capability, or null.
      type: str
      sample: "9.0"
    mig:
      description: Null for a card that cannot be partitioned.
      type: dict
      contains:
        enabled:
          description: Whether the card is partitioned. If it is, programs run on its instances only.
          type: bool
        instances:
          description: The instances. Each is a device by itself.
          type: list
          elements: dict
          contains:
            uuid:
              description: What E(CUDA_VISIBLE_DEVICES) takes for it.
              type: str
              sample: MIG-3f2c1a77-5d3e-5a65-a7f4-6d2d0ad0a2b1
            profile:
              description: Its share of the card, or null.
              type: str
              sample: 3g.40gb
            memory_total_bytes:
              description: CUDA's total of the instance, or null.
              type: int
            memory_free_bytes:
              description: What of it is free now, or null.
              type: int
    processes:
      description: What runs on NVIDIA's cards. Of others it is not known, and the list is empty.
      type: list
      elements: dict
      contains:
        pid:
          description: Process id.
          type: int
        name:
          description: The program, without its arguments, or null.
          type: str
          sample: /usr/lib/xorg/Xorg
        unit:
          description: The systemd service that it belongs to, or null.
          type: str
          sample: vllm@qwen.service
        kind:
          description: C(compute), or C(graphics) for one that only draws, as a desktop does.
          type: str
        memory_bytes:
          description: What it holds of the card's memory, or null.
          type: int
    nvlink:
      description: The indices of the cards that this one reaches over NVLink, directly or through switches.
      type: list
      elements: int
      sample: [1]
    problem:
      description: Why the card cannot be used, and what to do, or null.
      type: str
driver_version:
  description: Version of NVIDIA's driver, or null where none answers.
  returned: always
  type: str
  sample: 580.159.04
cuda_version:
  description: The newest CUDA version that the driver can run, or null.
  returned: always
  type: str
  sample: "13.0"
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llmfleet.serving.plugins.module_utils._gpu.look import look

ROOT = Path("/")


def main() -> None:
    module = AnsibleModule(
        # No secret, but 70 kB that nobody wants to see in -vvv and in the host's journal.
        argument_spec={"bindings": {"type": "str", "no_log": True}},
        supports_check_mode=True,
    )
    found = look(ROOT, module.params["bindings"])
    for warning in found.pop("warnings"):
        module.warn(warning)
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
