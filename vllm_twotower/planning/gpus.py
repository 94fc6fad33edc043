"""The GPUs that plans are made for. Memory is what CUDA reports as total, less than the box says; rates are the makers'
data sheets, without sparsity, per direction for links.
"""

from dataclasses import dataclass

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


H100 = Gpu(
    name="H100",
    marketed_gb=80,
    memory_bytes=int(79.2 * GIB),
    bandwidth_Bps=3.35e12,
    bf16_flops=989e12,
    fp8_flops=1979e12,
    nvlink_Bps=450e9,
)
H200 = Gpu(
    name="H200",
    marketed_gb=141,
    memory_bytes=int(139.8 * GIB),
    bandwidth_Bps=4.8e12,
    bf16_flops=989e12,
    fp8_flops=1979e12,
    nvlink_Bps=450e9,
)
B200 = Gpu(
    name="B200",
    marketed_gb=192,
    memory_bytes=int(178.3 * GIB),
    bandwidth_Bps=7.67e12,
    bf16_flops=2250e12,
    fp8_flops=4500e12,
    nvlink_Bps=900e9,
)
GPUS = {gpu.name: gpu for gpu in (H100, H200, B200)}
