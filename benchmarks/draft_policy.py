"""The draft policy on the real scheduler: is self-speculation ever slower than AR, and what does it gain?

    python -m benchmarks.draft_policy                       # five minutes on one core
    python -m benchmarks.draft_policy --batches 1 16        # a part of it
    python -m benchmarks.draft_policy --write               # also benchmarks/results/draft-policy.md and .json

BlockCommitScheduler runs as in an engine, and its draft policy learns as in one: from tokens that rounds bring and from
the time that steps take. Both are made up (scripted_worker.py): tokens a round are drawn, the same for every policy,
and steps take the time that vllm_twotower/planning/ prices them at for the 30B model, at the memory floor. So this
measures decisions, not a GPU.
Learning counts: the clock runs from the first request on, and no run starts with what another has learned.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.markdown_table import table
from benchmarks.paths import REAL_MODEL, RESULTS
from benchmarks.policy import commit
from benchmarks.roofline import REFERENCE, SETUPS, Setup, read_towers, step_times
from benchmarks.roofline_parts.self_speculation import RoundPrices
from benchmarks.scripted_worker import DraftingRun, client_of, make_scheduler
from vllm_twotower.planning.assumptions import MEMORY_FLOOR
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.planning.throughput import Workload
from vllm_twotower.runtime.draft_policy import DraftPolicy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS_PER_CLIENT, MIN_TOKENS = 512, 4096
"""Length of a run, whichever gives more."""
TARGET = 0.97
"""Of AR's throughput: no workload may be below it at any batch."""

DEMO_ROUNDS = (8, 4, 21, 15, 6, 22, 12, 8, 11, 5, 7, 6, 4, 5, 4, 26)
"""Of 164 rounds of the demo model's plain towers on 88 held-out questions (one pass, hints above 0.95, the last round
of each answer left out), how many brought 1, 2, ... 16 tokens."""
PROSE_ACCEPTANCE = 1 / 3
"""Chance of every further draft to be kept: 1.5 tokens a round, as the demo model has in prose."""

Kind = str
DEMO, PROSE = "demo-like", "prose-like"
TURN = 256
"""Tokens after which a text that turns is of the other kind."""


def draw_tokens(kind: Kind, client: int, position: int) -> int:
    """Tokens that a round would bring a client that has got ``position`` tokens so far; the same whoever drafts."""
    source = random.Random(f"{kind} {client} {position}")
    if kind == DEMO:
        return source.choices(range(1, len(DEMO_ROUNDS) + 1), DEMO_ROUNDS)[0]
    return 1 + next(n for n in itertools.count() if source.random() >= PROSE_ACCEPTANCE)


