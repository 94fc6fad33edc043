"""When finished canvases are committed: at a quorum, or when waiting stops paying.

A commit reads a whole tower for however many canvases share it, so early commits waste forwards; canvases that wait
idle waste passes. A quorum is the plain rule and the default.

``auto`` is the marginal value theorem (Charnov 1976: leave a patch when its rate of gain falls to the average rate).
Over the cycle from one commit to the next, count the *useful* work, each row's pass at its share of a full pass and
each committed canvas at its share of a full commit, per unit of time. Commit when one more pass would bring less per
unit of time than the cycle as a whole brings if it ends now. There is nothing to tune: the costs of steps
(``step_costs.py``) are all it knows, and the rate at which canvases finish it sees. ``benchmarks/results/policy.md``
compares the rules, and both with one that knows how many passes every canvas has left.
"""

from typing import Protocol

from vllm_twotower.core import StepKind
from vllm_twotower.runtime.step_costs import StepCosts

EXPECTED_PASSES = 6
"""Passes per canvas assumed before canvases were seen to finish; the weight of that guess is one canvas."""

HALF_LIFE_PASSES = 2000
"""Passes of rows after which an observation of the finishing rate counts half."""


class CommitTiming(Protocol):
    """Decides whether the finished canvases are committed now."""

    def is_due(self, finished: int, unfinished: int) -> bool:
        """Whether to commit ``finished`` canvases while ``unfinished`` could go on; both at least 1."""

    def denoised(self, unfinished: int, finished: int) -> None:
        """A denoise step ran over ``unfinished`` canvases while ``finished`` ones waited."""

    def committed(self) -> None:
        """A context step ran; it took every finished canvas along."""


class Quorum:
    """Commit when finished canvases are a fraction of all: 0 at once, 1 in lockstep.

    Args:
        fraction: from 0 to 1.

    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def is_due(self, finished: int, unfinished: int) -> bool:
        """As ``CommitTiming``."""
        return finished >= max(1, self.fraction * (finished + unfinished))

    def denoised(self, unfinished: int, finished: int) -> None:
        """Nothing is remembered."""

    def committed(self) -> None:
        """Nothing is remembered."""


class MarginalValue:
    """Commit when one more pass would bring less per unit of time than the cycle brings if it ends now.

    Args:
        costs: what steps cost, by rows.

    """

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._passes = 0.0  # of rows, since the last commit
        self._elapsed = 0.0
        self._waiting = 0
        self._seen_passes, self._seen_finished = float(EXPECTED_PASSES), 1.0

    def is_due(self, finished: int, unfinished: int) -> bool:
        """As ``CommitTiming``."""
        denoise = lambda rows: self.costs.cost(StepKind.DENOISE, rows)
        commit = lambda rows: self.costs.cost(StepKind.CONTEXT, rows)
        everyone = finished + unfinished
        worth_of_pass, worth_of_commit = denoise(everyone) / everyone, commit(everyone) / everyone
        expected = unfinished * self._finishing_rate(finished)
        average = (self._passes * worth_of_pass + finished * worth_of_commit) / (self._elapsed + commit(finished))
        gain = unfinished * worth_of_pass + expected * worth_of_commit
        time = denoise(unfinished) + commit(finished + expected) - commit(finished)
        return gain <= average * time

    def denoised(self, unfinished: int, finished: int) -> None:
        """As ``CommitTiming``."""
        self._count_finished(finished)
        self._passes += unfinished
        self._elapsed += self.costs.cost(StepKind.DENOISE, unfinished)
        fade = 0.5 ** (unfinished / HALF_LIFE_PASSES)
        self._seen_passes = self._seen_passes * fade + unfinished
        self._seen_finished *= fade

    def committed(self) -> None:
        """As ``CommitTiming``."""
        self._passes = self._elapsed = 0.0
        self._waiting = 0

    def _finishing_rate(self, finished: int) -> float:
        """Share of the unfinished canvases that a pass finishes; a canvas that ended its request is not seen."""
        self._count_finished(finished)
        return self._seen_finished / self._seen_passes

    def _count_finished(self, finished: int) -> None:
        self._seen_finished += max(0, finished - self._waiting)
        self._waiting = finished
