"""Which form of an op runs: its plain reference, its Triton kernel or its C++ form.

| ``VLLM_TWOTOWER_KERNELS`` | what runs |
| --- | --- |
| ``auto`` (default) | on a CUDA device Triton kernels, on a CPU C++ where it was built; else references |
| ``reference`` | references everywhere |
| ``triton`` | Triton kernels everywhere; on a CPU that takes Triton's interpreter |

An op that lacks a form runs as its reference. Read at every call, so that a test can switch. Importing this imports no
Triton.
"""

import enum
import importlib.util
import os

import torch

from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.cpu.library import library

CHOICES = ("auto", "reference", "triton")


class Form(enum.Enum):
    """Of an op."""

    REFERENCE = "reference"
    TRITON = "triton"
    CPP = "cpp"


def form_for(tensor: torch.Tensor) -> Form:
    """The form in which an op over this tensor runs.

    Raises:
        ValueError: the environment variable holds something else than the choices above, or asks for kernels where
            they cannot run.

    """
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{KERNELS_VARIABLE}={choice!r}: set it to one of {', '.join(CHOICES)}, or not at all")
    if choice == "auto":
        if tensor.is_cuda:
            return Form.TRITON if _has_triton() else Form.REFERENCE
        return Form.CPP if tensor.device.type == "cpu" and library() is not None else Form.REFERENCE
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{KERNELS_VARIABLE}=triton with tensors on {tensor.device}: kernels run there in Triton's interpreter "
            f"only, so set TRITON_INTERPRET=1 before Python starts, or {KERNELS_VARIABLE}=reference"
        )
    return Form.TRITON if choice == "triton" else Form.REFERENCE


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
