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


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct there: its fields in order, addresses with a star, int64 without a type."""
    types = {"": ctypes.c_int64, "int": ctypes.c_int, "double": ctypes.c_double}
    named = [f.partition(":") for f in fields.split()]
    kinds = [(n.rstrip("*"), ctypes.c_void_p if n.endswith("*") else types[type_]) for n, _, type_ in named]
    return type(name, (ctypes.Structure,), {"_fields_": kinds})


ModulationStruct = _struct("Modulation", "vector* table* level* row*")
ConvStruct = _struct("ConvInputs", "x* x_row x_position weight* bias* cache* cache_slot cache_tap slot*")
ScanStruct = _struct(
    "ScanInputs",
    "x* dt* b* c* x_row x_position dt_row dt_position b_row b_position c_row c_position "
    "a* skip* dt_bias* state* state_slot slot*",
)
RevealStruct = _struct("RevealInputs", "token* proposal* confidence* masked* pass* width* threshold* max_steps*")
RouterStruct = _struct("Router", "weight* bias* top_k normalise:int scaling:double")

_Pointer, _Count = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, list[Any]] = {
    "adaln_norm": [_Pointer] * 3 + [ctypes.c_float, ctypes.c_int, ModulationStruct, _Count, _Count],
    "adaln_gate_add": [_Pointer] * 3 + [ModulationStruct, _Count, _Count],
    "gated_norm": [_Pointer] * 4 + [ctypes.c_float] + [_Count] * 5,
    "greedy_sample": [_Pointer] * 4 + [_Count] * 3,
    "seeded_conv": [_Pointer, ctypes.POINTER(ConvStruct)] + [_Count] * 4,
    "seeded_scan": [_Pointer, ctypes.POINTER(ScanStruct)] + [_Count] * 6,
    "reveal": [_Pointer] * 4 + [ctypes.POINTER(RevealStruct)] + [_Count] * 2,
    "mixture_of_experts": [_Pointer] * 2 + [ctypes.POINTER(RouterStruct)] + [_Pointer] * 2 + [_Count] * 4,
}
INTERFACE_VERSION = 3


@functools.cache
def load_library() -> ctypes.CDLL | None:
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
        message = "%s is of another version (%d, not %d): plain torch runs instead; install vllm-twotower again"
        _logger.warning(message, found.origin, version, INTERFACE_VERSION)
        return None
    for name, signature in SIGNATURES.items():
        entry = getattr(loaded, name)
        entry.argtypes, entry.restype = signature, None
    return loaded


def find_function(name: str) -> Callable[..., None]:
    """One of the library's functions; it must have been built."""
    built = load_library()
    assert built is not None, "asked for a C++ op where none was built"
    return getattr(built, name)


def are_fp32(*tensors: torch.Tensor | None) -> bool:
    """Whether all are what the library computes in."""
    return all(t is None or t.dtype is torch.float32 for t in tensors)
