"""The draft policy on the real scheduler: is self-speculation ever slower than AR, and what does it gain?

    python -m benchmarks.draft_policy                       # TIME
    python -m benchmarks.draft_policy --batches 1 16        # a part of it
    python -m benchmarks.draft_policy --write               # also benchmarks/results/draft-policy.md

BlockCommitScheduler runs as in an engine, and its draft policy learns as in one: from tokens that rounds bring and from
the time that steps take. Both are made up (scripted_worker.py): tokens a round are drawn, the same for every policy,
and steps take the time that roofline_parts/ prices them at for the 30B model. So this measures decisions, not a GPU.
Learning counts: the clock runs from the first request on, and no run starts with what another has learned.
"""

import argparse
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.markdown_table import table
from benchmarks.paths import REAL_MODEL, RESULTS
from benchmarks.policy import commit
from benchmarks.roofline import REFERENCE, SETUPS, Setup, read_towers, step_times
from benchmarks.roofline_parts.canvas_passes import CanvasPasses
from benchmarks.roofline_parts.gpus import Assumptions
from benchmarks.roofline_parts.self_speculation import RoundPrices
from benchmarks.roofline_parts.throughput import Workload
from benchmarks.scripted_worker import DraftingRun, client_of, make_scheduler
from vllm_twotower.runtime.draft_policy import DraftPolicy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS_PER_CLIENT, MIN_TOKENS = 1024, 4096
"""Length of a run, whichever gives more."""
TARGET = 0.97
"""Of AR's throughput: no workload may be below it at any batch."""

DEMO_ROUNDS = (8, 4, 21, 15, 6, 22, 12, 8, 11, 5, 7, 6, 4, 5, 4, 26)
"""Of 164 rounds of the demo model's plain towers on 88 held-out questions (one pass, hints above 0.95, the last round
of each answer left out), how many brought 1, 2, ... 16 tokens."""
PROSE_ACCEPTANCE = 1 / 3
"""Chance of every further draft to be kept: 1.5 tokens a round, as the demo model has in prose."""

Kind = str
DEMO, PROSE = "demo", "prose"


def draw_rounds(kind: Kind, client: int) -> Iterator[int]:
    """Tokens that a client's rounds would bring, without end; the same whoever drafts."""
    source = random.Random(f"{kind} {client}")
    while True:
        if kind == DEMO:
            yield source.choices(range(1, len(DEMO_ROUNDS) + 1), DEMO_ROUNDS)[0]
        else:
            yield 1 + next(n for n in itertools.count() if source.random() >= PROSE_ACCEPTANCE)


@dataclass(frozen=True)
class Load:
    """What clients ask for, one request after the other; kinds alternate from client to client."""

    name: str
    kinds: tuple[Kind, ...]
    prompt_tokens: int = 16
    output_tokens: int = 1024

    def kind_of(self, client: int) -> Kind:
        """Of all requests of a client."""
        return self.kinds[client % len(self.kinds)]


LOADS = (
    Load("demo-like", (DEMO,)),
    Load("prose-like", (PROSE,)),
    Load("mixed", (DEMO, PROSE)),
)


class FixedDrafters(DraftPolicy):
    """The same clients draft in every round; for comparison.

    Args:
        clients: who.

    """

    def __init__(self, clients: Collection[int]) -> None:
        super().__init__()
        self._clients = clients

    def choose(self, candidates: Sequence[str], num_passes: int, num_others: int) -> frozenset[str]:
        """Those of the candidates that belong to the clients."""
        return frozenset(req_id for req_id in candidates if client_of(req_id) in self._clients)


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one run."""

    tokens_per_s: float
    of_kind: dict[Kind, float]
    tokens_per_draft: float


def run_load(prices: RoundPrices, load: Load, batch: int, policy: DraftPolicy | None) -> Rates:
    """One policy, or AR requests where it is None, from the first request on."""
    rounds = [draw_rounds(load.kind_of(client), client) for client in range(batch)]
    scheduler = make_scheduler(str(REAL_MODEL), batch, {})
    run = DraftingRun(scheduler, prices, rounds, load.prompt_tokens, load.output_tokens, policy)
    run.run_until(max(MIN_TOKENS, TOKENS_PER_CLIENT * batch))
    of_kind = dict.fromkeys(load.kinds, 0.0)
    for client, tokens in run.tokens_of_client.items():
        of_kind[load.kind_of(client)] += tokens / run.tally.now_s
    return Rates(run.tally.tokens / run.tally.now_s, of_kind, run.num_drafts)
