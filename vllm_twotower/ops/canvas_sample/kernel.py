"""One pass over the vocabulary per row, in pieces: proposal, confidence and log-sum-exp without an fp32 copy of the
logits.

A program reads one piece of one row into registers; a tiny last kernel puts a row's pieces together. The pieces depend
on the vocabulary alone and never on how many rows there are, so a row's result has the same bits whoever shares the
batch.

Rows that are drawn take a kernel in between. Noise is much arithmetic, but it is bounded: a column whose logit /
temperature is more than ``NOISE_RANGE`` below the row's largest cannot win, and pieces and blocks of such columns are
passed over. The token is the same. At the published temperature of 0.1 only columns within 2 of the largest logit can.

Legend: N rows, V vocabulary, C pieces of a row.
"""

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.canvas_sample.reference import Draw, Sample
from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import launch

COLUMNS_PER_PIECE = 8192
"""16 programs per row at 131,072 columns: the 16 rows of one canvas already give every SM of an H200 its share."""

BLOCK = 1024
"""Columns per iteration of a program that draws."""

PIECE_WARPS = 8
"""Warps that hold a piece in registers: 32 columns per thread."""

NOISE_RANGE = tl.constexpr(19.5)
"""A little more than lies between the least and the largest Gumbel noise, -log(-log u): -2.812 at u = 2**-24 and 16.636
at u = 1 - 2**-24."""

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
def _first(chosen, column):
    """The lowest chosen column."""
    return tl.min(tl.where(chosen, column, _NO_TOKEN), 0)


