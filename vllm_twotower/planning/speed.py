"""Estimated tokens per second of a model on GPUs that hold both towers, twice: at the memory floor, and with the fixed
time per forward that others measured. No measurement.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_twotower.planning.assumptions import MEMORY_FLOOR, WITH_OVERHEAD
from vllm_twotower.planning.canvas_passes import MEAN_PASSES, CanvasPasses
from vllm_twotower.planning.gpus import GPUS
from vllm_twotower.planning.placement import Fit, Placement, Towers
from vllm_twotower.planning.throughput import StepTimes, Workload, ar_tokens_per_s, diffusion_tokens_per_s

BATCHES = (1, 16, 64)
ASSUMED = {"floor": MEMORY_FLOOR, "overhead": WITH_OVERHEAD}
"""Bytes at 90% of the peak and nothing else, or with the fixed time of every forward."""


def expected_passes(canvas_length: int) -> CanvasPasses:
    """Of the released model at its threshold; a canvas never takes more passes than it has tokens."""
    return CanvasPasses(mean=min(MEAN_PASSES, canvas_length), max_steps=canvas_length)


def estimate_speeds(
    towers: Towers, fits: Sequence[Fit], tokens_per_request: int, canvas_length: int
) -> Iterator[dict[str, Any]]:
    """For every machine that holds both towers, and as many requests as fit there.

    Args:
        towers: both towers' sizes.
        fits: what was tried; placements other than colocated are passed over.
        tokens_per_request: T, taken to be in the cache.
        canvas_length: S.

    Returns:
        The machine (``gpu``, ``num_gpus``, ``precision``), how many ``requests`` run at once, and by the names of
        ``ASSUMED`` the tokens per second of all together: ``ar``, of the context tower alone, and ``diffusion``.

    """
    load = Workload(
        context_length=tokens_per_request, canvas_length=canvas_length, passes=expected_passes(canvas_length)
    )
    for one in fits:
        if one.placement is not Placement.COLOCATED:
            continue
        machine = {"gpu": one.gpu, "num_gpus": one.num_gpus, "precision": one.precision}
        for requests in BATCHES:
            if requests > one.num_requests:
                continue
            speeds = {}
            for name, assumed in ASSUMED.items():
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
                speeds[name] = {
                    "ar": ar_tokens_per_s(times, requests),
                    "diffusion": diffusion_tokens_per_s(times, requests),
                }
            yield {**machine, "requests": requests, **speeds}
