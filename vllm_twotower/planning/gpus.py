"""The GPUs that plans are made for. Memory is what CUDA reports as total, less than the box says."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    marketed_gb: int
    """Memory as sold."""
    memory_bytes: int
    """Memory as CUDA reports it."""


GPUS = {
    name: Gpu(name=name, marketed_gb=marketed_gb, memory_bytes=int(gib * GIB))
    for name, marketed_gb, gib in (("H100", 80, 79.2), ("H200", 141, 139.8), ("B200", 192, 178.3))
}
