"""What a step costs by how many requests it holds: the scheduler's idea of the machine.

Only ratios matter to the step policy, so the numbers may be seconds or anything proportional to them.
"""

import bisect
import math
import time
from collections.abc import Callable, Mapping, Sequence

from vllm_twotower.core import StepKind

Points = Sequence[tuple[float, float]]
"""Pairs of rows and cost, in ascending order of rows."""

OPTION_NAMES = {StepKind.DENOISE: "denoise", StepKind.CONTEXT: "commit"}
"""Keys of a table of costs in the engine option."""

BUCKETS_PER_DOUBLING = 2
NEWEST_SHARE = 0.2
"""Weight of a new measurement in its bucket's running mean: some ten steps to adapt."""

MAX_SLOWDOWN = 3.0
"""A running mean this many times above a new measurement is replaced by it."""

_FLAT: Mapping[StepKind, Points] = dict.fromkeys(StepKind, ((1.0, 1.0),))


class StepCosts:
    """Cost of a denoise step over so many canvases, and of a commit of so many; straight lines between known points.

    Args:
        points: for each kind of step, rows and cost; rows ascending.

    """

    def __init__(self, points: Mapping[StepKind, Points]) -> None:
        self._points = {kind: [tuple(pair) for pair in points[kind]] for kind in StepKind}  # JSON has lists

    @classmethod
    def flat(cls) -> "StepCosts":
        """Every step costs the same, however many rows it holds: the weights are what is read."""
        return cls(_FLAT)

    @classmethod
    def from_option(cls, option: str | Mapping[str, Points]) -> "StepCosts":
        """The engine option ``step_costs``: ``measured``, or a table by kind."""
        if isinstance(option, str):
            return MeasuredCosts()
        return cls({kind: option[name] for kind, name in OPTION_NAMES.items()})

    def cost(self, kind: StepKind, rows: float) -> float:
        """Cost of a step; a line beyond the last two points, the first point's below it."""
        points = self._points[kind]
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        after = min(bisect.bisect_left(points, (rows, 0.0)), len(points) - 1)
        (left, low), (right, high) = points[after - 1], points[after]
        return max(low + (high - low) * (rows - left) / (right - left), 1e-3 * low)


class MeasuredCosts(StepCosts):
    """Costs calibrated on the engine's own steps: a running mean per bucket of rows, two buckets per doubling.

    A kind of step that has never run is taken to cost what the other does.

    Args:
        clock: seconds, from any beginning.

    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(_FLAT)
        self.clock = clock
        self._buckets: dict[StepKind, dict[int, tuple[float, float]]] = {kind: {} for kind in StepKind}
        self._running: tuple[StepKind, int, float] | None = None

    def step_started(self, kind: StepKind, rows: int) -> None:
        """A step begins that is typical for its kind."""
        self._running = (kind, rows, self.clock())

    def step_ended(self) -> None:
        """The step that was told of, if there was one, is over."""
        if self._running is not None:
            kind, rows, started = self._running
            self.record(kind, rows, self.clock() - started)
        self._running = None

    def record(self, kind: StepKind, rows: int, seconds: float) -> None:
        """Take in one step's time."""
        buckets, index = self._buckets[kind], round(BUCKETS_PER_DOUBLING * math.log2(rows))
        old_rows, old_seconds = buckets.get(index, (rows, seconds))
        # first steps compile and warm up; what is several times slower than the next is no measurement
        share = 1.0 if old_seconds > MAX_SLOWDOWN * seconds else NEWEST_SHARE
        buckets[index] = (old_rows + share * (rows - old_rows), old_seconds + share * (seconds - old_seconds))
        self._points[kind] = sorted(buckets.values())
        (other,) = set(StepKind) - {kind}
        if not self._buckets[other]:
            self._points[other] = self._points[kind]
