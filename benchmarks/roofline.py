"""Roofline of the 30B-A3B model: AR decoding against mask diffusion over batch size, placement, GPU and precision.

    python -m benchmarks.roofline             # tables to the terminal
    python -m benchmarks.roofline --write     # docs/roofline.md's tables, docs/roofline.png, results/roofline.json
    python -m benchmarks.roofline --fit       # the fixed time of a forward beside the published runs it is fitted to

An estimate by bytes and FLOPs (vllm_twotower/planning/), no measurement: no GPU is touched, nothing is loaded. Twice:
at the memory floor, and with the fixed time per forward that others measured. --write needs matplotlib (the `bench`
extra).
"""

import argparse
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.paths import REAL_MODEL, RESULTS, ROOT
from benchmarks.roofline_parts.published import compare
from vllm_twotower.planning.assumptions import MEMORY_FLOOR, WITH_OVERHEAD, Assumptions
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.planning.forward_cost import (
    Machine,
    ar_step,
    context_step,
    denoise_pass,
    expected_experts,
)
from vllm_twotower.planning.gpus import B200, GPUS, H100, H200, Gpu
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.placement import Placement, Towers, fit_towers
from vllm_twotower.planning.throughput import StepTimes, Workload, ar_tokens_per_s, diffusion_tokens_per_s
from vllm_twotower.planning.tower_sizes import Precision, Tower, TowerSizes

CONFIG = REAL_MODEL / "config.json"
PAGE = ROOT / "docs" / "roofline.md"
PICTURE = ROOT / "docs" / "roofline.png"
RESULT = RESULTS / "roofline.json"

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BREAKDOWN_BATCHES = (1, 8, 64, 256)
PASSES = (2.0, 3.0, 4.0, 5.9, 8.0)
CASES = {"overhead": WITH_OVERHEAD, "floor": MEMORY_FLOOR}


@dataclass(frozen=True)
class Setup:
    """GPUs, placement and precision."""

    gpu: Gpu
    num_gpus: int
    placement: Placement
    precision: Precision

    @property
    def name(self) -> str:
        place = "" if self.num_gpus == 1 else " colocated" if self.placement is Placement.COLOCATED else " split"
        return f"{self.num_gpus} x {self.gpu.name} {self.precision}{place}"


SETUPS = tuple(
    Setup(gpu, num_gpus, placement, precision)
    for gpu in (H100, H200, B200)
    for num_gpus, placement in ((1, Placement.COLOCATED), (2, Placement.COLOCATED), (2, Placement.SPLIT))
    for precision in Precision
    if not (gpu is H100 and num_gpus == 1 and precision is Precision.BF16)  # both towers do not fit
)
REFERENCE = Setup(H100, 2, Placement.COLOCATED, Precision.BF16)
"""The GPUs of the published figures."""


def read_towers(path: pathlib.Path = CONFIG) -> Towers:
    facts = ModelFacts.from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    return {tower: TowerSizes.of(facts, tower) for tower in Tower}


def step_times(towers: Towers, setup: Setup, load: Workload, assumed: Assumptions, ar: bool = False) -> StepTimes:
    """Prices of a set-up's steps, or of AR decoding on the same GPUs."""
    return StepTimes(
        towers=towers,
        gpu=setup.gpu,
        num_gpus=setup.num_gpus,
        placement=Placement.AR if ar else setup.placement,
        precision=setup.precision,
        workload=load,
        assumed=assumed,
    )


def speed_up(towers: Towers, setup: Setup, batch: int, load: Workload, assumed: Assumptions) -> float:
    """Tokens per second of mask diffusion over those of AR, same GPUs, same batch."""
    rate = diffusion_tokens_per_s(step_times(towers, setup, load, assumed), batch)
    return rate / ar_tokens_per_s(step_times(towers, setup, load, assumed, ar=True), batch)


# ---- the parts of the study ------------------------------------------------------------------------------------------


