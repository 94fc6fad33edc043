"""Rates of the GPUs that ``vllm_twotower.planning.gpus`` knows by their memory, and what is assumed of them.

Rates are the makers' data sheets, without sparsity, per direction for links. The fractions are assumptions to be
replaced by measurements: see ``docs/roofline.md``.
"""

from dataclasses import dataclass

from vllm_twotower.planning import gpus


@dataclass(frozen=True, kw_only=True)
class Gpu(gpus.Gpu):
    """One GPU and its links."""

    bandwidth_Bps: float
    """Peak memory bandwidth, bytes per second."""
    bf16_flops: float
    """Dense tensor-core peak, FLOP per second."""
    fp8_flops: float
    """The same for FP8."""
    nvlink_Bps: float
    """NVLink, one direction, bytes per second."""


_HOPPER = {"bf16_flops": 989e12, "fp8_flops": 1979e12, "nvlink_Bps": 450e9}
H100 = Gpu(**vars(gpus.GPUS["H100"]), bandwidth_Bps=3.35e12, **_HOPPER)
H200 = Gpu(**vars(gpus.GPUS["H200"]), bandwidth_Bps=4.8e12, **_HOPPER)
B200 = Gpu(
    **vars(gpus.GPUS["B200"]), bandwidth_Bps=7.67e12, bf16_flops=2250e12, fp8_flops=4500e12, nvlink_Bps=900e9
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in (H100, H200, B200)}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a byte count cannot know."""

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
    host_s: float = 0.0
    """Host time per engine step that nothing hides."""
