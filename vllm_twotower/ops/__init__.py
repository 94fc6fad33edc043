"""The operations a denoise pass consists of: each with a plain reference, most with a Triton kernel and a C++ form.

Torch and triton only, so all of it can be imported, tested and timed on a machine without vLLM; Triton is imported when
a kernel first runs. ``backend.py`` says which form runs. No GPU has run a kernel yet: ``docs/kernels.md``.
"""

import torch

from vllm_twotower.ops.adaln.reference import UNMODULATED, Modulation
from vllm_twotower.ops.adaln.reference import gate_add as _gate_add_reference
from vllm_twotower.ops.adaln.reference import modulate_norm as _modulate_norm_reference
from vllm_twotower.ops.adaln.reference import norm_modulate as _norm_modulate_reference
from vllm_twotower.ops.backend import Form, form_for
from vllm_twotower.ops.canvas_sample.reference import Draw, Sample
from vllm_twotower.ops.canvas_sample.reference import canvas_sample as _canvas_sample_reference
from vllm_twotower.ops.mixture_of_experts.reference import Routing
from vllm_twotower.ops.mixture_of_experts.reference import mixture_of_experts as _mixture_of_experts_reference
from vllm_twotower.ops.reveal.reference import CanvasRules, Revealed
from vllm_twotower.ops.reveal.reference import reveal as _reveal_reference
from vllm_twotower.ops.seeded_scan.reference import seeded_conv as _seeded_conv_reference
from vllm_twotower.ops.seeded_scan.reference import seeded_scan as _seeded_scan_reference
from vllm_twotower.ops.state_replay.reference import state_replay

__all__ = [
    "UNMODULATED",
    "CanvasRules",
    "Draw",
    "Modulation",
    "Revealed",
    "Routing",
    "Sample",
    "canvas_sample",
    "gate_add",
    "mixture_of_experts",
    "modulate_norm",
    "norm_modulate",
    "reveal",
    "seeded_conv",
    "seeded_scan",
    "state_replay",
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
    match form_for(logits_NV):
        case Form.TRITON:
            from vllm_twotower.ops.canvas_sample.kernel import canvas_sample as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.canvas_sample import canvas_sample as form
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
    if form_for(token_RS) is Form.TRITON:
        from vllm_twotower.ops.reveal.kernel import reveal as form
    return form(token_RS, proposal_RS, confidence_RS, masked_RS, pass_index_R, rules)


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """RMSNorm of x (1 + scale) + shift: the input of a Mamba or attention layer, whose norm was trained fused into the
    projection after it (spec 3.3).

    Args:
        x_TD: [T, D], the model's dtype: float32, bfloat16 or float16.
        weight_D: [D], of the norm, any of these dtypes.
        eps: of the norm.
        modulation: the layer's, in the model's dtype.

    Returns:
        [T, D], dtype of ``x_TD``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.

    """
    form = _modulate_norm_reference
    match form_for(x_TD):
        case Form.TRITON:
            from vllm_twotower.ops.adaln.kernel import modulate_norm as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.adaln import modulate_norm as form
    return form(x_TD, weight_D, eps, modulation)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """RMSNorm(x) (1 + scale) + shift: the input of a MoE or MLP layer (spec 3.3); arguments as ``modulate_norm``."""
    form = _norm_modulate_reference
    match form_for(x_TD):
        case Form.TRITON:
            from vllm_twotower.ops.adaln.kernel import norm_modulate as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.adaln import norm_modulate as form
    return form(x_TD, weight_D, eps, modulation)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """residual + gate x: the end of every layer (spec 3.3).

    Args:
        x_TD: [T, D], what the layer's mixer returned.
        residual_TD: [T, D], same dtype, what went into the layer; not written.
        modulation: the layer's, in that dtype.

    Returns:
        [T, D], same dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.

    """
    form = _gate_add_reference
    match form_for(x_TD):
        case Form.TRITON:
            from vllm_twotower.ops.adaln.kernel import gate_add as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.adaln import gate_add as form
    return form(x_TD, residual_TD, modulation)


def seeded_conv(
    x_RWC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    cache_BKC: torch.Tensor,
    slot_R: torch.Tensor,
) -> torch.Tensor:
    """Depthwise causal convolution and SiLU, seeded with the K - 1 inputs before the canvas (spec 3.1, 3.3).

    Args:
        x_RWC: [R, W, C], W at most 32; float32, bfloat16 or float16, to which the other tensors are rounded.
        weight_CK: one filter per channel, oldest tap first.
        bias_C: or None.
        cache_BKC: [B, K - 1, C], the context's newest inputs, oldest first; any strides, not written.
        slot_R: int64, each row's slot in the cache; not checked on a device, so it must be a slot.

    Returns:
        [R, W, C], dtype of ``x_RWC``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.

    """
    form = _seeded_conv_reference
    match form_for(x_RWC):
        case Form.TRITON:
            from vllm_twotower.ops.seeded_scan.kernel import seeded_conv as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.seeded_scan import seeded_conv as form
    return form(x_RWC, weight_CK, bias_C, cache_BKC, slot_R)


def seeded_scan(
    x_RWHP: torch.Tensor,
    dt_RWH: torch.Tensor,
    a_H: torch.Tensor,
    b_RWGN: torch.Tensor,
    c_RWGN: torch.Tensor,
    skip_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    state_BHPN: torch.Tensor,
    slot_R: torch.Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The Mamba-2 recurrence over a canvas, in closed form, all fp32 (Mamba-2 paper, section 6; spec 3.3).

    h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t, with dt = softplus(dt + dt_bias). fp32
    throughout, because states of long contexts grow to thousands and a bf16 scan of them turns into NaN (spec, known
    bug 2).

    Args:
        x_RWHP: inputs, W at most 32.
        dt_RWH: raw step sizes.
        a_H: decay rates, negative.
        b_RWGN: input projections; head h uses group h // (H / G).
        c_RWGN: output projections.
        skip_H: D of the paper.
        dt_bias_H: added to dt before softplus.
        state_BHPN: the cache, not written.
        slot_R: int64, each row's slot in the cache; not checked on a device, so it must be a slot.
        out_dtype: what the fp32 result is rounded to.

    Returns:
        [R, W, H, P] of ``out_dtype``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.

    """
    form = _seeded_scan_reference
    match form_for(x_RWHP):
        case Form.TRITON:
            from vllm_twotower.ops.seeded_scan.kernel import seeded_scan as form
        case Form.CPP:
            from vllm_twotower.cpu.ops.seeded_scan import seeded_scan as form
    return form(x_RWHP, dt_RWH, a_H, b_RWGN, c_RWGN, skip_H, dt_bias_H, state_BHPN, slot_R, out_dtype)


def mixture_of_experts(
    x_TD: torch.Tensor, routing: Routing, up_EDI: torch.Tensor, down_EID: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each token's experts, down(relu(up(x))^2) (reference: ``NemotronHMoE``, without the shared one).

    Args:
        x_TD: tokens.
        routing: the router, and how it chooses.
        up_EDI: up projections, inputs first: C++ reads them along their outputs.
        down_EID: down projections, likewise.

    Returns:
        float32 [T, D].

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.

    """
    form = _mixture_of_experts_reference
    if form_for(x_TD) is Form.CPP:
        from vllm_twotower.cpu.ops.mixture_of_experts import mixture_of_experts as form
    return form(x_TD, routing, up_EDI, down_EID)
