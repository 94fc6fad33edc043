"""The ops in C++ (``csrc/cpu_ops.cpp``), compiled when this package is installed where there is a compiler.

It has a plain C interface and depends neither on Python nor on torch; ctypes calls it with addresses.
Its functions take fp32 only and check nothing; ``cpu/ops/`` does, and goes to the reference otherwise.
"""

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

MODULE = "vllm_twotower._cpu_ops"
_logger = logging.getLogger(__name__)


class ModulationStruct(ctypes.Structure):
    """``Modulation`` there."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("vector", "table", "level", "row")]


class ConvStruct(ctypes.Structure):
    """``ConvInputs`` there."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((f"x_{step}", ctypes.c_int64) for step in ("row", "position")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "cache")),
        *((f"cache_{step}", ctypes.c_int64) for step in ("slot", "tap")),
        ("slot", ctypes.c_void_p),
    ]


class ScanStruct(ctypes.Structure):
    """``ScanInputs`` there."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dt", "b", "c")),
        *((f"{name}_{step}", ctypes.c_int64) for name in ("x", "dt", "b", "c") for step in ("row", "position")),
        *((name, ctypes.c_void_p) for name in ("a", "skip", "dt_bias", "state")),
        ("state_slot", ctypes.c_int64),
        ("slot", ctypes.c_void_p),
    ]


class RouterStruct(ctypes.Structure):
    """``Router`` there."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("top_k", ctypes.c_int64),
        ("normalise", ctypes.c_int),
        ("scaling", ctypes.c_double),
    ]


_Pointer, _Count = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, list[Any]] = {
    "adaln_norm": [_Pointer] * 3 + [ctypes.c_float, ctypes.c_int, ModulationStruct, _Count, _Count],
    "adaln_gate_add": [_Pointer] * 3 + [ModulationStruct, _Count, _Count],
    "greedy_sample": [_Pointer] * 4 + [_Count] * 3,
    "seeded_conv": [_Pointer, ctypes.POINTER(ConvStruct)] + [_Count] * 4,
    "seeded_scan": [_Pointer, ctypes.POINTER(ScanStruct)] + [_Count] * 6,
    "mixture_of_experts": [_Pointer] * 2 + [ctypes.POINTER(RouterStruct)] + [_Pointer] * 2 + [_Count] * 4,
}
INTERFACE_VERSION = 1


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built or belongs to another version of this package; says so once."""
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        _logger.info("no C++ ops for the CPU (no compiler when vllm-twotower was installed): plain torch runs instead")
        return None
    loaded = ctypes.CDLL(found.origin)
    try:
        loaded.interface_version.restype = ctypes.c_int64
        version = loaded.interface_version()
    except AttributeError:
        version = 0
    if version != INTERFACE_VERSION:
        _logger.warning(
            "%s is of another version (%d, not %d): plain torch runs instead; install vllm-twotower again",
            found.origin,
            version,
            INTERFACE_VERSION,
        )
        return None
    for name, signature in SIGNATURES.items():
        entry = getattr(loaded, name)
        entry.argtypes, entry.restype = signature, None
    return loaded


def function(name: str) -> Callable[..., None]:
    """One of the library's functions; it must have been built."""
    built = library()
    assert built is not None, "asked for a C++ op where none was built"
    return getattr(built, name)


def are_fp32(*tensors: torch.Tensor | None) -> bool:
    """Whether all are what the library computes in."""
    return all(t is None or t.dtype is torch.float32 for t in tensors)
