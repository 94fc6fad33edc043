"""The operations a denoise pass consists of: each with a plain reference, and with a Triton kernel where there is one.

Torch and triton only, so all of it can be imported, tested and timed on a machine without vLLM; Triton is imported when
a kernel first runs. ``backend.py`` says which form runs. No GPU has run a kernel yet: ``docs/kernels.md``.
"""

import torch

from vllm_twotower.ops.backend import use_kernels
from vllm_twotower.ops.canvas_sample.reference import Draw, Sample
from vllm_twotower.ops.canvas_sample.reference import canvas_sample as _canvas_sample_reference
from vllm_twotower.ops.reveal.reference import CanvasRules, Revealed
from vllm_twotower.ops.reveal.reference import reveal as _reveal_reference
from vllm_twotower.ops.seeded_scan.reference import seeded_conv, seeded_scan

__all__ = [
    "CanvasRules",
    "Draw",
    "Revealed",
    "Sample",
    "canvas_sample",
    "reveal",
    "seeded_conv",
    "seeded_scan",
    "use_kernels",
]


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
    form = _canvas_sample_reference
    if use_kernels(logits_NV):
        from vllm_twotower.ops.canvas_sample.kernel import canvas_sample as form
    return form(logits_NV, mask_token_id, draw)


def reveal(
    token_RS: torch.Tensor,
    proposal_RS: torch.Tensor,
    confidence_RS: torch.Tensor,
    masked_RS: torch.Tensor,
    pass_index_R: torch.Tensor,
    rules: CanvasRules,
) -> Revealed:
    """Write the surest proposals of a pass into their canvases (spec 4.1, steps 6 and 7).

    k = max(#(confidence > gamma), 1, ceil(masked / (T - pass))) positions of each row that has any masked, all of them
    in the last pass; ties go to the lowest position.

    Args:
        token_RS: int64 [R, S], S at most 32, not written.
        proposal_RS: int64 [R, S], read where masked.
        confidence_RS: float32 [R, S], read where masked.
        masked_RS: bool [R, S], undecided positions; none from a row's width on.
        pass_index_R: int64 [R], passes run over each canvas before this one.
        rules: the rows' width, gamma and T.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.

    """
    form = _reveal_reference
    if use_kernels(token_RS):
        from vllm_twotower.ops.reveal.kernel import reveal as form
    return form(token_RS, proposal_RS, confidence_RS, masked_RS, pass_index_R, rules)
