"""One pass over the vocabulary per row, in pieces: proposal, confidence and log-sum-exp without an fp32 copy of the
logits.

A program reads one piece of one row; a second, tiny kernel puts a row's pieces together. The pieces depend on the
vocabulary alone and never on how many rows there are, so a row's result has the same bits whoever shares the batch.

Legend: N rows, V vocabulary, C pieces of a row.
"""

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.canvas_sample.reference import Draw, Sample, check_arguments
from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import launch

COLUMNS_PER_PIECE = 8192
"""16 programs per row at 131,072 columns: the 16 rows of one canvas already give every SM of an H200 its share."""

BLOCK = 1024
"""Columns per iteration of a program: 16 bytes of bf16 per thread of 4 warps."""

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _gumbel(seed, column, position, pass_index):
    """The noise of ``decoding.noise.gumbel_noise`` for a block of columns: the same integers, the same steps."""
    zero = column * 0
    bits, _, _, _ = tl.philox(seed, column, zero + position.to(tl.int32), zero + pass_index.to(tl.int32), zero)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _add_exp(peak, total, x):
    """Running log-sum-exp with one exponential per element: the sum is total * exp(peak)."""
    shrink = tl.exp(-tl.abs(x - peak))
    higher = x > peak
    return tl.where(higher, x, peak), tl.where(higher, total * shrink + 1.0, total + shrink)


@triton.jit
def _read_piece(
    # [N, V] of any float dtype; float32 [N]; int64 [N] each
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    pass_index_ptr,
    # written, [N, C]: float32, int32, float32, float32
    best_ptr,
    token_ptr,
    peak_ptr,
    total_ptr,
    # sizes
    row_stride,
    vocab_size,
    mask_token_id,
    # compile-time
    IS_RANDOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    first = piece * COLUMNS
    temperature = 0.0
    if IS_RANDOM:
        temperature = tl.load(temperature_ptr + row)
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
        pass_index = tl.load(pass_index_ptr + row)
    # every lane keeps its own running maximum and sum, so that nothing is reduced across lanes inside the loop
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = first + lane
    # finite, so that -inf - peak is -inf and not NaN
    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = first + start + lane
        inside = column < vocab_size
        x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(column == mask_token_id, float("-inf"), x)
        peak, total = _add_exp(peak, total, x)
        score = x
        if IS_RANDOM:  # noqa: SIM102 - decided when the kernel is compiled, the inner one when it runs
            if temperature != 0.0:
                score = tl.div_rn(x, temperature) + _gumbel(seed, column, position, pass_index)
        score = tl.where(score != score, float("inf"), score)  # as torch: a NaN wins the argmax
        better = score > best  # strict: among equals the lowest column stays
        best = tl.where(better, score, best)
        token = tl.where(better, column, token)
    piece_best = tl.max(best, 0)
    piece_peak = tl.max(peak, 0)
    out = row * tl.num_programs(1) + piece
    tl.store(best_ptr + out, piece_best)
    tl.store(token_ptr + out, tl.min(tl.where(best == piece_best, token, _NO_TOKEN), 0))
    tl.store(peak_ptr + out, piece_peak)
    tl.store(total_ptr + out, tl.sum(total * tl.exp(peak - piece_peak), 0))


@triton.jit
def _join_pieces(
    # [N, V]; [N, C] each
    logits_ptr,
    best_ptr,
    token_ptr,
    peak_ptr,
    total_ptr,
    # written, [N]: int64, float32, float32
    out_token_ptr,
    confidence_ptr,
    log_total_ptr,
    # sizes
    row_stride,
    mask_token_id,
    num_pieces,
    # compile-time
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK_C)
    inside = piece < num_pieces
    offset = row * num_pieces + piece
    best = tl.load(best_ptr + offset, mask=inside, other=float("-inf"))
    token = tl.load(token_ptr + offset, mask=inside, other=_NO_TOKEN)
    peak = tl.load(peak_ptr + offset, mask=inside, other=_LOWEST)
    total = tl.load(total_ptr + offset, mask=inside, other=0.0)
    proposal = tl.min(tl.where(best == tl.max(best, 0), token, _NO_TOKEN), 0)
    row_peak = tl.max(peak, 0)
    log_total = row_peak + tl.log(tl.sum(total * tl.exp(peak - row_peak), 0))
    logit = tl.load(logits_ptr + row * row_stride + proposal).to(tl.float32)
    logit = tl.where(proposal == mask_token_id, float("-inf"), logit)
    tl.store(out_token_ptr + row, proposal.to(tl.int64))
    tl.store(confidence_ptr + row, tl.exp(logit - log_total))
    tl.store(log_total_ptr + row, log_total)


def canvas_sample(logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None) -> Sample:
    """See ``vllm_twotower.ops.canvas_sample``."""
    check_arguments(logits_NV, mask_token_id, draw)
    check_unit_strides(logits_NV=logits_NV)
    num_rows, vocab_size = logits_NV.shape
    num_pieces = triton.cdiv(vocab_size, COLUMNS_PER_PIECE)
    device = logits_NV.device
    best_NC, peak_NC, total_NC = torch.empty(3, num_rows, num_pieces, dtype=torch.float32, device=device)
    token_NC = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=device)
    row_stride = logits_NV.stride(0)
    keys = (None,) * 4 if draw is None else (draw.temperature_N, draw.seed_N, draw.position_N, draw.pass_index_N)
    launch(
        _read_piece,
        (num_rows, num_pieces),
        logits_NV,
        *(key if key is None else key.contiguous() for key in keys),
        best_NC,
        token_NC,
        peak_NC,
        total_NC,
        row_stride,
        vocab_size,
        mask_token_id,
        IS_RANDOM=draw is not None,
        COLUMNS=min(COLUMNS_PER_PIECE, triton.cdiv(vocab_size, BLOCK) * BLOCK),
        BLOCK=BLOCK,
        num_warps=4,
    )
    token_N = torch.empty(num_rows, dtype=torch.int64, device=device)
    confidence_N, log_total_N = torch.empty(2, num_rows, dtype=torch.float32, device=device)
    launch(
        _join_pieces,
        (num_rows,),
        logits_NV,
        best_NC,
        token_NC,
        peak_NC,
        total_NC,
        token_N,
        confidence_N,
        log_total_N,
        row_stride,
        mask_token_id,
        num_pieces,
        BLOCK_C=triton.next_power_of_2(num_pieces),
        num_warps=1,
    )
    return Sample(token_N, confidence_N, log_total_N)
