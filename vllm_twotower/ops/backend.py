"""Which form of an op runs: its plain reference or its Triton kernel.

| ``VLLM_TWOTOWER_KERNELS`` | what runs |
| --- | --- |
| ``auto`` (default) | kernels for tensors on a CUDA device, references elsewhere |
| ``reference`` | references everywhere |
| ``triton`` | kernels everywhere; on a CPU that takes Triton's interpreter |

Read at every call, so that a test can switch. Importing this imports no Triton.
"""

import importlib.util
import os

import torch

from vllm_twotower.core import KERNELS_VARIABLE

CHOICES = ("auto", "reference", "triton")


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether an op over this tensor runs as a kernel.

    Raises:
        ValueError: the environment variable holds something else than the choices above, or asks for kernels where
            they cannot run.

    """
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{KERNELS_VARIABLE}={choice!r}: set it to one of {', '.join(CHOICES)}, or not at all")
    if choice == "auto":
        return tensor.is_cuda and _has_triton()
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{KERNELS_VARIABLE}=triton with tensors on {tensor.device}: kernels run there in Triton's interpreter "
            f"only, so set TRITON_INTERPRET=1 before Python starts, or {KERNELS_VARIABLE}=reference"
        )
    return choice == "triton"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
