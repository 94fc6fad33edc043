"""Launching a Triton kernel, or noting down that it would be launched.

``benchmarks/compile_ops.py`` compiles what the ops' own code launches, with the arguments it launches with, on a
machine without a GPU: it runs an op over tensors on torch's meta device inside ``recorded_launches``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch."""

    kernel: Any
    """The ``triton.jit`` function."""
    grid: tuple[int, ...]
    """Programs in each dimension."""
    arguments: dict[str, Any]
    """Tensors, numbers and compile-time constants by the kernel's names."""
    num_warps: int
    """Warps per program."""


_recording: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, **arguments: Any) -> None:
    """Launch a kernel on the current stream; nothing happens where the grid is empty.

    Multiply and add stay two roundings (``enable_fp_fusion=False``), as in the references; the ops are bound by memory.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.append(Launch(kernel=kernel, grid=grid, arguments=arguments, num_warps=num_warps))
        return
    kernel[grid](num_warps=num_warps, enable_fp_fusion=False, **arguments)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the body in the list this yields, and run none of them."""
    global _recording
    if _recording is not None:
        raise RuntimeError("launches are being recorded already")
    launches: list[Launch] = []
    _recording = launches
    try:
        yield launches
    finally:
        _recording = None