def breakdown(towers: Towers, load: Workload, assumed: Assumptions) -> list[dict]:
    """One forward on one H200 in BF16, term by term."""
    machine = Machine(gpu=H200, assumed=assumed)
    width, length = load.canvas_length, load.context_length
    rows = []
    for batch in BREAKDOWN_BATCHES:
        tokens = batch * width
        for name, tower, shape in (
            ("AR step", Tower.CONTEXT, ar_step(batch, length)),
            ("denoise pass", Tower.DENOISER, denoise_pass(batch, length, width, load.passes.masked_fraction)),
            ("commit", Tower.CONTEXT, context_step(batch, tokens, length)),
        ):
            facts, cost = towers[tower].facts, machine.cost(towers[tower], shape)
            memory, compute = machine.memory_s(cost), machine.compute_s(cost)
            rows.append(
                {
                    "forward": name,
                    "batch": batch,
                    "tokens": shape.tokens,
                    "experts": expected_experts(facts.n_routed_experts, facts.num_experts_per_tok, shape.tokens),
                    "dense_gb": cost.dense_bytes / 1e9,
                    "experts_gb": cost.expert_bytes / 1e9,
                    "head_gb": (cost.head_bytes + cost.logit_bytes) / 1e9,
                    "kv_gb": cost.kv_bytes / 1e9,
                    "states_gb": cost.state_bytes / 1e9,
                    "total_gb": cost.num_bytes / 1e9,
                    "tflop": cost.flops / 1e12,
                    "memory_ms": memory * 1e3,
                    "compute_ms": compute * 1e3,
                }
            )
    return rows


def sweep(towers: Towers, load: Workload, assumed: Assumptions) -> list[dict]:
    """Every set-up over the batch sizes that fit."""
    rows = []
    for setup in SETUPS:
        ours, theirs = step_times(towers, setup, load, assumed), step_times(towers, setup, load, assumed, ar=True)
        tokens = load.context_length + load.canvas_length
        room = fit_towers(towers, setup.gpu, setup.num_gpus, setup.placement, setup.precision, tokens).num_requests
        for batch in BATCHES:
            row = {"setup": setup.name, "gpu": setup.gpu.name, "num_gpus": setup.num_gpus,
                   "placement": setup.placement, "precision": setup.precision, "batch": batch,
                   "fits": batch <= room, "ar": ar_tokens_per_s(theirs, batch)}  # fmt: skip
            row["diffusion"] = diffusion_tokens_per_s(ours, batch)
            row["speed_up"] = row["diffusion"] / row["ar"]
            rows.append(row)
    return rows


def crossovers(towers: Towers, load: Workload, assumed: Assumptions) -> list[dict]:
    """For each set-up and mean number of passes, the ranges of batch sizes at which mask diffusion beats AR."""
    rows = []
    for setup in SETUPS:
        for mean in PASSES:
            easier = replace(load, passes=CanvasPasses(mean=mean, max_steps=load.canvas_length))
            wins = lambda batch, s=setup, e=easier: speed_up(towers, s, batch, e, assumed) >= 1
            rows.append({"setup": setup.name, "passes": mean, "wins": winning_ranges(wins)})
    return rows


def winning_ranges(wins: Callable[[int], bool]) -> list[tuple[int, int]]:
    """Ranges of batch sizes from 1 to 256 where ``wins``; looks between neighbours in BATCHES where they differ."""
    outcome = {batch: wins(batch) for batch in BATCHES}
    for low, high in itertools.pairwise(BATCHES):
        if outcome[low] == outcome[high]:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            outcome[middle] = wins(middle)
            low, high = (middle, high) if outcome[middle] == outcome[low] else (low, middle)
    probed = sorted(outcome)
    starts = [b for i, b in enumerate(probed) if outcome[b] and (i == 0 or not outcome[probed[i - 1]])]
    ends = [b for i, b in enumerate(probed) if outcome[b] and (i == len(probed) - 1 or not outcome[probed[i + 1]])]
    return list(zip(starts, ends, strict=True))


def perfect_tokens_per_s(times: StepTimes, rows: int) -> float:
    """Throughput if every forward were full: no policy can do better where forwards are memory-bound."""
    per_canvas = times.workload.passes.mean * times.denoise_s(rows) + times.commit_s(rows)
    return rows * times.workload.canvas_length / per_canvas


def policies(towers: Towers, load: Workload, assumed: Assumptions) -> list[dict]:
    """Speed-up over AR of step policies on the reference set-up."""
    ours = step_times(towers, REFERENCE, load, assumed)
    theirs = step_times(towers, REFERENCE, load, assumed, ar=True)
    rows = []
    for batch in BATCHES:
        ar = ar_tokens_per_s(theirs, batch)
        row: dict = {"batch": batch}
        for name, quorum in (("lockstep", 1.0), ("commit at once", 0.0), ("quorum 0.4", 0.4)):
            row[name] = diffusion_tokens_per_s(ours, batch, quorum) / ar
        rows.append({**row, "all shared": perfect_tokens_per_s(ours, batch) / ar})
    return rows


