"""Which requests in self-speculation get a draft: those for which drafting brings more tokens per unit of time than AR.

A round is a draft (a denoise step) and its verification (a context step); a plain AR step gives every request one
token. Both kinds of step cost what they cost on this machine at this number of rows, which is measured as the engine
runs, and a request gets as many tokens a round as it got lately. So the rate of every choice is known, and the best is
taken: the requests are ordered by what they gain, and as many of them draft as makes the batch fastest. The output does
not depend on the choice.

What is expected may be wrong, so rounds are also paid for. An account, in AR steps, is debited with what every round
took and credited with what it brought; AR steps add a small share of themselves. In debt nobody drafts. So whatever the
text does, the requests together lose to AR that share and a few steps at most, as far as the measured costs are right.
One request may lose more: next to the drafts of others it gets fewer AR steps. Where drafting does not seem to pay, the
account is for tries, which all requests make together.

Invariants, pinned in ``tests/test_draft_policy.py``: the bound on what is lost, for any tokens and any costs; tries
grow rarer while they fail and never end; nobody drafts before an AR step has been measured; everybody drafts where a
forward costs the same with drafts or without and drafts are mostly right.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class StepClass(StrEnum):
    """Steps that cost alike."""

    DRAFT = "draft"
    VERIFY = "verify"
    DECODE = "decode"


EXPECTED_TOKENS = 3.0
"""Tokens a round assumed of the first request; counts as much as one round that was seen."""

NEWEST_SHARE = 0.1
"""Least weight of a request's newest round in its running mean."""

FORGETTING = 0.002
"""How far a request that takes AR steps while others draft is taken for one of them again, each round: a hard text may
have ended."""

RISE_SHARE, FALL_SHARE = 0.2, 0.5
"""Weights of a new measurement in its bucket's running mean, where it is above and below it: some ten steps to adapt,
and fewer to forget a step that was slow because it was among the first."""

MAX_SLOWDOWN = 3.0
"""A cost this many times above a new measurement is replaced by it: first steps compile and warm up."""

MAX_RISE = 1.5
"""A measurement counts as this many times the cost at most: a step now and then waits for something else."""

MIN_MEASURED, MAX_AGE = 2, 256
"""AR steps measured before anybody drafts, and measurements of other steps after which one more is wanted: where
everybody drafts, nothing else shows what AR steps cost by now."""

FIRST_CREDIT = 8.0
"""AR steps that the first tries of an engine may lose."""

MAX_LOSS, MIN_LOSS = 1e-2, 1e-3
"""Share of the time of AR steps that drafting may lose, and what it falls to while tries fail, by half each time."""

LOOK_AGAIN = 16
"""AR steps after which costs are looked at again, where only time was missing for a draft: a look at eight requests
takes two percent of a small model's step."""


BUCKETS = 2
"""Of costs, for every doubling of rows: requests that fall into the bucket of others seem to draft for nothing."""


NO_ROWS = -1
"""The bucket of no rows."""


def find_bucket(num_rows: int) -> int:
    """Where a number of rows has its costs."""
    return round(BUCKETS * math.log2(num_rows)) if num_rows else NO_ROWS


class StepKey(NamedTuple):
    """Steps that are taken to cost the same."""

    kind: StepClass
    rows: int
    """Bucket of the requests in it."""
    verified: int
    """Bucket of those whose draft is verified."""

    @classmethod
    def of(cls, kind: StepClass, num_rows: int, num_verified: int = 0) -> "StepKey":
        """The key of a step with so many requests, of which so many have their draft verified."""
        return cls(kind, find_bucket(num_rows), find_bucket(num_verified))


@dataclass
class Cost:
    """What is known of one key."""

    seconds: float
    num_measured: int = 0
    last: int = 0
    """The newest measurement, by its number among those of all keys."""


