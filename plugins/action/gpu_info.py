# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The controller's part of gpu_info: hands NVIDIA's bindings on, so that the host needs nothing installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.llmfleet.serving.plugins.module_utils._gpu.nvml import packed


def bindings() -> str | None:
    """The controller's pynvml.py, or None. Asked for by package, because others have had a module of this name."""
    try:
        return packed(distribution("nvidia-ml-py").locate_file("pynvml.py").read_bytes())
    except (PackageNotFoundError, OSError):
        return None


class ActionModule(ActionBase):
    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        wrap_async = self._task.async_val and not self._connection.has_native_async
        arguments = {**self._task.args, "bindings": bindings()}
        result.update(self._execute_module(module_args=arguments, task_vars=task_vars, wrap_async=wrap_async))
        if not wrap_async:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result
