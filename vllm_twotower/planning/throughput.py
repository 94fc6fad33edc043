"""Estimated throughput of mask diffusion beside AR decoding: forwards are priced by their bytes and FLOPs, steps are
chosen by the engine's own step policy, passes per canvas are drawn. An estimate, no measurement.

Steady decoding only: no prompts arrive, and every request has the same context length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from vllm_twotower.core import StepKind
from vllm_twotower.planning.canvas_passes import CanvasPasses, masked_fraction
from vllm_twotower.planning.forward_cost import Machine, ar_step, context_step, denoise_pass
from vllm_twotower.planning.gpus import Assumptions, Gpu
from vllm_twotower.planning.placement import Placement, Towers, ranks_per_tower
from vllm_twotower.planning.tower_sizes import Precision, Tower
from vllm_twotower.planning.traffic import SplitTraffic
from vllm_twotower.runtime.policy import RunnableRows, StepPolicy

CANVASES_PER_ROW = 40
MIN_CANVASES = 2000
"""Length of a simulation, whichever gives more; the first quarter is left out of the figures."""

PolicyMaker = Callable[[], StepPolicy]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded."""

    context_length: int = 2048
    """Tokens of a request in the cache, on average."""
    canvas_length: int = 16
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

    @cached_property
    def traffic(self) -> SplitTraffic:
        """What crosses between the halves in ``split``."""
        return SplitTraffic.of(self.towers[Tower.CONTEXT].facts, self.workload.canvas_length)

    def ar_s(self, rows: int) -> float:
        """One AR step, one token per row."""
        return self.machine.seconds(self.towers[Tower.CONTEXT], ar_step(rows, self.workload.context_length))

    def denoise_s(self, rows: int) -> float:
        """One denoise pass."""
        if rows not in self._denoise_s:
            load = self.workload
            masked = masked_fraction(load.passes.expected)
            shape = denoise_pass(rows, load.context_length, load.canvas_length, masked)
            self._denoise_s[rows] = self.machine.seconds(self.towers[Tower.DENOISER], shape)
        return self._denoise_s[rows]

    def commit_s(self, rows: int) -> float:
        """One commit of ``rows`` finished canvases."""
        if rows not in self._commit_s:
            load = self.workload
            shape = context_step(rows, rows * load.canvas_length, load.context_length)
            seconds = self.machine.seconds(self.towers[Tower.CONTEXT], shape)
            if self.placement is Placement.SPLIT:
                share = self.traffic.bytes_per_canvas * rows / self.machine.num_gpus
                seconds += self.traffic.seconds(share, self.gpu.nvlink_Bps, self.assumed)
            self._commit_s[rows] = seconds
        return self._commit_s[rows]

    @cached_property
    def _denoise_s(self) -> dict[int, float]:
        return {}

    @cached_property
    def _commit_s(self) -> dict[int, float]:
        return {}


def ar_tokens_per_s(times: StepTimes, rows: int) -> float:
    """Throughput of AR decoding by the context tower alone."""
    return rows / times.ar_s(rows)


def perfect_tokens_per_s(times: StepTimes, rows: int) -> float:
    """Throughput if every forward were full: no policy can do better where forwards are memory-bound."""
    per_canvas = times.workload.passes.expected * times.denoise_s(rows) + times.commit_s(rows)
    return rows * times.workload.canvas_length / per_canvas


def diffusion_tokens_per_s(times: StepTimes, rows: int, policy: PolicyMaker, seed: int = 0) -> float:
    """Throughput of mask diffusion with one kind of step at a time, chosen by ``policy``."""
    simulation = _Simulation(times, rows, policy(), seed)
    end = _num_canvases(rows)
    warm_up = end // 4
    simulation.run_until(warm_up)
    started, before = simulation.now_s, simulation.num_canvases
    simulation.run_until(end)
    return (simulation.num_canvases - before) * times.workload.canvas_length / (simulation.now_s - started)


def _num_canvases(rows: int) -> int:
    return max(rows * CANVASES_PER_ROW, MIN_CANVASES)


class _Simulation:
    """Rows of canvases under a step policy, priced step by step."""

    def __init__(self, times: StepTimes, rows: int, policy: StepPolicy, seed: int) -> None:
        self.times, self.policy = times, policy
        self.counts = [times.workload.passes.of_request(row, seed) for row in range(rows)]
        self.passes_left = [count.next() for count in self.counts]
        self.now_s, self.num_canvases = 0.0, 0

    def run_until(self, num_canvases: int) -> None:
        """Step until so many canvases have been committed."""
        while self.num_canvases < num_canvases:
            self.step()

    def step(self) -> None:
        """One engine step."""
        finished = [row for row, left in enumerate(self.passes_left) if left == 0]
        unfinished = len(self.passes_left) - len(finished)
        rows = RunnableRows(commits=len(finished), canvases=unfinished, context_only=0, admissible=False)
        kind = self.policy.choose_kind(rows)
        if kind is StepKind.CONTEXT:
            self.now_s += self.times.commit_s(len(finished))
            self.num_canvases += len(finished)
            for row in finished:
                self.passes_left[row] = self.counts[row].next()
        else:
            self.now_s += self.times.denoise_s(unfinished)
            self.passes_left = [max(0, left - 1) for left in self.passes_left]
        self.policy.record_step(kind)


def overlapped_split_tokens_per_s(times: StepTimes, rows: int, seed: int = 0) -> float:
    """Throughput of ``split`` if commits ran beside denoise passes: what pipelining the two halves could give."""
    counts = [times.workload.passes.of_request(row, seed) for row in range(rows)]
    passes_left = [count.next() for count in counts]
    ready_s = [0.0] * rows
    waiting: list[int] = []
    now_s = free_s = 0.0
    marks: dict[int, float] = {}
    end = _num_canvases(rows)
    warm_up, done = end // 4, 0
    while done < end:
        if waiting and free_s <= now_s:
            free_s = now_s + times.commit_s(len(waiting))
            done += len(waiting)
            for row in waiting:
                passes_left[row], ready_s[row] = counts[row].next(), free_s
            waiting = []
        marks.setdefault(done, now_s)
        active = [row for row in range(rows) if passes_left[row] and ready_s[row] <= now_s]
        if not active:
            now_s = max(free_s, now_s)
            continue
        now_s += times.denoise_s(len(active))
        for row in active:
            passes_left[row] -= 1
            if not passes_left[row]:
                waiting.append(row)
    started = min(mark for mark in marks if mark >= warm_up)
    return (done - started) * times.workload.canvas_length / (now_s - marks[started])
