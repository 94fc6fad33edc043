"""How many denoise passes canvases take: a distribution, drawn the same for every policy that is compared."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from vllm_twotower.core import DEFAULT_MAX_STEPS

GAMMA_SHAPE = 2.2
"""Skew of the passes per canvas: most take few, some take all. An assumption, nobody published the distribution: with
1.5 or 4 in its place the estimated tokens per second of 1, 16 and 64 requests move by less than 2 %."""

MEAN_PASSES = 5.9
"""Mean at threshold 0.8, 16 tokens, 16 steps. NVIDIA's 2.42 tokens per forward: 16 / (5.6 + 1)."""

NUM_FIT_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class CanvasPasses:
    """Passes per canvas, gamma-distributed."""

    mean: float = MEAN_PASSES
    """After rounding up and the limit."""
    max_steps: int = DEFAULT_MAX_STEPS
    """T: no canvas takes more."""

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.max_steps:
            raise ValueError(
                f"mean passes {self.mean} is not allowed: use a number from 1 to max_steps={self.max_steps}"
            )

    def draw_counts(self, request: int, seed: int = 0) -> Iterator[int]:
        """Passes of one request's canvases, one after the other without end; the same whatever else is drawn."""
        source, scale = random.Random(seed * 1_000_003 + request), fit_scale(self.mean, self.max_steps)
        while True:
            yield _round(source.gammavariate(GAMMA_SHAPE, scale), self.max_steps)

    @property
    def masked_fraction(self) -> float:
        """Share of a canvas that is masked in an average pass, if every pass reveals as much: (k + 1) / 2k."""
        return (self.mean + 1) / (2 * self.mean)


@cache
def fit_scale(mean: float, max_steps: int) -> float:
    """Scale of the gamma distribution that gives the mean, by bisection on a fixed sample."""
    source = random.Random(0)
    sample = [source.gammavariate(GAMMA_SHAPE, 1.0) for _ in range(NUM_FIT_DRAWS)]
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(_round(middle * x, max_steps) for x in sample) / NUM_FIT_DRAWS
        low, high = (middle, high) if found < mean else (low, middle)
    return high


def _round(x: float, max_steps: int) -> int:
    return min(max_steps, 1 + math.floor(x))
