"""The driver half of the backend: active only under the interpreter, on a machine without a GPU."""

import sys
import types
from typing import Any

from triton.backends.driver import DriverBase

from vllm_twotower.core import is_triton_interpreted


class _BackendsWithoutUs(types.ModuleType):
    """Where Triton does not interpret, its table of backends is what it would be if this package were not installed.

    Symptom: vLLM's CPU build takes the mere name ``cpu`` in ``triton.backends.backends`` to mean that Triton works
        there, so the installed package would change how other models run.
    Upstream: vllm.triton_utils.importing.HAS_TRITON
    Removed when: vLLM asks whether a driver is active there too, or Triton does before it lists a backend.
    Test: tests/test_compat.py::test_the_triton_backend_is_there_only_under_the_interpreter
    """

    @property
    def backends(self) -> dict[str, Any]:
        return {n: b for n, b in self.__dict__["backends"].items() if b.driver is not InterpreterDriver}


if not is_triton_interpreted():
    # Triton imports this module while it discovers its backends: the dict is not bound yet, and there is no later hook
    sys.modules["triton.backends"].__class__ = _BackendsWithoutUs


class InterpreterDriver(DriverBase):
    """Says that the active device is the CPU; compiles and launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        """True under ``TRITON_INTERPRET=1`` where torch sees no GPU; two active drivers are an error in Triton."""
        if not is_triton_interpreted():
            return False
        import torch

        return not torch.cuda.is_available()

    def get_active_torch_device(self) -> Any:
        """The CPU."""
        import torch

        return torch.device("cpu")

    def _never(self, *args: Any) -> Any:
        raise NotImplementedError("the cpu Triton backend of vllm-twotower only interprets: set TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_current_target = get_benchmarker = _never
