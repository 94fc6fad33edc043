"""The gated norm in one read and one write: a program per token and group, the group in registers.

Legend: T tokens, D = C * W channels, C groups of W.
"""

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import MAX_BLOCK, count_warps, launch
from vllm_twotower.ops.seeded_scan.kernel import times_sigmoid


@triton.jit
def _gated_norm(
    # tokens, their gates, the norm's weight
    x_ptr,
    gate_ptr,
    weight_ptr,
    # written: tokens, contiguous
    out_ptr,
    # sizes
    x_stride,
    gate_stride,
    width,
    eps,
    # compile-time
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK_W)
    inside = within < width
    column = group * width + within
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = times_sigmoid(x * gate, gate)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    row = out_ptr + token * width * tl.num_programs(1)
    tl.store(row + column, (x * weight).to(out_ptr.dtype.element_ty), mask=inside)


def gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> torch.Tensor:
    """See ``vllm_twotower.ops.gated_norm``."""
    num_tokens, width = x_TD.shape[0], x_TD.shape[1] // num_groups
    if width > MAX_BLOCK:
        raise ValueError(f"a group of x_TD has {width} columns, the kernel takes at most {MAX_BLOCK}: use references")
    check_unit_strides(x_TD=x_TD, gate_TD=gate_TD)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = triton.next_power_of_2(width)
    launch(
        _gated_norm,
        (num_tokens, num_groups),
        x_ptr=x_TD,
        gate_ptr=gate_TD,
        weight_ptr=weight_D.contiguous(),
        out_ptr=out_TD,
        x_stride=x_TD.stride(0),
        gate_stride=gate_TD.stride(0),
        width=width,
        eps=eps,
        BLOCK_W=block,
        num_warps=count_warps(block),
    )
    return out_TD
