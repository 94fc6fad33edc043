"""Launching a Triton kernel."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int, **arguments: Any) -> None:
    """Launch a kernel on the current stream; nothing happens where the grid is empty.

    Multiply and add stay two roundings (``enable_fp_fusion=False``), as in the references; the ops are bound by memory.
    """
    if 0 not in grid:
        run_kernel(kernel, grid, num_warps, arguments)


def run_kernel(kernel: Any, grid: tuple[int, ...], num_warps: int, arguments: dict[str, Any]) -> None:
    """What ``benchmarks/launches.py`` replaces, to see what would be launched on a machine without a GPU."""
    kernel[grid](num_warps=num_warps, enable_fp_fusion=False, **arguments)