class StepCosts:
    """What steps cost by kind and number of rows: a running mean for every doubling of rows."""

    def __init__(self) -> None:
        self._known: dict[StepKey, Cost] = {}
        self._num_measured = 0

    def record(self, kind: StepClass, num_rows: int, seconds: float, num_verified: int = 0) -> None:
        """Take in one step."""
        self._num_measured += 1
        key = StepKey.of(kind, num_rows, num_verified)
        cost = self._known.setdefault(key, Cost(seconds))
        share = RISE_SHARE if seconds > cost.seconds else FALL_SHARE if MAX_SLOWDOWN * seconds > cost.seconds else 1.0
        cost.seconds += share * (min(seconds, MAX_RISE * cost.seconds) - cost.seconds)
        cost.num_measured, cost.last = cost.num_measured + 1, self._num_measured

    def is_decode_known(self, num_rows: int) -> bool:
        """Whether AR steps were measured at about this number of rows, and not long ago."""
        cost = self._known.get(StepKey.of(StepClass.DECODE, num_rows))
        return cost is not None and cost.num_measured >= MIN_MEASURED and self._num_measured - cost.last < MAX_AGE

    def estimate(self, kind: StepClass, num_rows: int, num_verified: int = 0) -> float:
        """Cost of a step. One that has never run is taken for as cheap as it can be, so that it is tried: drafts cost
        what the nearest number of them does, or less in proportion if they are fewer, and so does what a verification
        costs more than an AR step."""
        key = StepKey.of(kind, num_rows, num_verified)
        exact = self._known.get(key)
        if exact is not None:
            return exact.seconds
        own = [known for known in self._known if known.kind is kind]
        if kind is StepClass.VERIFY:
            decode = self.estimate(StepClass.DECODE, num_rows)
            if not own:
                return decode
            near = min(own, key=lambda known: abs(known.rows - key.rows) + abs(known.verified - key.verified))
            extra = self._known[near].seconds - self.estimate(StepClass.DECODE, round(2 ** (near.rows / BUCKETS)))
            return decode + max(extra, 0.0) * 2 ** min((key.verified - near.verified) / BUCKETS, 0)
        if not self._known:
            return 1.0
        near = min(own or self._known, key=lambda known: abs(known.rows - key.rows))
        fewer = 2 ** min((key.rows - near.rows) / BUCKETS, 0) if kind is StepClass.DRAFT else 1.0
        return self._known[near].seconds * fewer


