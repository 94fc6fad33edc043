"""How many denoise passes canvases take: a distribution, drawn the same for every policy that is compared."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

GAMMA_SHAPE = 2.2
"""Skew of the released model's passes per canvas: most take few, some take all (by eye, from third-party counts)."""

MEAN_PASSES = 5.9
"""Mean at threshold 0.8, 16 tokens, 16 steps. NVIDIA's 2.42 tokens per forward: 16 / (5.6 + 1)."""

NUM_FIT_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class CanvasPasses:
    """Passes per canvas: gamma-distributed with a given mean, or drawn from recorded counts."""

    mean: float = MEAN_PASSES
    """Mean of the gamma distribution, after rounding up and the limit."""
    max_steps: int = 16
    """T: no canvas takes more."""
    recorded: tuple[int, ...] = ()
    """Counts to draw from instead."""

    def __post_init__(self) -> None:
        if not self.recorded and not 1 <= self.mean <= self.max_steps:
            raise ValueError(
                f"mean passes {self.mean} is not allowed: use a number from 1 to max_steps={self.max_steps}"
            )
        if any(not 1 <= count <= self.max_steps for count in self.recorded):
            raise ValueError(
                f"recorded passes {self.recorded} are not allowed: use integers from 1 to {self.max_steps}"
            )

    @property
    def expected(self) -> float:
        """The mean of what is drawn."""
        return sum(self.recorded) / len(self.recorded) if self.recorded else self.mean

    def of_request(self, request: int, seed: int = 0) -> "PassCounts":
        """The counts of one request's canvases, one after the other; the same whatever else is drawn."""
        return PassCounts(self, random.Random(seed * 1_000_003 + request))

    @cached_property
    def scale(self) -> float:
        """Scale of the gamma distribution that gives the mean, by bisection on a fixed sample."""
        source = random.Random(0)
        sample = [source.gammavariate(GAMMA_SHAPE, 1.0) for _ in range(NUM_FIT_DRAWS)]
        low, high = 0.0, 1000.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = sum(self.rounded(middle * x) for x in sample) / NUM_FIT_DRAWS
            low, high = (middle, high) if mean < self.mean else (low, middle)
        return high

    def rounded(self, x: float) -> int:
        """A whole number of passes, one at least and T at most."""
        return min(self.max_steps, 1 + math.floor(x))


class PassCounts:
    """An endless stream of passes per canvas."""

    def __init__(self, passes: CanvasPasses, source: random.Random) -> None:
        self._passes = passes
        self._source = source

    def next(self) -> int:
        """The next canvas's passes."""
        if self._passes.recorded:
            return self._source.choice(self._passes.recorded)
        return self._passes.rounded(self._source.gammavariate(GAMMA_SHAPE, self._passes.scale))


def masked_fraction(mean_passes: float) -> float:
    """Share of a canvas that is masked in an average pass, if every pass reveals as much: (k + 1) / 2k."""
    return (mean_passes + 1) / (2 * mean_passes)


THIRD_PARTY_COUNTS: Sequence[int] = (7, 9, 12, 8, 5, 5, 8, 4, 4, 5, 2, 5, 3, 1, 3, 3)
"""Mean passes by canvas of ten arithmetic problems at threshold 0.8 and T = 16 (third party, rounded): a recorded
example."""
