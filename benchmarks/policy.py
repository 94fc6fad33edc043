"""The step policy, measured on the real scheduler class: throughput over AR, time to first token, worst wait.

    python -m benchmarks.policy                       # five minutes on one idle core
    python -m benchmarks.policy --batches 16 64       # half a minute
    python -m benchmarks.policy --write               # also benchmarks/results/policy.json and policy.md

BlockCommitScheduler runs as in an engine; the model is played from a script (scripted_worker.py): passes per canvas are
drawn, the same for every policy, and steps take the time that vllm_twotower/planning/ prices them at. So this measures
decisions, not a GPU. Two workloads: `decoding` (long outputs, no prompts after the start) and `serving` (every client
sends its next prompt when an answer ends, so prompts keep arriving).
"""

import argparse
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

from vllm_twotower.runtime.step_costs import StepCosts

from benchmarks.machine import output_of
from benchmarks.roofline import CONFIG, REFERENCE, SETUPS, Setup, costs_of, read_towers, step_times
from benchmarks.scripted_worker import STEP_BUDGET, ScriptedRun, Tally, make_scheduler
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.planning.canvas_passes import THIRD_PARTY_COUNTS, CanvasPasses
from vllm_twotower.planning.forward_cost import Forward, Machine, context_step
from vllm_twotower.planning.gpus import Assumptions
from vllm_twotower.planning.throughput import StepTimes, Workload
from vllm_twotower.planning.tower_sizes import Part, Tower, TowerSizes

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = CONFIG.parent
"""The scheduler reads the config; there are no weights."""

RESULTS = ROOT / "benchmarks" / "results"
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 100, 128, 256)
POLICIES = {
    "lockstep": {"commit_quorum": 1},
    "commit at once": {"commit_quorum": 0},
    "quorum 0.4": {"commit_quorum": 0.4},
    "auto": {"commit_quorum": "auto"},
}
ORACLE = "knows passes left"
CANVASES_PER_ROW = 24
MIN_CANVASES = 1000


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    name: str
    prompt_tokens: int
    output_tokens: int


LOADS = (Load("decoding", 16, 3072), Load("serving", 512, 512))


class PassesLeft:
    """A rule that no scheduler can follow: it knows how many passes each canvas has left, and commits where the cycle
    then yields most useful work per second. How far the rules that can be followed are from it is what knowing would be
    worth."""

    def __init__(self, run: ScriptedRun, costs: StepCosts) -> None:
        self.run, self.costs = run, costs
        self.committed()

    def is_due(self, finished: int, unfinished: int) -> bool:
        left = [n for n in self.run.passes_left.values() if n]
        everyone = finished + unfinished
        cost = self.costs.cost
        worth = {kind: cost(kind, everyone) / everyone for kind in StepKind}
        passes, elapsed, yields = self._passes, self._elapsed, []
        for wait in range(max(left, default=0) + 1):
            ready = everyone - sum(n > wait for n in left)
            work = passes * worth[StepKind.DENOISE] + ready * worth[StepKind.CONTEXT]
            yields.append(work / (elapsed + cost(StepKind.CONTEXT, ready)))
            going = everyone - ready
            passes, elapsed = passes + going, elapsed + cost(StepKind.DENOISE, going)
        return yields[0] >= max(yields)

    def denoised(self, unfinished: int, finished: int) -> None:
        self._passes += unfinished
        self._elapsed += self.costs.cost(StepKind.DENOISE, unfinished)

    def committed(self) -> None:
        self._passes, self._elapsed = 0.0, 0.0


class WeightsOnly(Machine):
    """The prices of the first simulation of this model (the project's design notes): weights and products, no KV,
    states, logits or links. There a quorum of 0.4 reached 79% of perfect sharing at batch 64; kept to compare."""

    def seconds(self, sizes: TowerSizes, forward: Forward) -> float:
        cost = self.cost(sizes, forward)
        num_bytes = cost.dense_bytes + cost.expert_bytes + cost.head_bytes
        flops = 2 * (sizes.active_parameters + sizes.parameters[Part.EMBEDDING]) * forward.tokens
        memory_s = num_bytes / (self.gpu.bandwidth_Bps * self.assumed.memory_fraction)
        return max(memory_s, flops / (self.gpu.bf16_flops * self.assumed.compute_fraction))


class FirstPrices(StepTimes):
    """Steps at those prices."""

    @cached_property
    def machine(self) -> Machine:
        return WeightsOnly(gpu=self.gpu, assumed=self.assumed)