class RunningMean:
    """Tokens a round: the plain mean of few rounds, the newer of many.

    Args:
        expected: counts as one round.

    """

    def __init__(self, expected: float) -> None:
        self.value = expected
        self._num_rounds = 1

    def record(self, num_tokens: int, least_share: float) -> None:
        """Take in one round, with a weight of ``least_share`` at least."""
        self._num_rounds += 1
        self.value += max(least_share, 1 / self._num_rounds) * (num_tokens - self.value)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round held."""

    num_passes: int
    """Denoise steps of its drafts."""
    num_drafts: int
    num_requests: int
    """All that took part, with a draft or an AR step."""


@dataclass
class Rest:
    """Nobody drafts until there is more credit, and until then nobody needs to ask."""

    credit: float
    """In AR steps, what would have been enough."""
    num_steps: int = LOOK_AGAIN
    """Steps left after which one looks again all the same."""


class DraftPolicy:
    """Chooses who drafts; learns from every round."""

    def __init__(self, costs: StepCosts | None = None) -> None:
        self.costs = costs or StepCosts()
        self._tokens: dict[str, RunningMean] = {}
        self._of_all = RunningMean(EXPECTED_TOKENS)
        self._credit = FIRST_CREDIT
        self._allowance = MAX_LOSS
        self._unpaid: Round | None = None  # the newest round
        self._num_requests = 1  # among whom it was
        self._rest: Rest | None = None

    def rest_one_step(self) -> bool:
        """Rest for one more step, an AR step for everybody, if the last answer was that and only time has passed since;
        whoever knows of new candidates says so before (``look_again``). Returns whether it rests."""
        rest = self._rest
        if rest is None or self._credit >= rest.credit or not rest.num_steps:
            self._rest = None
            return False
        rest.num_steps -= 1
        return True

    def look_again(self) -> None:
        """Somebody has come who may draft."""
        self._rest = None

    def choose(self, candidates: Sequence[str], num_passes: int, num_others: int) -> frozenset[str]:
        """Those of some requests that draft in the coming round.

        Args:
            candidates: ids of requests that could draft or take an AR step.
            num_passes: denoise steps that a draft takes.
            num_others: requests that take AR steps whatever is chosen.

        """
        self._charge_round()
        total = len(candidates) + num_others
        if not candidates or not self.costs.is_decode_known(total):
            return frozenset()
        ordered = sorted(candidates, key=self.expect_tokens, reverse=True)
        count = self._count_best(ordered, num_passes, total)
        if (needed := self._find_needed_credit(ordered, count, num_passes, total)) > self._credit:
            self._rest = Rest(needed)
            return frozenset()
        if count:
            self._allowance = MAX_LOSS
        else:
            count, self._allowance = len(ordered), max(self._allowance / 2, MIN_LOSS)
        for req_id in ordered[count:]:
            if req_id in self._tokens:
                mean = self._tokens[req_id]
                mean.value += FORGETTING * (self._of_all.value - mean.value)
        self._unpaid = Round(num_passes=num_passes, num_drafts=count, num_requests=total)
        self._num_requests = total
        return frozenset(ordered[:count])

    def _count_best(self, ordered: list[str], num_passes: int, total: int) -> int:
        """How many of the requests, the most promising first, draft where the batch is fastest."""
        best, best_rate, gained, cost = 0, float(total), 0.0, 1.0
        for count, req_id in enumerate(ordered, start=1):
            gained += self.expect_tokens(req_id)
            if find_bucket(count) != find_bucket(count - 1):
                cost = self._price_round(num_passes, count, total)
            rate = (gained + total - count) / cost
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _find_needed_credit(self, ordered: list[str], count: int, num_passes: int, total: int) -> float:
        """For a round that seems to pay, no debt; for one that does not, what it would lose."""
        gained = sum(self.expect_tokens(req_id) - 1 for req_id in ordered)
        loss = self._price_round(num_passes, len(ordered), total) - 1 - gained / total
        self._credit = min(self._credit, max(FIRST_CREDIT, loss))
        return 0 if count else loss

    def _price_round(self, num_passes: int, count: int, total: int) -> float:
        """Time of a round, in AR steps."""
        draft = self.costs.estimate(StepClass.DRAFT, count)
        verify = self.costs.estimate(StepClass.VERIFY, total, count)
        return (num_passes * draft + verify) / self.costs.estimate(StepClass.DECODE, total)

    def _charge_round(self) -> None:
        """Pay for the newest round, now that its steps have been measured; one AR step of it would have run anyway."""
        if (unpaid := self._unpaid) is not None:
            self._credit -= self._price_round(unpaid.num_passes, unpaid.num_drafts, unpaid.num_requests) - 1
            self._unpaid = None

    def record_decode_step(self) -> None:
        """An AR step without drafts has run."""
        self._credit += self._allowance

    def record_round(self, req_id: str, num_tokens: int) -> None:
        """A request got so many tokens from a verified draft."""
        if req_id not in self._tokens:
            self._tokens[req_id] = RunningMean(self._of_all.value)
        self._tokens[req_id].record(num_tokens, NEWEST_SHARE)
        self._of_all.record(num_tokens, NEWEST_SHARE / len(self._tokens))
        self._credit += (num_tokens - 1) / self._num_requests
        self.look_again()

    def expect_tokens(self, req_id: str) -> float:
        """Tokens of the request's next round: its own running mean, a newcomer's that of all."""
        return self._tokens.get(req_id, self._of_all).value

    def forget(self, req_id: str) -> None:
        """The request has ended."""
        self._tokens.pop(req_id, None)


class AlwaysDraft(DraftPolicy):
    """Everybody who can drafts, whatever steps cost: to show or to count what drafts bring."""

    def choose(self, candidates: Sequence[str], num_passes: int, num_others: int) -> frozenset[str]:
        """All of the candidates."""
        return frozenset(candidates)


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """A step that runs."""

    kind: StepClass
    num_rows: int
    num_verified: int
    started: float
    """In seconds of the timer's clock."""


class StepTimer:
    """Times the steps of an engine that schedules one after the other, from schedule to result.

    Args:
        costs: where the times go.
        clock: seconds, from any beginning.

    """

    def __init__(self, costs: StepCosts, clock: Callable[[], float] = time.perf_counter) -> None:
        self.costs = costs
        self.clock = clock
        self._running: TimedStep | None = None

    def begin(self, kind: StepClass, num_rows: int, num_verified: int = 0) -> None:
        """A step of one class begins."""
        self._running = TimedStep(kind=kind, num_rows=num_rows, num_verified=num_verified, started=self.clock())

    def end(self) -> None:
        """The step is over."""
        if (step := self._running) is not None:
            self.costs.record(step.kind, step.num_rows, self.clock() - step.started, step.num_verified)
        self._running = None
