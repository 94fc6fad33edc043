"""Launching a Triton kernel."""

from typing import Any

MAX_BLOCK = 16_384
"""Most elements that the warps of a program hold in registers."""


def count_warps(block: int) -> int:
    """Warps of a program that holds so many elements in registers."""
    return min(8, max(1, block // 512))


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, **arguments: Any) -> None:
    """Launch a kernel on the current stream; nothing happens where the grid is empty.

    Multiply and add stay two roundings (``enable_fp_fusion=False``), as in the references; the ops are bound by memory.
    """
    if 0 not in grid:
        kernel[grid](num_warps=num_warps, enable_fp_fusion=False, **arguments)
