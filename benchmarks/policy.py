"""The step policy, measured on the real scheduler class: throughput over AR, time to first token, worst wait.

    python -m benchmarks.policy                       # two minutes on one core
    python -m benchmarks.policy --batches 16 64       # a part of it
    python -m benchmarks.policy --write               # also benchmarks/results/policy.json and policy.md

BlockCommitScheduler runs as in an engine; the model is played from a script (scripted_worker.py): passes per canvas are
drawn, the same for every policy, and steps take the time that vllm_twotower/planning/ prices them at. So this measures
decisions, not a GPU. Two workloads: `decoding` (long outputs, no prompts after the start) and `serving` (every client
sends its next prompt when an answer ends, so prompts keep arriving).
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.machine import output_of
from benchmarks.paths import REAL_MODEL, RESULTS
from benchmarks.roofline import REFERENCE, SETUPS, Setup, read_towers, step_times
from benchmarks.scripted_worker import STEP_BUDGET, ScriptedRun, Tally, make_scheduler
from vllm_twotower.core import Mode
from vllm_twotower.planning.assumptions import MEMORY_FLOOR
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.planning.forward_cost import context_step
from vllm_twotower.planning.throughput import StepTimes, Workload
from vllm_twotower.planning.tower_sizes import Tower

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 100, 128, 256)
POLICIES = {
    "lockstep": {"commit_quorum": 1},
    "commit at once": {"commit_quorum": 0},
    "quorum 0.4": {"commit_quorum": 0.4},
}
CANVASES_PER_ROW = 24
MIN_CANVASES = 1000


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    name: str
    prompt_tokens: int
    output_tokens: int


LOADS = (Load("decoding", 16, 3072), Load("serving", 512, 512))


def perfect_s(times: StepTimes, batch: int, done: Tally) -> float:
    """Seconds for the same passes, commits and prompt tokens if every forward were full."""
    shape = context_step(batch, STEP_BUDGET, times.workload.context_length)
    per_prompt_token = times.machine.seconds(times.towers[Tower.CONTEXT], shape) / STEP_BUDGET
    shared = done.passes * times.denoise_s(batch) + done.commits * times.commit_s(batch)
    return shared / batch + done.prompt_tokens * per_prompt_token


def measure(times: StepTimes, batch: int, load: Load, policy: str, seed: int) -> dict:
    """One policy on one load, after a warm-up of a quarter."""
    scheduler = make_scheduler(str(REAL_MODEL), batch, POLICIES[policy])
    run = ScriptedRun(scheduler, times, batch, load.prompt_tokens, load.output_tokens, seed=seed)
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
    scheduler = make_scheduler(str(REAL_MODEL), batch, {})
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

    setup: Setup
    batches: list[int]
    passes: CanvasPasses = field(default_factory=CanvasPasses)

    @property
    def name(self) -> str:
        return f"{self.setup.name}, gamma-distributed passes, mean {self.passes.mean}"

    def times(self, ar: bool) -> StepTimes:
        """Prices of the machine's steps."""
        return step_times(read_towers(), self.setup, Workload(passes=self.passes), MEMORY_FLOOR, ar)


def list_studies(setup: Setup, batches: list[int], everything: bool) -> list[Study]:
    """The set-up asked for, and where everything is written, two others."""
    others = ("1 x H200 bf16", "2 x H100 fp8 colocated") if everything else ()
    return [Study(setup, batches), *(Study(s, [16, 64, 100]) for s in SETUPS if s.name in others)]


def compare(study: Study, seeds: int, report: Callable[[dict], None]) -> list[dict]:
    """Every policy at every batch on every load; means over seeds, the worst of waits."""
    times, ar_times, rows = study.times(ar=False), study.times(ar=True), []
    for load, batch in itertools.product(LOADS, study.batches):
        ar = measure_ar(ar_times, batch, load)
        for policy in POLICIES:
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
        "were full, over the time they took. `lockstep`, `commit at once` and `quorum 0.4` (the default) are the\n"
        "engine option `commit_quorum` at 1, 0 and 0.4.",
        "A rule that weighed what one more pass brings against what the cycle since the last commit brings was\n"
        "within 2 % of the quorum from 8 to 100 requests, and so was a bound that knew how many passes every canvas\n"
        "has left. The rule is gone; this file's history in git has the figures.",
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
    for study in list_studies(setup, args.batches, everything=args.write):
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