@dataclass(frozen=True, kw_only=True)
class Case:
    """One change of what is assumed."""

    name: str
    load: Workload
    assumed: Assumptions = WITH_OVERHEAD
    setup: Setup = REFERENCE
    diffusion_extra_s: float = 0.0
    """Seconds that a denoise pass and a commit take beyond what is assumed of every forward."""

    def speed_up(self, towers: Towers, batch: int) -> float:
        """Over AR, at the same batch."""
        dearer = replace(self.assumed, fixed_s=self.assumed.fixed_s + self.diffusion_extra_s)
        rate = diffusion_tokens_per_s(step_times(towers, self.setup, self.load, dearer), batch)
        return rate / ar_tokens_per_s(step_times(towers, self.setup, self.load, self.assumed, ar=True), batch)


def list_cases(load: Workload, prompt_fraction: float) -> list[Case]:
    """What is changed, one at a time; ``prompt_fraction``: of the peak of products, which others' prompts reached."""
    passes = lambda mean: replace(load, passes=CanvasPasses(mean=mean, max_steps=load.canvas_length))
    change = lambda **fields: replace(WITH_OVERHEAD, **fields)
    return [
        Case(name="as above, with overhead", load=load),
        Case(name="at the memory floor: nothing fixed", load=load, assumed=MEMORY_FLOOR),
        Case(name="half of the fixed time", load=load, assumed=change(fixed_s=WITH_OVERHEAD.fixed_s / 2)),
        Case(name="twice the fixed time", load=load, assumed=change(fixed_s=WITH_OVERHEAD.fixed_s * 2)),
        Case(name="passes and commits 2 ms dearer, AR steps not", load=load, diffusion_extra_s=2e-3),
        Case(name="3 passes per canvas (lower threshold, better training)", load=passes(3.0)),
        Case(name="8 passes per canvas (higher threshold, harder text)", load=passes(8.0)),
        Case(name="256 tokens of context", load=replace(load, context_length=256)),
        Case(name="32,768 tokens of context", load=replace(load, context_length=32_768)),
        Case(name="FP8 weights", load=load, setup=replace(REFERENCE, precision=Precision.FP8)),
        Case(
            name="half of a canvas's tokens choose the experts of others",
            load=load,
            assumed=change(independent_share=0.5),
        ),
        Case(name="memory at 70% of its peak", load=load, assumed=change(memory_fraction=0.7)),
        Case(
            name=f"products at {prompt_fraction:.0%} of their peak, as others' prompts ran",
            load=load,
            assumed=change(compute_fraction=prompt_fraction),
        ),
        Case(name="products at 30% of their peak", load=load, assumed=change(compute_fraction=0.3)),
        Case(name="products at 70% of their peak", load=load, assumed=change(compute_fraction=0.7)),
    ]


def sensitivity(towers: Towers, load: Workload, prompt_fraction: float) -> list[dict]:
    """What each assumption moves."""
    return [
        {"case": case.name, **{str(batch): case.speed_up(towers, batch) for batch in (1, 8, 32, 64, 128)}}
        for case in list_cases(load, prompt_fraction)
    ]


def study(towers: Towers, load: Workload) -> dict:
    """The whole of it, as plain data."""
    published = compare(towers)
    return {
        "workload": {"context_length": load.context_length, "canvas_length": load.canvas_length,
                     "passes_per_canvas": load.passes.mean},
        "gpus": {name: vars(gpu) for name, gpu in GPUS.items()},
        "published": published,
        "breakdown": breakdown(towers, load, MEMORY_FLOOR),
        "cases": {
            name: {
                "assumptions": vars(assumed),
                "sweep": sweep(towers, load, assumed),
                "crossovers": crossovers(towers, load, assumed),
            }
            for name, assumed in CASES.items()
        },
        "policies": policies(towers, load, WITH_OVERHEAD),
        "sensitivity": sensitivity(towers, load, round(published["prompt_compute_fraction"], 2)),
    }  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(result: dict) -> dict[str, str]:
    """Markdown tables by the name of their place in docs/roofline.md."""
    by_name = {
        "published": _published_table(result["published"]["runs"]),
        "breakdown": _breakdown_table(result["breakdown"]),
        "policies": _plain_table(result["policies"]),
        "sensitivity": _plain_table(result["sensitivity"]),
    }
    for case, of_case in result["cases"].items():
        by_name |= {
            f"speed-up, {case}": _sweep_table(of_case["sweep"], lambda r: f"{r['speed_up']:.2f}"),
            f"crossovers, {case}": _crossover_table(of_case["crossovers"]),
            f"tokens, {case}": _sweep_table(of_case["sweep"], lambda r: f"{r['diffusion']:,.0f}", ar=True),
        }
    return by_name


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _plain_table(rows: list[dict]) -> str:
    shown = [
        [v if isinstance(v, str) else f"{v}" if isinstance(v, int) else f"{v:.2f}" for v in r.values()] for r in rows
    ]
    return _markdown(list(rows[0]), shown)