def perfect_s(times: StepTimes, batch: int, done: Tally) -> float:
    """Seconds for the same passes, commits and prompt tokens if every forward were full."""
    shape = context_step(batch, STEP_BUDGET, times.workload.context_length)
    per_prompt_token = times.machine.seconds(times.towers[Tower.CONTEXT], shape) / STEP_BUDGET
    shared = done.passes * times.denoise_s(batch) + done.commits * times.commit_s(batch)
    return shared / batch + done.prompt_tokens * per_prompt_token


def measure(times: StepTimes, batch: int, load: Load, policy: str, seed: int) -> dict:
    """One policy on one load, after a warm-up of a quarter."""
    options = POLICIES.get(policy, {})
    run = ScriptedRun(
        make_scheduler(str(MODEL), batch, options), times, batch, load.prompt_tokens, load.output_tokens, seed=seed
    )
    if policy == ORACLE:
        run.use(PassesLeft(run, costs_of(times)))
    end = max(MIN_CANVASES, CANVASES_PER_ROW * batch) * times.workload.canvas_length
    run.run_until(end // 4)
    before = run.tally.copy()
    run.tally.first_tokens_s, run.tally.waits_s = [], []
    run.run_until(end)
    done = _difference(run.tally, before)
    first = run.tally.first_tokens_s
    return {
        "policy": policy,
        "tokens_per_s": done.tokens / done.now_s,
        "of_perfect": perfect_s(times, batch, done) / done.now_s,
        "ttft_ms": statistics.mean(first) * 1e3 if first else None,
        "ttft_p99_ms": sorted(first)[int(0.99 * len(first))] * 1e3 if first else None,
        "worst_wait_ms": max(run.tally.waits_s) * 1e3,
        "steps": done.steps,
        "passes_per_canvas": done.passes / done.canvases,
    }


def _difference(after: Tally, before: Tally) -> Tally:
    return Tally(**{n: v - getattr(before, n) for n, v in vars(after).items() if not isinstance(v, list)})


def measure_ar(times: StepTimes, batch: int, load: Load) -> dict:
    """AR decoding of the same requests through the same scheduler."""
    scheduler = make_scheduler(str(MODEL), batch, {})
    run = ScriptedRun(scheduler, times, batch, load.prompt_tokens, min(load.output_tokens, 512), mode=Mode.AR)
    end = max(200, 80 * batch)
    run.run_until(end // 4)
    before = run.tally.copy()
    run.tally.first_tokens_s = []
    run.run_until(end)
    done, first = _difference(run.tally, before), run.tally.first_tokens_s
    return {"tokens_per_s": done.tokens / done.now_s, "ttft_ms": statistics.mean(first) * 1e3 if first else None}


@dataclass(frozen=True)
class Study:
    """A machine, its prices and a distribution of passes."""

    name: str
    setup: Setup
    passes: CanvasPasses
    batches: list[int]
    first_prices: bool = False

    def times(self, ar: bool) -> StepTimes:
        """Prices of the machine's steps."""
        times = step_times(read_towers(), self.setup, Workload(passes=self.passes), Assumptions(), ar)
        return FirstPrices(**{f.name: getattr(times, f.name) for f in fields(times)}) if self.first_prices else times


def studies_of(setup: Setup, batches: list[int], everything: bool) -> list[Study]:
    """The set-up asked for, and where everything is written, what else shows the rules' limits."""
    gamma, recorded = CanvasPasses(), CanvasPasses(recorded=tuple(THIRD_PARTY_COUNTS))
    drawn = "gamma-distributed passes, mean 5.9"
    found = [Study(f"{setup.name}, {drawn}", setup, gamma, batches)]
    if everything:
        some = [16, 64, 100]
        h200, fp8 = (next(s for s in SETUPS if s.name == n) for n in ("1 x H200 bf16", "2 x H100 fp8 colocated"))
        found += [
            Study(f"{h200.name}, {drawn}", h200, gamma, some),
            Study(f"{fp8.name}, {drawn}", fp8, gamma, some),
            Study(f"{setup.name}, recorded passes, mean {recorded.expected:.2f}", setup, recorded, some),
            Study(f"{h200.name}, {drawn}, first simulation's prices", h200, gamma, some, first_prices=True),
        ]
    return found


def compare(study: Study, seeds: int, report: Callable[[dict], None]) -> list[dict]:
    """Every policy at every batch on every load; means over seeds, the worst of waits."""
    times, ar_times, rows = study.times(ar=False), study.times(ar=True), []
    for load, batch in itertools.product(LOADS, study.batches):
        ar = measure_ar(ar_times, batch, load)
        for policy in (*POLICIES, ORACLE):
            runs = [measure(times, batch, load, policy, seed) for seed in range(seeds)]
            row = {"load": load.name, "batch": batch, "policy": policy, "ar_tokens_per_s": ar["tokens_per_s"]}
            for name, first in runs[0].items():
                if isinstance(first, float | int):
                    pick = max if name == "worst_wait_ms" else statistics.mean
                    row[name] = pick([run[name] for run in runs])
            row["over_ar"] = row["tokens_per_s"] / ar["tokens_per_s"]
            rows.append(row)
            report(row)
    return rows


def table(rows: list[dict], load: str, column: str, digits: int) -> str:
    """Batches down, policies across."""
    shown = [row for row in rows if row["load"] == load and row.get(column) is not None]
    policies = list(dict.fromkeys(row["policy"] for row in shown))
    by_batch: dict[int, dict[str, float]] = {}
    for row in shown:
        by_batch.setdefault(row["batch"], {})[row["policy"]] = row[column]
    lines = ["| batch | " + " | ".join(policies) + " |", "|" + " --- |" * (len(policies) + 1)]
    for batch, cells in by_batch.items():
        lines.append(f"| {batch} | " + " | ".join(f"{cells[p]:,.{digits}f}" for p in policies) + " |")
    return "\n".join(lines)


def page(result: dict) -> str:
    """The results as Markdown."""
    parts = [
        "# Step policies on the real scheduler",
        f"Made by `{result['command']}` at commit {result['commit']}; see the top of `benchmarks/policy.py`.",
        "An estimate: decisions are the engine's own, prices of steps are not measured (`docs/roofline.md`).",
        "*Of perfect sharing*: the time that the same passes, commits and prompt tokens would take if every forward\n"
        "were full, over the time they took. `lockstep`, `commit at once`, `quorum 0.4` (the default) and `auto` are\n"
        "the engine option `commit_quorum` at 1, 0, 0.4 and auto, whose costs are measured on the benchmark's clock;\n"
        f"`{ORACLE}` is no rule but a bound: it sees how many passes each canvas has left.",
    ]
    for name, rows in result["studies"].items():
        parts.append(f"## {name}")
        for load in LOADS:
            for title, column, digits in (
                ("of perfect sharing", "of_perfect", 3),
                ("tokens per second over AR", "over_ar", 2),
                ("mean time to first token, ms", "ttft_ms", 0),
                ("longest that any request waited to be in a step, ms", "worst_wait_ms", 0),
            ):
                if column == "ttft_ms" and load.name == "decoding":
                    continue
                parts.append(f"{load.name}: {title}\n\n{table(rows, load.name, column, digits)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--setup", choices=[s.name for s in SETUPS], default=REFERENCE.name)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    setup = next(s for s in SETUPS if s.name == args.setup)
    result = {"command": command(args), "commit": commit(), "seeds": args.seeds, "studies": {}}
    for study in studies_of(setup, args.batches, everything=args.write):
        print(study.name)
        result["studies"][study.name] = compare(study, args.seeds, print_row)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "policy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "policy.md").write_text(page(result), encoding="utf-8")


def command(args: argparse.Namespace) -> str:
    """What to type to get the same."""
    setup = "" if args.setup == REFERENCE.name else f" --setup '{args.setup}'"
    return f"python -m benchmarks.policy --write --seeds {args.seeds}{setup}"


def commit() -> str:
    """The commit that was run; `+` for changes on top of it."""
    changed = output_of("git", "status", "--porcelain", "vllm_twotower")
    return output_of("git", "rev-parse", "--short", "HEAD") + ("+" if changed else "")


def print_row(row: dict) -> None:
    ttft = f"  first token {row['ttft_ms']:.0f} ms" if row.get("ttft_ms") else ""
    print(
        f"  {row['load']:<9} {row['batch']:>4} {row['policy']:<22} of perfect {row['of_perfect']:.3f}  over AR "
        f"{row['over_ar']:.2f}  worst wait {row['worst_wait_ms']:.0f} ms{ttft}",
        flush=True,
    )


if __name__ == "__main__":
    main()
