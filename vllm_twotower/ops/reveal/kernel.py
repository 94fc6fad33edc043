"""The commit rule on the device: one program, one warp per canvas, and nothing the host has to wait for.

A canvas has at most 32 positions, so ranks come from comparing all pairs, not from a sort.
"""

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.launch import launch
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases


@triton.jit
def _rank(confidence, masked, position):
    """How many masked positions go before each: those surer, and of the equally sure those further left."""
    # as in a torch sort a NaN is the surest; what is not masked comes last
    key = tl.where(confidence != confidence, float("inf"), confidence)
    key = tl.where(masked, key, float("-inf"))
    other, this = key[None, :], key[:, None]
    before = (other > this) | ((other == this) & (position[None, :] < position[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _reveal(
    # [R, S]: int64, int64, float32, bool
    token_ptr,
    proposal_ptr,
    confidence_ptr,
    masked_ptr,
    # [R]: int64, int64, float32, int64
    pass_index_ptr,
    width_ptr,
    threshold_ptr,
    max_steps_ptr,
    # written: int64 [R, S], bool [R, S], int64 [R] each
    out_token_ptr,
    out_masked_ptr,
    level_ptr,
    out_pass_index_ptr,
    # size
    width,
    # compile-time
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK_S)
    inside = position < width
    offset = row * width + position
    masked = tl.load(masked_ptr + offset, mask=inside, other=0).to(tl.int1)
    confidence = tl.load(confidence_ptr + offset, mask=inside, other=0.0)
    pass_index = tl.load(pass_index_ptr + row)
    num_masked = tl.sum(masked.to(tl.int64), 0)
    num_sure = tl.sum((masked & (confidence > tl.load(threshold_ptr + row))).to(tl.int64), 0)
    passes_left = tl.maximum(tl.load(max_steps_ptr + row) - pass_index, 1)
    num_due = (num_masked + passes_left - 1) // passes_left
    wanted = tl.maximum(tl.maximum(num_sure, num_due), 1)
    revealed = masked & (_rank(confidence, masked, position) < wanted)
    token = tl.load(token_ptr + offset, mask=inside, other=0)
    proposal = tl.load(proposal_ptr + offset, mask=inside, other=0)
    tl.store(out_token_ptr + offset, tl.where(revealed, proposal, token), mask=inside)
    still_masked = masked & (revealed == 0)
    tl.store(out_masked_ptr + offset, still_masked, mask=inside)
    num_left = tl.sum(still_masked.to(tl.int64), 0)
    canvas = tl.load(width_ptr + row)
    tl.store(level_ptr + row, canvas * (canvas + 1) // 2 - 1 + num_left)  # decoding.noise_level.level_index
    tl.store(out_pass_index_ptr + row, pass_index + (num_masked > 0).to(tl.int64))


def reveal(
    before: MaskedCanvases, proposal_RS: torch.Tensor, confidence_RS: torch.Tensor, rules: CanvasRules
) -> MaskedCanvases:
    """See ``vllm_twotower.ops.reveal``."""
    num_rows, width = before.token_RS.shape
    # an allocation each: Triton compiles another kernel for a pointer that is not aligned, as a slice's may be
    after = MaskedCanvases(
        token_RS=torch.empty_like(before.token_RS, memory_format=torch.contiguous_format),
        masked_RS=torch.empty(num_rows, width, dtype=torch.bool, device=before.token_RS.device),
        level_R=torch.empty_like(before.pass_index_R),
        pass_index_R=torch.empty_like(before.pass_index_R),
    )
    launch(
        _reveal,
        (num_rows,),
        token_ptr=before.token_RS.contiguous(),
        proposal_ptr=proposal_RS.contiguous(),
        confidence_ptr=confidence_RS.contiguous(),
        masked_ptr=before.masked_RS.contiguous(),
        pass_index_ptr=before.pass_index_R.contiguous(),
        width_ptr=rules.width_R.contiguous(),
        threshold_ptr=rules.threshold_R.contiguous(),
        max_steps_ptr=rules.max_steps_R.contiguous(),
        out_token_ptr=after.token_RS,
        out_masked_ptr=after.masked_RS,
        level_ptr=after.level_R,
        out_pass_index_ptr=after.pass_index_R,
        width=width,
        BLOCK_S=triton.next_power_of_2(width),
        num_warps=1,
    )
    return after
