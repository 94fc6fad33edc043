"""What others measured of the backbone in AR, and the two times that make the roofline agree with it.

The source is a cloud provider's inference cookbook (11 March 2026): Nemotron-3-Nano-30B-A3B-FP8, vLLM 0.16.0, two B200
with tensor parallelism, random prompts of 2,048 tokens, 512 tokens written; 50 requests sent with one at once, 400
otherwise. One machine, one engine, each run once: a fit to it is no measurement of ours.
"""

from dataclasses import dataclass

import numpy as np

from vllm_twotower.planning.assumptions import MEMORY_FLOOR
from vllm_twotower.planning.forward_cost import context_step
from vllm_twotower.planning.gpus import B200
from vllm_twotower.planning.placement import Placement, Towers
from vllm_twotower.planning.throughput import StepTimes, Workload
from vllm_twotower.planning.tower_sizes import Precision, Tower

SOURCES = (
    "https://docs.vultr.com/inference-cookbook/cuda/optimization/concurrency-tuning",
    "https://docs.vultr.com/inference-cookbook/cuda/benchmarks/methodology",
)
PROMPT_TOKENS, OUTPUT_TOKENS = 2048, 512
CHUNK_TOKENS = 8192
"""Tokens that vLLM's server puts into one step at most, by default on such a GPU."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One row of their table."""

    requests: int
    """Running at once."""
    time_per_token_s: float
    """Seconds between a request's tokens after its first."""
    tokens_per_s: float
    """Output of all requests; time to first token and the last, partly filled wave of requests are in it."""
    in_fit: bool = True


RUNS = (
    PublishedRun(requests=1, time_per_token_s=2.91e-3, tokens_per_s=277),
    PublishedRun(requests=8, time_per_token_s=3.96e-3, tokens_per_s=1881),
    PublishedRun(requests=16, time_per_token_s=4.32e-3, tokens_per_s=3455),
    # slower per token than twice as many requests: no law of the batch goes through both
    PublishedRun(requests=32, time_per_token_s=7.86e-3, tokens_per_s=3798, in_fit=False),
    PublishedRun(requests=64, time_per_token_s=6.74e-3, tokens_per_s=8120),
    PublishedRun(requests=128, time_per_token_s=8.91e-3, tokens_per_s=11556),
    PublishedRun(requests=256, time_per_token_s=11.77e-3, tokens_per_s=15552),
    # asked for 512 at once, but 400 were sent; the run at 1,024 is the same
    PublishedRun(requests=400, time_per_token_s=15.46e-3, tokens_per_s=18746),
)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What the memory floor lacks."""

    fixed_s: float
    """Seconds of every forward."""
    prompt_token_s: float
    """Seconds of a prompt's token in a step full of them."""

    def time_per_token_s(self, run: PublishedRun, floor_s: float) -> float:
        """An AR step of the run on average: while a request writes, every other request's prompt goes by once."""
        return floor_s + self.fixed_s + run.requests * _prompt_tokens_per_step() * self.prompt_token_s


def _prompt_tokens_per_step() -> float:
    """Of each request that runs."""
    return PROMPT_TOKENS / (OUTPUT_TOKENS - 1)


def published_machine(towers: Towers) -> StepTimes:
    """Prices of their steps at the memory floor, in the middle of an answer."""
    return StepTimes(
        towers=towers,
        gpu=B200,
        num_gpus=2,
        placement=Placement.AR,
        precision=Precision.FP8,
        workload=Workload(context_length=PROMPT_TOKENS + OUTPUT_TOKENS // 2),
        assumed=MEMORY_FLOOR,
    )


def fit_overhead(towers: Towers, runs: tuple[PublishedRun, ...] = RUNS) -> Overhead:
    """Least squares of the relative errors of time per token over the runs that are in the fit."""
    fitted, times = [run for run in runs if run.in_fit], published_machine(towers)
    measured = np.array([run.time_per_token_s for run in fitted])
    beyond = measured - np.array([times.ar_s(run.requests) for run in fitted])
    columns = np.array([[1.0, run.requests * _prompt_tokens_per_step()] for run in fitted])
    fixed_s, prompt_token_s = np.linalg.lstsq(columns / measured[:, None], beyond / measured, rcond=None)[0]
    return Overhead(fixed_s=float(fixed_s), prompt_token_s=float(prompt_token_s))


def full_chunk_s(towers: Towers, overhead: Overhead) -> float:
    """A step full of prompts beside one AR row: the fit never saw one, the source shows them as its longest gaps."""
    return published_machine(towers).ar_s(1) + overhead.fixed_s + CHUNK_TOKENS * overhead.prompt_token_s


def prompt_compute_fraction(towers: Towers, overhead: Overhead) -> float:
    """Share of the tensor-core peak at which a step full of prompts takes its fitted time."""
    machine = published_machine(towers).machine
    chunk = context_step(CHUNK_TOKENS // PROMPT_TOKENS, CHUNK_TOKENS, PROMPT_TOKENS // 2)
    cost = machine.cost(towers[Tower.CONTEXT], chunk)
    at_peak_s = machine.compute_s(cost) * machine.assumed.compute_fraction
    return at_peak_s / (CHUNK_TOKENS * overhead.prompt_token_s - machine.link_s(cost))


def compare(towers: Towers) -> dict:
    """The fit beside what it was fitted to, as plain data."""
    overhead, times = fit_overhead(towers), published_machine(towers)
    rows = []
    for run in RUNS:
        floor_s = times.ar_s(run.requests)
        given_s = overhead.time_per_token_s(run, floor_s)
        rows.append({"requests": run.requests, "in_fit": run.in_fit, "tokens_per_s": run.tokens_per_s,
                     "measured_ms": run.time_per_token_s * 1e3, "floor_ms": floor_s * 1e3, "fitted_ms": given_s * 1e3,
                     "error": given_s / run.time_per_token_s - 1})  # fmt: skip
    return {
        "sources": list(SOURCES),
        "fixed_ms": overhead.fixed_s * 1e3,
        "prompt_token_us": overhead.prompt_token_s * 1e6,
        "full_chunk_ms": full_chunk_s(towers, overhead) * 1e3,
        "prompt_compute_fraction": prompt_compute_fraction(towers, overhead),
        "runs": rows,
    }
