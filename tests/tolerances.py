"""Every numerical tolerance of the tests, in one place and the same everywhere."""

GOLDEN_LOGITS = 2e-3
"""Largest absolute difference of logits from NVIDIA's reference (goldens/README.md)."""

DEEP_LOGITS = 5e-4
"""Largest absolute difference of the oracle's logits (they spread by 6) behind 52 layers from those with fp64 scans."""

FP32_OP = 1e-4
"""Largest difference of an fp32 op from its definition, relative to the largest value."""

BF16_OP = 1e-2
"""The same for a bf16 op: one rounding to 8 bits (4e-3 of the largest value) and one of its neighbours."""

REPLAY = 1e-5
"""Largest difference of the oracle's caches after a replay from those after a forward over the same tokens, relative to
the largest value: fp32 sums over other numbers of tokens."""