@triton.jit
def _read_piece(
    # [N, V] of any float dtype
    logits_ptr,
    # written, [N, C]: float32, int32, float32
    peak_ptr,
    token_ptr,
    total_ptr,
    # sizes
    row_stride,
    vocab_size,
    mask_token_id,
    # compile-time
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits_ptr + row * row_stride + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
    if mask_token_id // COLUMNS == piece:
        x = tl.where(column == mask_token_id, float("-inf"), x)
    peak = tl.max(x, 0)
    token = _first(x == peak, column)
    total = tl.sum(tl.exp(x - tl.maximum(peak, _LOWEST)), 0)  # finite, so that -inf - peak is -inf and not NaN
    if total != total:
        # as in a torch argmax a NaN is the largest; an infinity makes the sum a NaN as well
        token = _first((x != x) | (x == float("inf")), column)
        peak = float("inf")
    out = row * tl.num_programs(1) + piece
    tl.store(peak_ptr + out, peak)
    tl.store(token_ptr + out, token)
    tl.store(total_ptr + out, total)


@triton.jit
def _draw_piece(
    # [N, V]; float32 [N]; int64 [N] each; float32 [N, C]
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    pass_index_ptr,
    peak_ptr,
    # written, [N, C]: float32, int32
    score_ptr,
    drawn_ptr,
    # sizes
    row_stride,
    vocab_size,
    mask_token_id,
    num_pieces,
    # compile-time
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    is_drawn = temperature != 0.0
    temperature = tl.where(is_drawn, temperature, 1.0)
    all_pieces = tl.arange(0, BLOCK_C)
    peaks = tl.load(peak_ptr + row * num_pieces + all_pieces, mask=all_pieces < num_pieces, other=float("-inf"))
    least = tl.div_rn(tl.max(peaks, 0), temperature) - NOISE_RANGE
    lane = tl.arange(0, BLOCK)
    first = piece * COLUMNS
    # every lane keeps its own best, so that columns are compared across lanes once
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = first + lane
    piece_peak = tl.load(peak_ptr + row * num_pieces + piece)
    if is_drawn & (tl.div_rn(piece_peak, temperature) >= least):
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
        pass_index = tl.load(pass_index_ptr + row)
        for start in range(0, COLUMNS, BLOCK):
            column = first + start + lane
            inside = (column < vocab_size) & (column != mask_token_id)
            x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
            x = tl.where(x != x, float("inf"), x)  # as in a torch argmax a NaN is the largest
            if tl.div_rn(tl.max(x, 0), temperature) >= least:
                score = tl.div_rn(x, temperature) + _gumbel(seed, column, position, pass_index)
                better = score > best  # strict: among equals the lowest column stays
                best = tl.where(better, score, best)
                token = tl.where(better, column, token)
    piece_best = tl.max(best, 0)
    out = row * num_pieces + piece
    tl.store(score_ptr + out, piece_best)
    tl.store(drawn_ptr + out, _first(best == piece_best, token))


@triton.jit
def _join_pieces(
    # [N, V]; [N, C] each; of drawn rows float32 [N], [N, C] each
    logits_ptr,
    peak_ptr,
    token_ptr,
    total_ptr,
    temperature_ptr,
    score_ptr,
    drawn_ptr,
    # written, [N]: int64, float32
    out_token_ptr,
    confidence_ptr,
    # sizes
    row_stride,
    mask_token_id,
    num_pieces,
    # compile-time
    IS_RANDOM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK_C)
    inside = piece < num_pieces
    offset = row * num_pieces + piece
    peak = tl.load(peak_ptr + offset, mask=inside, other=float("-inf"))
    token = tl.load(token_ptr + offset, mask=inside, other=_NO_TOKEN)
    total = tl.load(total_ptr + offset, mask=inside, other=0.0)
    score = peak
    if IS_RANDOM:
        is_drawn = tl.load(temperature_ptr + row) != 0.0
        score = tl.where(is_drawn, tl.load(score_ptr + offset, mask=inside, other=float("-inf")), score)
        token = tl.where(is_drawn, tl.load(drawn_ptr + offset, mask=inside, other=_NO_TOKEN), token)
    proposal = _first(score == tl.max(score, 0), token)
    peak = tl.maximum(peak, _LOWEST)  # finite, see above
    row_peak = tl.max(peak, 0)
    log_total = row_peak + tl.log(tl.sum(total * tl.exp(peak - row_peak), 0))
    logit = tl.load(logits_ptr + row * row_stride + proposal).to(tl.float32)
    logit = tl.where(proposal == mask_token_id, float("-inf"), logit)
    tl.store(out_token_ptr + row, proposal.to(tl.int64))
    tl.store(confidence_ptr + row, tl.exp(logit - log_total))


def canvas_sample(logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None) -> Sample:
    """See ``vllm_twotower.ops.canvas_sample``."""
    check_unit_strides(logits_NV=logits_NV)
    num_rows, vocab_size = logits_NV.shape
    columns = min(COLUMNS_PER_PIECE, max(BLOCK, triton.next_power_of_2(vocab_size)))
    num_pieces = triton.cdiv(vocab_size, columns)

    def written(dtype: torch.dtype, *more: int) -> torch.Tensor:
        # an allocation each: Triton compiles another kernel for a pointer that is not aligned, as a slice's may be
        return torch.empty(num_rows, *more, dtype=dtype, device=logits_NV.device)

    logits = {"logits_ptr": logits_NV, "row_stride": logits_NV.stride(0), "mask_token_id": mask_token_id}
    pieces = {"num_pieces": num_pieces, "BLOCK_C": triton.next_power_of_2(num_pieces)}
    read = {
        "peak_ptr": written(torch.float32, num_pieces),
        "token_ptr": written(torch.int32, num_pieces),
        "total_ptr": written(torch.float32, num_pieces),
    }
    grid = (num_rows, num_pieces)
    launch(_read_piece, grid, **logits, **read, vocab_size=vocab_size, COLUMNS=columns, num_warps=PIECE_WARPS)
    drawn: dict[str, torch.Tensor | None] = dict.fromkeys(("temperature_ptr", "score_ptr", "drawn_ptr"))
    if draw is not None:
        drawn["temperature_ptr"] = draw.temperature_N.contiguous()
        drawn["score_ptr"] = written(torch.float32, num_pieces)
        drawn["drawn_ptr"] = written(torch.int32, num_pieces)
        launch(
            _draw_piece,
            grid,
            **logits,
            **pieces,
            **drawn,
            seed_ptr=draw.seed_N.contiguous(),
            position_ptr=draw.position_N.contiguous(),
            pass_index_ptr=draw.pass_index_N.contiguous(),
            peak_ptr=read["peak_ptr"],
            vocab_size=vocab_size,
            COLUMNS=columns,
            BLOCK=BLOCK,
            num_warps=4,
        )
    result = Sample(written(torch.int64), written(torch.float32))
    launch(
        _join_pieces,
        (num_rows,),
        **logits,
        **pieces,
        **read,
        **drawn,
        out_token_ptr=result.token_N,
        confidence_ptr=result.confidence_N,
        IS_RANDOM=draw is not None,
        num_warps=1,
    )
    return result
