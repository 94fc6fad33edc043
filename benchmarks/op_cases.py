"""The ops at the real model's shapes: what ``compile_ops.py`` compiles and ``run.py ops`` times.

Sizes: spec section 1, the 30B-A3B model. 64 requests of one canvas of 16 tokens, the batch size at which mask diffusion
gains most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_twotower.ops.canvas_sample import kernel as canvas_sample_kernel
from vllm_twotower.ops.canvas_sample import reference as canvas_sample_reference
from vllm_twotower.ops.canvas_sample.reference import Draw

ROWS, WIDTH = 64, 16
TOKENS = ROWS * WIDTH
VOCAB, MASK = 131_072, 3
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op over one set of shapes."""

    name: str
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[str], tuple[Any, ...]]
    """Device -> arguments of both."""
    floor_bytes: int
    """What any implementation has to read and write once."""

    def run_kernel(self, device: str) -> Any:
        """Run the kernel once."""
        return self.kernel(*self.inputs(device))


def _indices(size: int, high: int, device: str) -> torch.Tensor:
    return torch.randint(high, (size,), device=device)


def _logits(random: bool, rows: int) -> Callable[[str], tuple[Any, ...]]:
    def inputs(device: str) -> tuple[Any, ...]:
        draw = None
        if random:
            keys = (_indices(rows, high, device) for high in (2**62, 2**17, 16))
            draw = Draw(torch.full((rows,), 0.1, device=device), *keys)
        return torch.randn(rows, VOCAB, device=device, dtype=DTYPE), MASK, draw

    return inputs


def _canvas_sample_cases() -> list[Case]:
    return [
        Case(
            f"canvas_sample {kind} N{rows}",
            canvas_sample_kernel.canvas_sample,
            canvas_sample_reference.canvas_sample,
            _logits(kind == "random", rows),
            rows * VOCAB * DTYPE.itemsize + rows * 16,
        )
        for rows in (WIDTH, TOKENS)
        for kind in ("greedy", "random")
    ]


CASES = _canvas_sample_cases()
