"""Which implementation of an op runs: its plain reference, its Triton kernel or one in C++.

| ``VLLM_TWOTOWER_KERNELS`` | what runs |
| --- | --- |
| ``auto`` (default) | on a CUDA device Triton kernels, on a CPU C++ where it is registered; else references |
| ``reference`` | references everywhere |
| ``triton`` | Triton kernels everywhere; on a CPU that takes Triton's interpreter |

An op that the chosen backend does not implement runs as its reference. The variable is read at every call, so that a
test can switch. Importing this imports no Triton, and nothing of ``vllm_twotower.cpu``, which registers what it has.
"""

import enum
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from vllm_twotower.core import KERNELS_VARIABLE, is_triton_interpreted

CHOICES = ("auto", "reference", "triton")

Implementation = Callable[..., Any]
"""A function with the parameters of the public op, which has checked the arguments."""


class OpBackend(enum.Enum):
    """What an op is implemented in."""

    REFERENCE = "reference"
    TRITON = "triton"
    CPP = "cpp"


_FOLDERS = {
    "canvas_sample": "canvas_sample",
    "reveal": "reveal",
    "modulate_norm": "adaln",
    "norm_modulate": "adaln",
    "gate_add": "adaln",
    "gated_norm": "gated_norm",
    "seeded_conv": "seeded_scan",
    "seeded_scan": "seeded_scan",
    "state_replay": "state_replay",
    "mixture_of_experts": "mixture_of_experts",
}

_implementations: dict[OpBackend, dict[str, Implementation | str]] = {
    OpBackend.REFERENCE: {op: f"{__package__}.{folder}.reference" for op, folder in _FOLDERS.items()},
    OpBackend.TRITON: {op: f"{__package__}.{f}.kernel" for op, f in _FOLDERS.items() if op != "mixture_of_experts"},
    OpBackend.CPP: {},
}
"""By backend and op: the function, or until it is first needed the module that has it."""


def register_implementation(op: str, backend: OpBackend, function: Implementation) -> None:
    """Run ``function`` for an op where this backend is selected, from now on and in place of an earlier one."""
    assert op in _FOLDERS, op
    _implementations[backend][op] = function


def find_implementation(op: str, tensor: torch.Tensor) -> Implementation:
    """The function that runs an op over this tensor.

    Raises:
        ValueError: as ``select_backend``.

    """
    functions = _implementations[select_backend(tensor)]
    if op not in functions:
        functions = _implementations[OpBackend.REFERENCE]
    found = functions[op]
    if isinstance(found, str):
        found = functions[op] = getattr(importlib.import_module(found), op)
    return found


def select_backend(tensor: torch.Tensor) -> OpBackend:
    """The backend of an op over this tensor.

    Raises:
        ValueError: the environment variable holds something else than the choices above, or asks for kernels where
            they cannot run.

    """
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{KERNELS_VARIABLE}={choice!r}: set it to one of {', '.join(CHOICES)}, or not at all")
    if choice == "auto":
        if tensor.is_cuda:
            return OpBackend.TRITON if importlib.util.find_spec("triton") is not None else OpBackend.REFERENCE
        has_cpp = tensor.device.type == "cpu" and _implementations[OpBackend.CPP]
        return OpBackend.CPP if has_cpp else OpBackend.REFERENCE
    if choice == "triton" and not tensor.is_cuda and not is_triton_interpreted():
        raise ValueError(
            f"{KERNELS_VARIABLE}=triton with tensors on {tensor.device}: kernels run there in Triton's interpreter "
            f"only, so set TRITON_INTERPRET=1 before Python starts, or {KERNELS_VARIABLE}=reference"
        )
    return OpBackend(choice)
