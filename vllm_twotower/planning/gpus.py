"""The GPUs that plans are made for, and what is assumed of them.

Memory is what CUDA reports as total (less than the box says); rates are the makers' data sheets, without sparsity, per
direction for links. The fractions are assumptions to be replaced by measurements: see ``docs/roofline.md``.
"""

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links."""

    name: str
    marketed_gb: int
    """Memory as sold."""
    memory_bytes: int
    """Memory as CUDA reports it."""
    bandwidth_Bps: float
    """Peak memory bandwidth, bytes per second."""
    bf16_flops: float
    """Dense tensor-core peak, FLOP per second."""
    fp8_flops: float
    """The same for FP8."""
    nvlink_Bps: float
    """NVLink, one direction, bytes per second."""
    pcie_Bps: float = 64e9
    """PCIe x16 of the fifth generation, one direction, bytes per second."""


H100 = Gpu(
    name="H100", marketed_gb=80, memory_bytes=int(79.2 * GIB), bandwidth_Bps=3.35e12,
    bf16_flops=989e12, fp8_flops=1979e12, nvlink_Bps=450e9,
)  # fmt: skip
H200 = replace(H100, name="H200", marketed_gb=141, memory_bytes=int(139.8 * GIB), bandwidth_Bps=4.8e12)
B200 = Gpu(
    name="B200", marketed_gb=192, memory_bytes=int(178.3 * GIB), bandwidth_Bps=7.67e12,
    bf16_flops=2250e12, fp8_flops=4500e12, nvlink_Bps=900e9,
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
    gpu_memory_utilization: float = 0.92
    """vLLM's option of that name; 0.92 is its default."""
    reserved_bytes: int = 2 * GIB
    """Activations at the widest step, CUDA graphs, communication buffers, per GPU."""
