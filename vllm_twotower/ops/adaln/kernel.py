"""Modulation, norm and gate in one read and one write per token: one program per token, its whole vector in registers.

Every intermediate is rounded to the model's dtype where NVIDIA's eager code rounds it, so bf16 results are the
reference's to the order of a sum.

Legend: T tokens, R rows, D hidden, L noise levels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.adaln.reference import Modulation
from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import MAX_BLOCK, count_warps, launch


@triton.jit
def _modulation(vector_ptr, table_ptr, level, PART: tl.constexpr, hidden, column, inside):
    """A token's shift (0), scale (1) or gate (2), rounded to the model's dtype: 0, 0 and 1 at level -1."""
    known = inside & (level >= 0)
    shared = tl.load(vector_ptr + (level * 3 + PART) * hidden + column, mask=known, other=0.0)
    own = tl.load(table_ptr + PART * hidden + column, mask=known, other=0.0)
    total = (shared.to(tl.float32) + own.to(tl.float32)).to(shared.dtype).to(tl.float32)
    if PART == 2:
        total = tl.where(level >= 0, total, 1.0)
    return total


@triton.jit
def _modulate(x, vector_ptr, table_ptr, level, hidden, column, inside, dtype: tl.constexpr):
    """x (1 + scale) + shift, fp32 values that are rounded to ``dtype`` after every step."""
    scale = _modulation(vector_ptr, table_ptr, level, 1, hidden, column, inside)
    shift = _modulation(vector_ptr, table_ptr, level, 0, hidden, column, inside)
    factor = (1.0 + scale).to(dtype).to(tl.float32)
    return ((x * factor).to(dtype).to(tl.float32) + shift).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm(x, weight_ptr, eps, hidden, column, inside, dtype: tl.constexpr):
    """Columns outside are 0 and stay so."""
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scaled = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)
    return (weight * scaled).to(dtype).to(tl.float32)


@triton.jit
def _norm_and_modulate(
    # tokens and the norm's weight; what all layers share and the layer's own; int64 level of a row, row of a token
    x_ptr,
    weight_ptr,
    vector_ptr,
    table_ptr,
    level_ptr,
    row_ptr,
    # written: tokens, contiguous
    out_ptr,
    # sizes
    x_stride,
    hidden,
    eps,
    # compile-time
    MODULATE_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < hidden
    level = tl.load(level_ptr + tl.load(row_ptr + token))
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if MODULATE_FIRST:
        x = _modulate(x, vector_ptr, table_ptr, level, hidden, column, inside, dtype)
    x = _rms_norm(x, weight_ptr, eps, hidden, column, inside, dtype)
    if not MODULATE_FIRST:
        x = _modulate(x, vector_ptr, table_ptr, level, hidden, column, inside, dtype)
    tl.store(out_ptr + token * hidden + column, x, mask=inside)


@triton.jit
def _gate_add(
    # tokens twice; what all layers share and the layer's own; int64 level of a row, row of a token
    x_ptr,
    residual_ptr,
    vector_ptr,
    table_ptr,
    level_ptr,
    row_ptr,
    # written: tokens, contiguous
    out_ptr,
    # sizes
    x_stride,
    residual_stride,
    hidden,
    # compile-time
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < hidden
    level = tl.load(level_ptr + tl.load(row_ptr + token))
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = _modulation(vector_ptr, table_ptr, level, 2, hidden, column, inside)
    tl.store(out_ptr + token * hidden + column, residual + (gate * x).to(dtype).to(tl.float32), mask=inside)


def _run(kernel: Any, x_TD: torch.Tensor, modulation: Modulation, **own: Any) -> torch.Tensor:
    """Launch one program per token; ``own`` is what the two kernels do not share."""
    num_tokens, hidden = x_TD.shape
    if hidden > MAX_BLOCK:
        raise ValueError(f"x_TD has {hidden} columns, the kernel takes at most {MAX_BLOCK}: use the reference")
    check_unit_strides(x_TD=x_TD)
    out_TD = torch.empty(num_tokens, hidden, dtype=x_TD.dtype, device=x_TD.device)
    block = triton.next_power_of_2(hidden)
    launch(
        kernel,
        (num_tokens,),
        x_ptr=x_TD,
        vector_ptr=modulation.vector_L3D.contiguous(),
        table_ptr=modulation.table_3D.contiguous(),
        level_ptr=modulation.level_R.contiguous(),
        row_ptr=modulation.row_T.contiguous(),
        out_ptr=out_TD,
        x_stride=x_TD.stride(0),
        hidden=hidden,
        BLOCK_D=block,
        num_warps=count_warps(block),
        **own,
    )
    return out_TD


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.modulate_norm``."""
    own = {"weight_ptr": weight_D.contiguous(), "eps": eps, "MODULATE_FIRST": True}
    return _run(_norm_and_modulate, x_TD, modulation, **own)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.norm_modulate``."""
    own = {"weight_ptr": weight_D.contiguous(), "eps": eps, "MODULATE_FIRST": False}
    return _run(_norm_and_modulate, x_TD, modulation, **own)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.gate_add``."""
    check_unit_strides(residual_TD=residual_TD)
    own = {"residual_ptr": residual_TD, "residual_stride": residual_TD.stride(0)}
    return _run(_gate_add, x_TD, modulation, **own)