@dataclass(frozen=True)
class Load:
    """What clients ask for, one request after the other."""

    name: str
    kinds: tuple[Kind, ...]
    """From client to client, or, where texts turn, in time."""
    turns: bool = False
    prompt_tokens: int = 16
    output_tokens: int = 1024

    @property
    def is_mixed(self) -> bool:
        """Whether clients differ."""
        return len(self.kinds) > 1 and not self.turns

    def list_clients(self, kind: Kind, batch: int) -> list[int]:
        """Those whose texts are always of one kind."""
        return [client for client in range(batch) if self.is_mixed and self.kind_at(client, 0) == kind]

    def kind_at(self, client: int, position: int) -> Kind:
        """Of the text at a position."""
        return self.kinds[(position // TURN if self.turns else client) % len(self.kinds)]

    def rounds_of(self, client: int) -> Callable[[int], int]:
        """Position in what a client gets -> tokens that a round would bring there."""
        return lambda position: draw_tokens(self.kind_at(client, position), client, position)


LOADS = (
    Load("demo-like", (DEMO,)),
    Load("prose-like", (PROSE,)),
    Load("mixed", (DEMO, PROSE)),
    Load("turning", (DEMO, PROSE), turns=True),
    Load("mixed, with prompts", (DEMO, PROSE), prompt_tokens=512, output_tokens=512),
)
SETUPS_WRITTEN = ("1 x H200 bf16", REFERENCE.name)


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
    """Tokens per second of one run, by client."""

    of_client: list[float]

    def sum_over(self, clients: Collection[int]) -> float:
        """Tokens per second of some clients together."""
        return sum(self.of_client[client] for client in clients)


def run_load(prices: RoundPrices, load: Load, batch: int, policy: DraftPolicy | None) -> Rates:
    """One policy, or AR requests where it is None, from the first request on."""
    rounds = [load.rounds_of(client) for client in range(batch)]
    scheduler = make_scheduler(str(REAL_MODEL), batch, {})
    run = DraftingRun(scheduler, prices, rounds, load.prompt_tokens, load.output_tokens, policy)
    run.run_until(max(MIN_TOKENS, TOKENS_PER_CLIENT * batch))
    return Rates([run.tokens_of_client[client] / run.tally.now_s for client in range(batch)])


def compare_policies(prices: RoundPrices, load: Load, batch: int) -> dict[str, str | int | float]:
    """The draft policy and constant choices, as throughput over AR's.

    Returns:
        ``best constant`` is the best of the choices that never change: nobody, everybody, or, where clients differ, the
        demo-like ones; ``prose-like alone`` is the speed of the others.

    """
    everybody, demo, prose = range(batch), load.list_clients(DEMO, batch), load.list_clients(PROSE, batch)
    ar = run_load(prices, load, batch, None)
    over_ar = lambda rates, clients=everybody: rates.sum_over(clients) / ar.sum_over(clients)
    chosen = run_load(prices, load, batch, DraftPolicy())
    always = over_ar(run_load(prices, load, batch, FixedDrafters(everybody)))
    constant = {"AR": 1.0, "all": always}
    if demo and prose:
        constant[DEMO] = over_ar(run_load(prices, load, batch, FixedDrafters(demo)))
    best = max(constant, key=lambda name: constant[name])
    row: dict[str, str | int | float] = {"load": load.name, "batch": batch, "policy": over_ar(chosen), "always": always}
    row |= {"best constant": constant[best], "who": best}
    if demo and prose:
        row["prose-like alone"] = over_ar(chosen, prose)
    return row


def make_prices(setup: Setup, num_passes: int = 1) -> RoundPrices:
    """Of the 30B model's steps; every pass of a draft has its logits at the positions masked on average."""
    passes = CanvasPasses(mean=num_passes)
    return RoundPrices(times=step_times(read_towers(), setup, Workload(passes=passes), MEMORY_FLOOR))


def list_break_evens(setup: Setup) -> list[dict[str, str]]:
    """Tokens a round from which drafting for all beats AR, by batch and passes a draft."""
    prices = {num_passes: make_prices(setup, num_passes) for num_passes in (1, 2, 3)}
    name = lambda num_passes: f"{num_passes} pass" + "es" * (num_passes > 1)
    return [
        {"batch": str(batch), **{name(n): f"{p.break_even_tokens(batch, n):.1f}" for n, p in prices.items()}}
        for batch in BATCHES
    ]


def show_row(row: dict[str, str | int | float]) -> dict[str, str]:
    """A row's cells as they are printed."""
    return {name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in row.items()}


def write_page(command: str, results: dict[str, list[dict[str, str | int | float]]]) -> str:
    """The results as Markdown."""
    lines = [
        "# The draft policy on the real scheduler",
        "",
        f"Made by `{command}` at commit {commit()}; see the top of `benchmarks/draft_policy.py`.",
        "",
        "An estimate: decisions are the engine's own, tokens a round are drawn, and the prices of steps are counted",
        "for the 30B model, not measured (`docs/roofline.md`). **No GPU has run it.**",
        "",
        "Throughput over that of AR for the same requests through the same scheduler, from the first request on.",
        "`demo-like` texts bring 8.2 tokens a round on average, with the demo model's spread, `prose-like` ones 1.5.",
        "In `mixed` every other client's are prose; all that are `turning` change from one kind to the other every",
        f"{TURN} tokens, at the same time. With prompts: 512 tokens before every 512.",
        "",
        f"`policy` is the engine's; its target is {TARGET} or more. `always` drafts for everybody. `best constant` is",
        "the best of drafting for nobody, for everybody and for the demo-like clients; `who` says which.",
        "`prose-like alone` is the speed of the prose-like clients over AR's: where their neighbours draft, they get a",
        "token or two a round instead of one a forward. **The policy chooses for the batch, not for each request.**",
    ]
    for setup, rows in results.items():
        lines += ["", f"## {setup}"]
        for load in LOADS:
            of_load = [{k: v for k, v in show_row(r).items() if k != "load"} for r in rows if r["load"] == load.name]
            lines += ["", f"{load.name}:", "", *table(align_columns(of_load))]
        lines += ["", "Tokens a round from which drafting for everybody beats AR, by passes a draft:", ""]
        lines += table(list_break_evens(next(s for s in SETUPS if s.name == setup)))
    return "\n".join(lines) + "\n"


def align_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Every row with the columns of the longest; what is missing is empty."""
    names = max(rows, key=len)
    return [{name: row.get(name, "") for name in names} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--setups", nargs="+", choices=[s.name for s in SETUPS], default=list(SETUPS_WRITTEN))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results = {}
    for setup in (s for s in SETUPS if s.name in args.setups):
        print(setup.name)
        prices = make_prices(setup)
        results[setup.name] = []
        for load, batch in itertools.product(LOADS, args.batches):
            results[setup.name].append(compare_policies(prices, load, batch))
            print("  " + "  ".join(f"{k} {v}" for k, v in show_row(results[setup.name][-1]).items()), flush=True)
    if args.write:
        command = "python -m benchmarks.draft_policy --write"
        (RESULTS / "draft-policy.md").write_text(write_page(command, results), encoding="utf-8")
        record = {"command": command, "commit": commit(), "results": results}
        (RESULTS / "draft-policy.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
