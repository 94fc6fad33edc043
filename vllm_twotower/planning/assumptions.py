"""What a byte count cannot know: shares of peaks, and the time of a forward that no byte accounts for.

To be replaced by measurements of this project's own: ``docs/roofline.md``.
"""

from dataclasses import dataclass

FITTED_FIXED_S = 2.2e-3
"""Seconds that every AR step of the 30B backbone takes beyond its memory floor, as others measured it: FP8, two B200,
vLLM 0.16.0 at its defaults, so with CUDA graphs and asynchronous scheduling. Launches, gaps between kernels,
collectives and what the host cannot hide are in it.

Source: https://docs.vultr.com/inference-cookbook/cuda/optimization/concurrency-tuning (11 March 2026). The points and
the fit are ``benchmarks/roofline_parts/published.py``'s: ``python -m benchmarks.roofline --fit``.
"""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Rates as shares of the data sheets', and fixed times."""

    memory_fraction: float = 0.9
    """Share of the peak bandwidth that large reads reach."""
    compute_fraction: float = 0.48
    """Share of the tensor-core peak that products reach; grouped experts at few tokens each are far off it."""
    link_fraction: float = 0.8
    """Share of a link's peak that messages of megabytes reach."""
    message_s: float = 10e-6
    """Time of one message or all-reduce that carries next to nothing."""
    independent_share: float = 1.0
    """Share of a row's further tokens that choose experts independently of its first; tokens of one text, and masked
    positions most of all, agree more often than chance."""
    fixed_s: float = 0.0
    """Seconds of a forward beside its bytes, products and messages, whatever is in it."""


MEMORY_FLOOR = Assumptions()
WITH_OVERHEAD = Assumptions(fixed_s=FITTED_FIXED_S)
"""Denoise passes and commits are assumed to have the fixed time that AR steps were measured to have."""
