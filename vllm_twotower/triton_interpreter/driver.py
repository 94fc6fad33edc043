"""The driver half of the backend: active only under the interpreter, on a machine without a GPU."""

import os
from typing import Any

from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """Says that the active device is the CPU; compiles and launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        """True under ``TRITON_INTERPRET=1`` where torch sees no GPU; two active drivers are an error in Triton."""
        if os.environ.get("TRITON_INTERPRET") != "1":
            return False
        import torch

        return not torch.cuda.is_available()

    def get_active_torch_device(self) -> Any:
        """The CPU."""
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Never reached under the interpreter."""
        raise NotImplementedError(_MESSAGE)

    def get_current_target(self) -> Any:
        """Never reached under the interpreter."""
        raise NotImplementedError(_MESSAGE)

    def get_benchmarker(self) -> Any:
        """Never reached under the interpreter."""
        raise NotImplementedError(_MESSAGE)


_MESSAGE = "the cpu Triton backend of vllm-twotower only interprets kernels: set TRITON_INTERPRET=1 before Python starts"
