"""What the ops' own code would launch, with the arguments it launches with, on a machine without a GPU: an op runs over
tensors on torch's meta device inside ``recorded_launches``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime.jit import KernelInterface


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Any
    """The ``triton.jit`` function."""
    grid: tuple[int, ...]
    """Programs in each dimension."""
    num_warps: int
    """Warps per program."""
    arguments: dict[str, Any]
    """Tensors, numbers and compile-time constants by the kernel's names."""


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the body in the list this yields, and run none of them."""
    launches: list[Launch] = []

    def get_recorder(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """In place of ``kernel[grid]``."""

        def record(*, num_warps: int, enable_fp_fusion: bool, **arguments: Any) -> None:
            assert not enable_fp_fusion
            launches.append(Launch(kernel, grid, num_warps, arguments))

        return record

    with mock.patch.object(KernelInterface, "__getitem__", get_recorder):
        yield launches
