"""The operations a denoise pass consists of, each with a plain reference. Torch and triton only.

Only references so far: every device runs them. A kernel takes a reference's place here once it has been measured to be
faster.
"""

from vllm_twotower.ops.seeded_scan.reference import seeded_conv, seeded_scan

__all__ = ["seeded_conv", "seeded_scan"]
