"""Estimated throughput of mask diffusion beside AR decoding: forwards are priced by their bytes and FLOPs, steps are
chosen by the engine's own step policy, passes per canvas are drawn. An estimate, no measurement.

Steady decoding only: no prompts arrive, and every request has the same context length.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from vllm_twotower.config import DEFAULT_COMMIT_QUORUM
from vllm_twotower.core import DEFAULT_CANVAS_LENGTH, StepKind
from vllm_twotower.planning.assumptions import Assumptions
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.planning.forward_cost import Machine, ar_step, context_step, denoise_pass
from vllm_twotower.planning.gpus import Gpu
from vllm_twotower.planning.placement import Placement, SplitTraffic, Towers, ranks_per_tower
from vllm_twotower.planning.tower_sizes import Precision, Tower
from vllm_twotower.runtime.policy import RunnableRows, StepPolicy

CANVASES_PER_ROW = 40
MIN_CANVASES = 2000
"""Length of a simulation, whichever gives more; the first quarter is left out of the figures."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded."""

    context_length: int = 2048
    """Tokens of a request in the cache, on average."""
    canvas_length: int = DEFAULT_CANVAS_LENGTH
    passes: CanvasPasses = field(default_factory=CanvasPasses)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of every kind of step for one placement; in ``split`` a commit includes its transfer."""

    towers: Towers
    gpu: Gpu
    num_gpus: int
    placement: Placement
    precision: Precision
    workload: Workload
    assumed: Assumptions = field(default_factory=Assumptions)

    @cached_property
    def machine(self) -> Machine:
        """The GPUs that run one tower."""
        ranks = ranks_per_tower(self.num_gpus, self.placement)
        return Machine(gpu=self.gpu, num_gpus=ranks, precision=self.precision, assumed=self.assumed)

    def ar_s(self, rows: int) -> float:
        """One AR step, one token per row."""
        return self.machine.seconds(self.towers[Tower.CONTEXT], ar_step(rows, self.workload.context_length))

    def denoise_s(self, rows: int) -> float:
        """One denoise pass."""
        load = self.workload
        shape = denoise_pass(rows, load.context_length, load.canvas_length, load.passes.masked_fraction)
        return self.machine.seconds(self.towers[Tower.DENOISER], shape)

    def commit_s(self, rows: int) -> float:
        """One commit of ``rows`` finished canvases."""
        load, context = self.workload, self.towers[Tower.CONTEXT]
        seconds = self.machine.seconds(context, context_step(rows, rows * load.canvas_length, load.context_length))
        if self.placement is Placement.SPLIT:
            traffic = SplitTraffic.of(context.facts, load.canvas_length)
            share = traffic.bytes_per_canvas * rows / self.machine.num_gpus
            seconds += self.assumed.message_s + share / (self.gpu.nvlink_Bps * self.assumed.link_fraction)
        return seconds


def ar_tokens_per_s(times: StepTimes, rows: int) -> float:
    """Throughput of AR decoding by the context tower alone."""
    return rows / times.ar_s(rows)


@dataclass(frozen=True, kw_only=True)
class SimulatedSteps:
    """Steps of a simulation after its first quarter, by how many rows they held."""

    denoise: Mapping[int, int]
    """Rows -> denoise passes."""
    commits: Mapping[int, int]
    """Rows -> commits."""
    canvases: int
    """Committed in those steps."""


@cache
def count_steps(passes: CanvasPasses, rows: int, commit_quorum: float, seed: int = 0) -> SimulatedSteps:
    """Simulate one kind of step at a time, chosen by the engine's policy, which does not look at a step's price."""
    policy, counts = StepPolicy(commit_quorum), [passes.draw_counts(row, seed) for row in range(rows)]
    passes_left = [next(count) for count in counts]
    num_canvases = max(rows * CANVASES_PER_ROW, MIN_CANVASES)
    denoise: Counter[int] = Counter()
    commits: Counter[int] = Counter()
    done, warm = 0, None
    while done < num_canvases:
        finished = [row for row, left in enumerate(passes_left) if left == 0]
        unfinished = rows - len(finished)
        runnable = RunnableRows(commits=len(finished), canvases=unfinished, context_only=0, admissible=False)
        kind = policy.choose_kind(runnable)
        policy.record_step(kind)
        if kind is StepKind.DENOISE:
            denoise[unfinished] += 1
            passes_left = [max(0, left - 1) for left in passes_left]
            continue
        commits[len(finished)] += 1
        done += len(finished)
        for row in finished:
            passes_left[row] = next(counts[row])
        if warm is None and done >= num_canvases // 4:
            warm = done
            denoise.clear()
            commits.clear()
    assert warm is not None
    return SimulatedSteps(denoise=denoise, commits=commits, canvases=done - warm)


def diffusion_tokens_per_s(
    times: StepTimes, rows: int, commit_quorum: float = DEFAULT_COMMIT_QUORUM, seed: int = 0
) -> float:
    """Throughput of mask diffusion: the policy's steps at their prices."""
    load = times.workload
    steps = count_steps(load.passes, rows, commit_quorum, seed)
    denoise_s = sum(count * times.denoise_s(held) for held, count in steps.denoise.items())
    commit_s = sum(count * times.commit_s(held) for held, count in steps.commits.items())
    return steps.canvases * load.canvas_length / (denoise_s + commit_s)
