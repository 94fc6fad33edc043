"""vLLM's CUDA operators as its libraries declare them, without the libraries: shapes and dtypes of results only.

What an operator writes is an argument of it and stays what it is. What it returns vLLM declares in Python for most; the
few others that the rehearsed steps use are declared here.
"""

import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

NAMESPACES = {
    "vllm._C_stable_libtorch": ("_C", "_C_cache_ops", "_C_cuda_utils", "_C_custom_ar"),
    "vllm._moe_C_stable_libtorch": ("_moe_C",),
    "vllm.vllm_flash_attn._vllm_fa2_C": ("_vllm_fa2_C",),
    "vllm.vllm_flash_attn._vllm_fa3_C": ("_vllm_fa3_C",),
}
"""Library -> the namespaces that its operators are in. Which one is not written in the library: each is in all."""


def declare_operators(capability: tuple[int, int]) -> None:
    """Put modules without operators' code in the place of vLLM's libraries, and declare the operators."""
    root = next(pathlib.Path(p) for p in sys.path if (pathlib.Path(p) / "operators.json").is_file())
    declared = json.loads((root / "operators.json").read_text(encoding="utf-8"))
    for module, namespaces in NAMESPACES.items():
        sys.modules[module] = types.ModuleType(module)
        for namespace in namespaces:
            for declaration in declared[module]:
                _declare(namespace, declaration, capability[0] * 10 + capability[1])


def stand_in_for_fa4(note: Callable[[str, str], None]) -> None:
    """Put a function that notes its name and gives a result of the right shape in the place of FlashAttention 4, which
    would be compiled here."""
    interface = types.ModuleType("vllm.vllm_flash_attn.cute.interface")

    def attend_fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None, **more: Any) -> Any:
        note("FlashAttention 4", f"causal={more['causal']}")
        made, lse = _attend_fa2(q, k, v)
        return made if out is None else out, lse, None, None

    interface._flash_attn_fwd = attend_fa4  # type: ignore[attr-defined]
    sys.modules[interface.__name__] = interface


def _declare(namespace: str, declaration: str, capability: int) -> None:
    library = _library(namespace)
    name = declaration.split("(")[0].strip()
    library.define(declaration)
    if declaration.endswith("()"):
        library._register_fake(name, lambda *_, **__: None)
    elif name in RESULTS:
        library._register_fake(name, RESULTS[name])
    elif name in ANSWERS:
        answer = ANSWERS[name]
        library.impl(name, lambda *_, **__: answer(capability), "CompositeExplicitAutograd")


_libraries: dict[str, torch.library.Library] = {}


def _library(namespace: str) -> torch.library.Library:
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _libraries[namespace]


def _attend_fa2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
    """FlashAttention 2: [T, H, P] -> [T, H, P], log-sum-exp [H, T]."""
    return [q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)]


def _attend_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> list[torch.Tensor]:
    """FlashAttention 3: as 2, and what its splits accumulated, of which callers keep nothing."""
    out, lse = _attend_fa2(q, k, v)
    return [out, lse, lse.new_empty(0), lse.new_empty(0)]


RESULTS: dict[str, Callable[..., Any]] = {
    "varlen_fwd": _attend_fa2,
    "fwd": _attend_fa3,
    "get_cuda_view_from_cpu_tensor": lambda cpu: torch.empty(cpu.shape, dtype=cpu.dtype, device="cuda"),
    # four numbers a row, rows by fours, and a count of tiles
    "get_scheduler_metadata": lambda batch_size, *_, **__: torch.empty(
        -(-batch_size // 4) * 16 + 1, dtype=torch.int32, device="cuda"
    ),
    "weak_ref_tensor": lambda tensor: tensor,
}
"""By name, results of operators."""

ANSWERS: dict[str, Callable[[int], Any]] = {
    "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89,
    "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
    "cutlass_scaled_mm_supports_fp4": lambda capability: 100 <= capability < 130,
    "cutlass_group_gemm_supported": lambda capability: 90 <= capability < 120,
    "get_max_shared_memory_per_block_device_attribute": lambda _: 227 << 10,
    "meta_size": lambda _: 1 << 12,
}
"""By name, what operators say of the GPU, from its capability; as vLLM's sources say for CUDA 13."""
