"""The operations that a denoise pass consists of, and the one that ends a verification: each with a plain reference,
most with a Triton kernel and one in C++.

Every op raises a ``ValueError`` where an argument has the wrong shape, dtype, device or range; the message names it.
Torch and triton only, so all of it can be imported, tested and timed on a machine without vLLM; Triton is imported when
a kernel first runs. The functions here check their arguments and take the implementation that ``backend.py`` selects;
implementations check only what they themselves cannot take. No GPU has run a kernel yet: ``docs/kernels.md``.

Legend, for all ops: R rows (requests), S canvas positions, T tokens, N rows of logits, V vocabulary, D hidden, L noise
    levels, 3: shift, scale, gate; Mamba: C = H*P + 2*G*N conv channels, K conv kernel, H heads, P head dim, G groups, N
    state size, Z cache slots; E experts, I their width.
"""

import torch

from vllm_twotower.ops.adaln.reference import UNMODULATED, Modulation, check_modulation, check_norm
from vllm_twotower.ops.backend import find_implementation
from vllm_twotower.ops.canvas_sample import reference
from vllm_twotower.ops.canvas_sample.reference import NOISE_TILE, Draw, Sample, ShapeScores, check_logits
from vllm_twotower.ops.checks import check_argument
from vllm_twotower.ops.gated_norm.reference import check_gated_norm
from vllm_twotower.ops.mixture_of_experts.reference import Routing, check_experts
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases, check_canvases
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs, check_conv, check_scan
from vllm_twotower.ops.state_replay.reference import check_replay

__all__ = [
    "NOISE_TILE",
    "UNMODULATED",
    "CanvasRules",
    "ConvInputs",
    "Draw",
    "MaskedCanvases",
    "Modulation",
    "Routing",
    "Sample",
    "ScanInputs",
    "ShapeScores",
    "canvas_sample",
    "gate_add",
    "gated_norm",
    "mixture_of_experts",
    "modulate_norm",
    "norm_modulate",
    "reveal",
    "seeded_conv",
    "seeded_scan",
    "state_replay",
]


def canvas_sample(
    logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None, shape_scores: ShapeScores | None = None
) -> Sample:
    """Propose a token per row, and say how sure the denoiser is of it (``generate_mask_diffusion``).

    The proposal is the argmax of the logits or, for a row with a temperature, of logits / temperature + Gumbel noise.
    The kernel reads the logits once, in their own dtype; its random integers are those of ``decoding.noise``.

    Args:
        logits_NV: [N, V], float32, bfloat16 or float16, processed; may be written: the mask id's column.
        mask_token_id: never proposed, and no part of any sum.
        draw: temperatures and noise keys, or None where every row is greedy.
        shape_scores: what top-k, top-p and min-p leave of the scores of drawn rows; takes the reference.

    """
    check_logits(logits_NV, mask_token_id, draw)
    if shape_scores is not None:
        return reference.canvas_sample(logits_NV, mask_token_id, draw, shape_scores)
    return find_implementation("canvas_sample", logits_NV)(logits_NV, mask_token_id, draw)


def reveal(
    before: MaskedCanvases, proposal_RS: torch.Tensor, confidence_RS: torch.Tensor, rules: CanvasRules
) -> MaskedCanvases:
    """Write the surest proposals of a pass into their canvases (``generate_mask_diffusion``, number to commit).

    k = max(#(confidence > gamma), 1, ceil(masked / (T - pass))) positions of each row that has any masked, all of them
    in the last pass; ties go to the lowest position.

    Args:
        before: the canvases; ``level_R`` is not read, nothing is written.
        proposal_RS: int64 [R, S], read where masked.
        confidence_RS: float32 [R, S], read where masked.
        rules: the rows' width, gamma and T.

    Returns:
        The canvases after the pass; ``pass_index_R`` is one more for each row that had anything masked.

    """
    check_canvases(before, proposal_RS, confidence_RS, rules)
    return find_implementation("reveal", before.token_RS)(before, proposal_RS, confidence_RS, rules)


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """RMSNorm of x (1 + scale) + shift: the input of a Mamba or attention layer, whose norm was trained fused into the
    projection after it (``_run_denoiser_step_diffusion``).

    Args:
        x_TD: [T, D], the model's dtype: float32, bfloat16 or float16.
        weight_D: [D], of the norm, any of these dtypes.
        eps: of the norm.
        modulation: the layer's, in the model's dtype.

    Returns:
        [T, D], dtype of ``x_TD``.

    """
    check_modulation(x_TD, modulation)
    check_norm(x_TD, weight_D, eps)
    return find_implementation("modulate_norm", x_TD)(x_TD, weight_D, eps, modulation)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """RMSNorm(x) (1 + scale) + shift: the input of a MoE or MLP layer; otherwise as ``modulate_norm``."""
    check_modulation(x_TD, modulation)
    check_norm(x_TD, weight_D, eps)
    return find_implementation("norm_modulate", x_TD)(x_TD, weight_D, eps, modulation)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """residual + gate x: the end of every layer (``_run_denoiser_step_diffusion``).

    Args:
        x_TD: [T, D], what the layer's mixer returned.
        residual_TD: [T, D], same dtype, what went into the layer; not written.
        modulation: the layer's, in that dtype.

    Returns:
        [T, D], same dtype.

    """
    check_modulation(x_TD, modulation)
    check_argument("residual_TD", residual_TD, tuple(x_TD.shape), (x_TD.dtype,), x_TD.device)
    return find_implementation("gate_add", x_TD)(x_TD, residual_TD, modulation)


def gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> torch.Tensor:
    """RMSNorm of x silu(gate) within each of a token's groups: the end of a Mamba layer (``MambaRMSNormGated``).

    fp32 inside and rounded once, as in NVIDIA's code; vLLM's layer rounds before the weight as well.

    Args:
        x_TD: [T, D], what the scan returned: float32, bfloat16 or float16.
        gate_TD: [T, D], same dtype; its rows may be parts of longer ones.
        weight_D: [D], of the norm, any of these dtypes.
        eps: of the norm.
        num_groups: of neighbouring columns, each with a mean of its own; divides D.

    Returns:
        [T, D], dtype of ``x_TD``.

    """
    check_gated_norm(x_TD, gate_TD, weight_D, eps, num_groups)
    return find_implementation("gated_norm", x_TD)(x_TD, gate_TD, weight_D, eps, num_groups)


def seeded_conv(inputs: ConvInputs) -> torch.Tensor:
    """Depthwise causal convolution and SiLU, seeded with the K - 1 inputs before the canvas.

    Returns:
        [R, S, C], dtype of ``inputs.x_RSC``.

    """
    check_conv(inputs)
    return find_implementation("seeded_conv", inputs.x_RSC)(inputs)


def seeded_scan(inputs: ScanInputs, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The Mamba-2 recurrence over a canvas, in closed form (Mamba-2 paper, section 6, state-space duality).

    h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t, with dt = softplus(dt + dt_bias). fp32
    throughout, as in NVIDIA's code: states of long contexts grow to thousands, and a bf16 scan of them turns into NaN.

    Args:
        inputs: of the scan.
        out_dtype: what the fp32 result is rounded to.

    Returns:
        [R, S, H, P] of ``out_dtype``.

    """
    check_scan(inputs)
    return find_implementation("seeded_scan", inputs.x_RSHP)(inputs, out_dtype)


def state_replay(
    inputs: ScanInputs, *, raw_RSC: torch.Tensor, conv_cache_ZKC: torch.Tensor, num_tokens_R: torch.Tensor
) -> None:
    """Advance a Mamba layer's cached states over the first tokens of each row, in place; nothing is read by the host.

    With k = ``num_tokens_R`` and dt, a, x, b as in ``seeded_scan``,
    h_k = exp(sum_(t <= k) a dt_t) h_0 + sum_(s <= k) exp(sum_(s < t <= k) a dt_t) dt_s x_s b_s^T
    (Mamba-2 paper, section 6: the recurrence, unrolled), in fp32. The window of conv inputs becomes the K - 1 newest of
    what it was and the row's first k. Tokens from k on are not looked at; a row of k = 0 keeps every bit.

    Args:
        inputs: what ``seeded_scan`` read; ``c_RSGN`` and ``skip_H`` do not matter. Written: ``state_ZHPN`` at
            ``slot_R``, which must be different slots.
        raw_RSC: [R, S, C], inputs of the convolution before it, float32, bfloat16 or float16.
        conv_cache_ZKC: [Z, K - 1, C], one of these dtypes, oldest first, any strides. Written at ``slot_R``.
        num_tokens_R: int64 [R], k of each row, 0 to S; not checked on a device.

    """
    check_replay(inputs, raw_RSC, conv_cache_ZKC, num_tokens_R)
    run = find_implementation("state_replay", inputs.x_RSHP)
    run(inputs, raw_RSC=raw_RSC, conv_cache_ZKC=conv_cache_ZKC, num_tokens_R=num_tokens_R)


def mixture_of_experts(
    x_TD: torch.Tensor, routing: Routing, up_EDI: torch.Tensor, down_EID: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each token's experts, down(relu(up(x))^2) (``NemotronHMoE``, without the shared one).

    Args:
        x_TD: tokens.
        routing: the router, and how it chooses.
        up_EDI: up projections, inputs first: C++ reads them along their outputs.
        down_EID: down projections, likewise.

    Returns:
        float32 [T, D].

    """
    check_experts(x_TD, routing, up_EDI, down_EID)
    return find_implementation("mixture_of_experts", x_TD)(x_TD, routing, up_EDI, down_EID)
