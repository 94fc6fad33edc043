"""Estimated tokens per second of a model on GPUs that hold both towers, twice: at the memory floor, and with the fixed
time per forward that others measured. No measurement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_twotower.planning.assumptions import MEMORY_FLOOR, WITH_OVERHEAD, Assumptions
from vllm_twotower.planning.canvas_passes import MEAN_PASSES, CanvasPasses
from vllm_twotower.planning.gpus import GPUS
from vllm_twotower.planning.placement import Fit, Placement, Towers
from vllm_twotower.planning.throughput import StepTimes, Workload, ar_tokens_per_s, diffusion_tokens_per_s
from vllm_twotower.planning.tower_sizes import Precision

BATCHES = (1, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of all requests together."""

    ar: float
    """Of the context tower alone."""
    diffusion: float


@dataclass(frozen=True, kw_only=True)
class SpeedEstimate:
    """One number of requests on one machine, both towers sharded over all of its GPUs."""

    gpu: str
    num_gpus: int
    precision: Precision
    requests: int
    """Running at once."""
    floor: Speed
    """Bytes at 90% of the peak and nothing else."""
    overhead: Speed
    """With the fixed time of every forward."""


def expected_passes(canvas_length: int) -> CanvasPasses:
    """Of the released model at its threshold; a canvas never takes more passes than it has tokens."""
    return CanvasPasses(mean=min(MEAN_PASSES, canvas_length), max_steps=canvas_length)


def estimate_speeds(
    towers: Towers, fits: Sequence[Fit], tokens_per_request: int, canvas_length: int
) -> Iterator[SpeedEstimate]:
    """For every machine that holds both towers, and as many requests as fit there.

    Args:
        towers: both towers' sizes.
        fits: what was tried; placements other than colocated are passed over.
        tokens_per_request: T, taken to be in the cache.
        canvas_length: S.

    """
    load = Workload(
        context_length=tokens_per_request, canvas_length=canvas_length, passes=expected_passes(canvas_length)
    )
    for one in fits:
        if one.placement is not Placement.COLOCATED:
            continue
        for requests in BATCHES:
            if requests > one.num_requests:
                continue
            yield SpeedEstimate(
                gpu=one.gpu,
                num_gpus=one.num_gpus,
                precision=one.precision,
                requests=requests,
                floor=_speed(towers, one, load, requests, MEMORY_FLOOR),
                overhead=_speed(towers, one, load, requests, WITH_OVERHEAD),
            )


def _speed(towers: Towers, one: Fit, load: Workload, requests: int, assumed: Assumptions) -> Speed:
    times = StepTimes(
        towers=towers,
        gpu=GPUS[one.gpu],
        num_gpus=one.num_gpus,
        placement=one.placement,
        precision=one.precision,
        workload=load,
        assumed=assumed,
    )
    # colocated towers run an AR step as the context tower alone does
    return Speed(ar=ar_tokens_per_s(times, requests), diffusion=diffusion_tokens_per_s(times, requests))
