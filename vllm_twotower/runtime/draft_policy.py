"""Which requests in self-speculation get a draft: those for which drafting brings more tokens per unit of time than AR.

A round is a draft (a denoise step) and its verification (a context step); a plain AR step gives every request one
token. Both kinds of step cost what they cost on this machine at this number of rows, which is measured as the engine
runs, and a request gets as many tokens a round as it got lately. So the rate of every choice is known, and the best is
taken: the requests are ordered by what they gain, and as many of them draft as makes the batch fastest. The output does
not depend on the choice.

Invariants, pinned in ``tests/test_draft_policy.py``: nobody drafts where drafts are never right, but for a try now and
then, which all requests make together and which grow rarer while they fail; everybody drafts where a forward costs the
same with drafts or without and drafts are mostly right.
"""

import math
import time
from collections.abc import Callable, Sequence
from enum import StrEnum


class StepClass(StrEnum):
    """Steps that cost alike."""

    DRAFT = "draft"
    VERIFY = "verify"
    DECODE = "decode"


EXPECTED_TOKENS = 3.0
"""Tokens a round assumed of the first request."""

NEWEST_SHARE = 0.25
"""Weight of a request's newest round in its running mean."""

NEWEST_COST_SHARE = 0.2
"""Weight of a new measurement in its bucket's running mean: some ten steps to adapt."""

MAX_SLOWDOWN = 3.0
"""A cost this many times above a new measurement is replaced by it: first steps compile and warm up."""

MAX_RISE = 1.5
"""A measurement counts as this many times the cost at most: a step now and then waits for something else."""

FIRST_WAIT, LONGEST_WAIT = 32, 512
"""AR steps until drafting is tried again, and the most they grow to while it does not pay."""


class StepCosts:
    """What steps cost by kind and number of rows: a running mean for every doubling of rows."""

    def __init__(self) -> None:
        self._mean: dict[tuple[StepClass, int], float] = {}

    def record(self, kind: StepClass, num_rows: int, seconds: float) -> None:
        """Take in one step."""
        key = kind, round(math.log2(num_rows))
        old = self._mean.get(key, seconds)
        share = 1.0 if old > MAX_SLOWDOWN * seconds else NEWEST_COST_SHARE
        self._mean[key] = old + share * (min(seconds, MAX_RISE * old) - old)

    def estimate(self, kind: StepClass, num_rows: int) -> float:
        """Cost of a step; what was measured at the nearest number of rows, of any kind where this one has never run."""
        if not num_rows:
            return 0.0
        wanted = math.log2(num_rows)
        own = [key for key in self._mean if key[0] is kind]
        keys = own or list(self._mean)
        return self._mean[min(keys, key=lambda key: abs(key[1] - wanted))] if keys else 1.0


class DraftPolicy:
    """Chooses who drafts; learns from every round.

    Args:
        costs: of steps.

    """

    def __init__(self, costs: StepCosts | None = None) -> None:
        self.costs = costs or StepCosts()
        self._tokens: dict[str, float] = {}
        self._mean_tokens = EXPECTED_TOKENS
        self._steps_to_wait = 0
        self._wait = FIRST_WAIT

    def choose(self, candidates: Sequence[str], num_passes: int, num_others: int) -> frozenset[str]:
        """Those of some requests that draft in the coming round.

        Args:
            candidates: ids of requests that could draft or take an AR step.
            num_passes: denoise steps that a draft takes.
            num_others: requests that take AR steps whatever is chosen.

        """
        if not candidates:
            return frozenset()
        ordered = sorted(candidates, key=self.expect_tokens, reverse=True)
        total = len(ordered) + num_others
        best, best_rate = 0, total / self.costs.estimate(StepClass.DECODE, total)
        gained = 0.0
        for count, req_id in enumerate(ordered, start=1):
            gained += self.expect_tokens(req_id)
            cost = num_passes * self.costs.estimate(StepClass.DRAFT, count) + self.costs.estimate(
                StepClass.VERIFY, total
            )
            rate = (gained + total - count) / cost
            if rate > best_rate:
                best, best_rate = count, rate
        if best:
            self._wait, self._steps_to_wait = FIRST_WAIT, 0
            return frozenset(ordered[:best])
        return self._try_again(ordered)

    def _try_again(self, ordered: list[str]) -> frozenset[str]:
        if self._steps_to_wait > 0:
            return frozenset()
        self._steps_to_wait, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        return frozenset(ordered)

    def record_decode_step(self) -> None:
        """An AR step without drafts has run."""
        self._steps_to_wait = max(0, self._steps_to_wait - 1)

    def record_round(self, req_id: str, num_tokens: int) -> None:
        """A request got so many tokens from a verified draft."""
        old = self._tokens.get(req_id, self._mean_tokens)
        self._tokens[req_id] = old + NEWEST_SHARE * (num_tokens - old)
        self._mean_tokens += NEWEST_SHARE / max(1, len(self._tokens)) * (num_tokens - self._mean_tokens)

    def expect_tokens(self, req_id: str) -> float:
        """Tokens of the request's next round: its own running mean, a newcomer's that of all."""
        return self._tokens.get(req_id, self._mean_tokens)

    def forget(self, req_id: str) -> None:
        """The request has ended."""
        self._tokens.pop(req_id, None)


class StepTimer:
    """Times the steps of an engine that schedules one after the other, from schedule to result.

    Args:
        costs: where the times go.
        clock: seconds, from any beginning.

    """

    def __init__(self, costs: StepCosts, clock: Callable[[], float] = time.perf_counter) -> None:
        self.costs = costs
        self.clock = clock
        self._running: tuple[StepClass, int, float] | None = None

    def begin(self, kind: StepClass, num_rows: int) -> None:
        """A step of one class begins."""
        self._running = kind, num_rows, self.clock()

    def end(self) -> None:
        """The step is over."""
        if self._running is not None:
            kind, num_rows, started = self._running
            self.costs.record(kind, num_rows, self.clock() - started)
        self._running = None
