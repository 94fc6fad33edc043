"""The operations a denoise pass consists of: each with a plain reference, and with a Triton kernel where there is one.

Torch and triton only, so all of it can be imported, tested and timed on a machine without vLLM; Triton is imported when
a kernel first runs. ``backend.py`` says which form runs. No GPU has run a kernel yet: ``docs/kernels.md``.
"""

import torch

from vllm_twotower.ops.backend import use_kernels
from vllm_twotower.ops.canvas_sample.reference import Draw, Sample
from vllm_twotower.ops.canvas_sample.reference import canvas_sample as _canvas_sample_reference
from vllm_twotower.ops.seeded_scan.reference import seeded_conv, seeded_scan

__all__ = ["Draw", "Sample", "canvas_sample", "seeded_conv", "seeded_scan", "use_kernels"]


def canvas_sample(logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None) -> Sample:
    """Propose a token per row, and say how sure the denoiser is of it (spec 4.1, steps 3 to 5).

    The proposal is the argmax of the logits or, for a row with a temperature, of logits / temperature + Gumbel noise.
    The kernel reads the logits once, in their own dtype; its random integers are those of ``decoding.noise``.

    Args:
        logits_NV: [N, V], float32, bfloat16 or float16, processed; may be written: the mask id's column.
        mask_token_id: never proposed, and no part of any sum.
        draw: temperatures and noise keys, or None where every row is greedy.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.

    """
    if use_kernels(logits_NV):
        from vllm_twotower.ops.canvas_sample.kernel import canvas_sample as kernel

        return kernel(logits_NV, mask_token_id, draw)
    return _canvas_sample_reference(logits_NV, mask_token_id, draw)