def _published_table(rows: list[dict]) -> str:
    header = ["requests", "measured tokens/s", "measured ms per token", "memory floor ms", "with overhead ms",
              "off by", "in the fit"]  # fmt: skip
    shown = [
        [f"{r['requests']}", f"{r['tokens_per_s']:,}", f"{r['measured_ms']:.2f}", f"{r['floor_ms']:.2f}",
         f"{r['fitted_ms']:.2f}",
         f"{r['error']:+.0%}", "yes" if r["in_fit"] else "no"]
        for r in rows
    ]  # fmt: skip
    return _markdown(header, shown)


def _breakdown_table(rows: list[dict]) -> str:
    header = ["forward", "batch", "tokens", "experts of 128", "dense", "experts", "head, logits", "KV", "states",
              "GB in all", "TFLOP", "memory ms", "compute ms"]  # fmt: skip
    gb = ("dense_gb", "experts_gb", "head_gb", "kv_gb", "states_gb", "total_gb")
    shown = [
        [r["forward"], f"{r['batch']}", f"{r['tokens']:,}", f"{r['experts']:.0f}", *(f"{r[name]:.2f}" for name in gb),
         f"{r['tflop']:.2f}", f"{r['memory_ms']:.1f}", f"{r['compute_ms']:.1f}"]
        for r in rows
    ]  # fmt: skip
    return _markdown(header, shown)


def _sweep_table(rows: list[dict], cell, ar: bool = False) -> str:
    lines: dict[str, list[str]] = {}
    for row in rows:
        if ar and row["placement"] == Placement.COLOCATED:
            name = f"AR, {row['num_gpus']} x {row['gpu']} {row['precision']}"
            lines.setdefault(name, []).append(f"{row['ar']:,.0f}")
        lines.setdefault(row["setup"], []).append(cell(row) if row["fits"] else "-")
    return _markdown(["batch", *map(str, BATCHES)], [[name, *cells] for name, cells in lines.items()])


def _crossover_table(rows: list[dict]) -> str:
    lines: dict[str, list[str]] = {}
    for row in rows:
        ranges = [
            f"{low} up" if high == BATCHES[-1] else f"{low}-{high}" if high > low else f"{low}"
            for low, high in row["wins"]
        ]
        lines.setdefault(row["setup"], []).append(", ".join(ranges) or "AR wins")
    return _markdown(["passes per canvas", *map(str, PASSES)], [[name, *cells] for name, cells in lines.items()])


def fill_page(text: str, by_name: dict[str, str]) -> str:
    """Put each table between its pair of marks; every mark must be there."""
    for name, table in by_name.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = marks.subn(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{PAGE.name} needs one pair of marks <!-- {name} --> <!-- /{name} -->, it has {count}")
    return text


def describe_fit(published: dict) -> str:
    """The fitted times and what they were fitted to."""
    return "\n".join(
        (
            f"fixed time per forward: {published['fixed_ms']:.2f} ms",
            f"a prompt's token: {published['prompt_token_us']:.2f} us, or {published['full_chunk_ms']:.1f} ms "
            f"for a step of 8,192; products then run at {published['prompt_compute_fraction']:.0%} of their peak",
            _published_table(published["runs"]),
            *published["sources"],
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/roofline.md, docs/roofline.png and the JSON")
    parser.add_argument("--fit", action="store_true", help="print the fixed time per forward and its fit, nothing else")
    parser.add_argument(
        "--config", type=pathlib.Path, default=REAL_MODEL / "config.json", help="config.json of another two-tower model"
    )
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--passes-per-canvas", type=float, default=5.9)
    args = parser.parse_args()
    if args.fit:
        print(describe_fit(compare(read_towers(args.config))))
        return
    load = Workload(context_length=args.context_length, passes=CanvasPasses(mean=args.passes_per_canvas))
    result = study(read_towers(args.config), load)
    for name, table in tables(result).items():
        print(f"{name}\n{table}\n")
    if args.write:
        from benchmarks.roofline_plot import draw

        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), tables(result)), encoding="utf-8")
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result, PICTURE)


if __name__ == "__main__":
    main()
