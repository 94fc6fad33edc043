"""This package's Triton kernels that rehearsed steps launch, compiled for GPUs at the very specialisations of these
launches.

Triton's own binder says what it would specialise a kernel on: types, constants, numbers that are 1 or that 16 divides,
addresses that 16 divides. An address is not known here; that of a tensor's memory is taken to be aligned, as those of
CUDA's allocator are, and a view begins where it begins in it.
"""

import collections
from collections.abc import Iterable
from typing import Any

import torch

from tests.rehearsal.device import Launch

ARCHITECTURES = (80, 90, 100, 120)
OURS = "vllm_twotower."


class Address:
    """What Triton's binder asks of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        """Aligned as the tensor's is."""
        return self._offset


def specialise(launch: Launch, architecture: int) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles for a launch, and what its compiler is told; an architecture is 90 for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values = {k: Address(v) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    bound, specialisation, options = bind(**values, **launch.options)
    packed = kernel._pack_args(backend, dict(launch.options), bound, specialisation, options)
    options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def find_kinds(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """By kernel, one launch of each specialisation."""
    kinds: dict[str, dict[str, Launch]] = collections.defaultdict(dict)
    for launch in launches:
        if launch.source == "triton" and launch.kernel.fn.__module__.startswith(OURS):
            made, _ = specialise(launch, 90)
            key = str((made.signature, made.constants, made.attrs, launch.options))
            kinds[launch.name].setdefault(key, launch)
    return {name: list(kinds[name].values()) for name in sorted(kinds)}


def compile_kernels(launches: Iterable[Launch], architectures: Iterable[int] = ARCHITECTURES) -> dict[str, Any]:
    """By kernel, in how many ways it is launched, and what became of them on each architecture."""
    architectures = list(architectures)
    found: dict[str, Any] = {}
    for name, kinds in find_kinds(launches).items():
        found[name] = {"specialisations": len(kinds)}
        for architecture in architectures:
            said = sorted({compile_kernel(launch, architecture) for launch in kinds})
            found[name][f"sm_{architecture}"] = ", ".join(said)
    return found


def compile_kernel(launch: Launch, architecture: int) -> str:
    """``compiles``, or what is wrong."""
    from benchmarks.compile_ops import measure

    made, options = specialise(launch, architecture)
    try:
        if spilled := measure(made, options, architecture).spilled_bytes:
            return f"spills {spilled} B"
    except Exception as problem:  # of any kind: Triton's, LLVM's, ptxas's
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
    return "compiles"
