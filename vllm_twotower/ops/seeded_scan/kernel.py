"""A canvas through a Mamba-2 layer on the device: the cached states are read once, in place, and never written.

A canvas has at most 32 positions, so the scan is the closed form of one chunk, and its time should be that of reading
the states. Products are sums of three TF32 products, which keep fp32's accuracy on tensor cores; accumulators are fp32.

Legend: R rows, S canvas positions, C conv channels, K conv kernel, H heads, P head dim, G groups, N state size, Z cache
    slots.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import launch
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs

CONV_TILE = 1024
"""Positions times channels per program of the convolution: 8 per thread, each with an address for every tap."""

SCAN_HEAD_DIM = 32
"""Columns of a head per program of the scan: half a head of the real model, 16 KiB of its state."""

SCAN_STATE_SLICE = 32
"""State columns per iteration of the scan."""

SCAN_STAGES = 3
"""Slices of a state that are being read or used at a time."""

DOT_MINIMUM = 16
"""Smallest side of a tile that ``tl.dot`` takes."""

PRECISION = "tf32x3"
"""How fp32 products are made; "ieee" avoids tensor cores."""


@triton.jit
def times_sigmoid(value, x):
    """value / (1 + exp(-x)), which is silu(x) where they are the same."""
    decayed = tl.exp(-tl.abs(x))  # of the absolute value: cannot overflow
    return value * tl.where(x >= 0, 1.0, decayed) / (1.0 + decayed)


@triton.jit
def _seeded_conv(
    # inputs, filters, bias or None, cached inputs, int64 slots
    x_ptr,
    weight_ptr,
    bias_ptr,
    cache_ptr,
    slot_ptr,
    # written, contiguous
    out_ptr,
    # sizes and strides
    width,
    channels,
    x_row_stride,
    x_position_stride,
    cache_slot_stride,
    cache_tap_stride,
    cache_channel_stride,
    # compile-time
    TAPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    position = tl.arange(0, BLOCK_S)[:, None]
    inside = channel < channels
    inside_tile = (position < width) & inside[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_row = x_ptr + row * x_row_stride + channel[None, :]
    cache_row = cache_ptr + tl.load(slot_ptr + row) * cache_slot_stride + channel[None, :] * cache_channel_stride
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        source = position + (tap + 1 - TAPS)  # negative: an input of the context
        new = tl.load(x_row + source * x_position_stride, mask=inside_tile & (source >= 0), other=0.0)
        cached_at = cache_row + (source + TAPS - 1) * cache_tap_stride
        cached = tl.load(cached_at, mask=inside_tile & (source < 0), other=0.0)
        weight = tl.load(weight_ptr + channel * TAPS + tap, mask=inside, other=0.0)
        value = tl.where(source >= 0, new, cached.to(dtype)).to(tl.float32)
        total += value * weight.to(dtype).to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    total = total.to(dtype).to(tl.float32)  # the reference rounds between convolution and SiLU
    silu = times_sigmoid(total, total)
    tl.store(out_ptr + (row * width + position) * channels + channel[None, :], silu, mask=inside_tile)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate where exp(x) is small (torch's, with its threshold of 20)."""
    e = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + e
    # what the rounding of 1 + e loses, the quotient puts back
    small = tl.where(above == 1.0, e, tl.log(above) * (e / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _decays(dt_row_ptr, dt_position_stride, a, dt_bias, width, BLOCK_S: tl.constexpr):
    """Step sizes, log-decays from the canvas's start, and the weights of each earlier position, 0 for later ones."""
    position = tl.arange(0, BLOCK_S)
    inside = position < width
    raw = tl.load(dt_row_ptr + position * dt_position_stride, mask=inside, other=0.0).to(tl.float32)
    dt = tl.where(inside, softplus(raw + dt_bias), 0.0)
    log_decay = tl.cumsum(dt * a, 0)
    between = log_decay[:, None] - log_decay[None, :]
    # masked before exp, which overflows where the order is reversed
    causal = tl.where(position[:, None] >= position[None, :], between, float("-inf"))
    return log_decay, tl.exp(causal) * dt[None, :]


@triton.jit
def load_rows(row_ptr, position_stride, width, size, first, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """A canvas's vectors as a fp32 tile, zeros outside."""
    position = tl.arange(0, BLOCK_S)[:, None]
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = (position < width) & (column < size)
    return tl.load(row_ptr + position * position_stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _seeded_scan(
    # inputs, raw step sizes, input and output projections, cached states, int64 slots
    x_ptr,
    dt_ptr,
    b_ptr,
    c_ptr,
    state_ptr,
    slot_ptr,
    # [H] each
    a_ptr,
    skip_ptr,
    dt_bias_ptr,
    # written, contiguous
    out_ptr,
    # sizes
    width,
    heads,
    head_dim,
    state_size,
    heads_per_group,
    # strides
    x_row_stride,
    x_position_stride,
    x_head_stride,
    dt_row_stride,
    dt_position_stride,
    b_row_stride,
    b_position_stride,
    b_group_stride,
    c_row_stride,
    c_position_stride,
    c_group_stride,
    state_slot_stride,
    state_head_stride,
    state_column_stride,
    # compile-time
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_P
    column = first + tl.arange(0, BLOCK_P)
    state_at = state_ptr + tl.load(slot_ptr + row) * state_slot_stride + head * state_head_stride
    state_at += column[None, :] * state_column_stride
    group = head // heads_per_group
    b_row = b_ptr + row * b_row_stride + group * b_group_stride
    c_row = c_ptr + row * c_row_stride + group * c_group_stride
    in_head = (column < head_dim)[None, :]
    # what takes long, over slices of the state's columns, of which the next are on their way while one is used: c b^T
    # between the canvas's positions, and c h from the state
    scores = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
    carried = tl.zeros((BLOCK_S, BLOCK_P), tl.float32)
    for start in tl.range(0, state_size, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        state = tl.load(state_at + n, mask=in_head & (n < state_size), other=0.0)
        b = load_rows(b_row, b_position_stride, width, state_size, start, BLOCK_S, BLOCK_N)
        c = load_rows(c_row, c_position_stride, width, state_size, start, BLOCK_S, BLOCK_N)
        scores = tl.dot(c, tl.trans(b), acc=scores, input_precision=PRECISION)
        carried = tl.dot(c, state.to(tl.float32), acc=carried, input_precision=PRECISION)
    x_row = x_ptr + row * x_row_stride + head * x_head_stride
    x = load_rows(x_row, x_position_stride, width, head_dim, first, BLOCK_S, BLOCK_P)
    a = tl.load(a_ptr + head).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    log_decay, weights = _decays(dt_ptr + row * dt_row_stride + head, dt_position_stride, a, dt_bias, width, BLOCK_S)
    y = tl.dot(scores * weights, x, acc=carried * tl.exp(log_decay)[:, None], input_precision=PRECISION)
    y += tl.load(skip_ptr + head).to(tl.float32) * x
    position = tl.arange(0, BLOCK_S)[:, None]
    out = out_ptr + ((row * width + position) * heads + head) * head_dim + column[None, :]
    tl.store(out, y, mask=(position < width) & in_head)


def kernel_strides(name: str, tensor: torch.Tensor, *dims: str) -> dict[str, int]:
    """A tensor's first strides, as the kernels name them."""
    return {f"{name}_{dim}_stride": tensor.stride(i) for i, dim in enumerate(dims)}


def recurrence_arguments(inputs: ScanInputs) -> dict[str, Any]:
    """What the kernels of a scan and of a replay are both launched with."""
    x, dt, b, state = inputs.x_RSHP, inputs.dt_RSH, inputs.b_RSGN, inputs.state_ZHPN
    heads, head_dim, state_size = state.shape[1:]
    return {
        "x_ptr": x,
        "dt_ptr": dt,
        "b_ptr": b,
        "state_ptr": state,
        "slot_ptr": inputs.slot_R.contiguous(),
        "a_ptr": inputs.a_H.contiguous(),
        "dt_bias_ptr": inputs.dt_bias_H.contiguous(),
        "head_dim": head_dim,
        "state_size": state_size,
        "heads_per_group": heads // b.shape[2],
        **kernel_strides("x", x, "row", "position", "head"),
        **kernel_strides("dt", dt, "row", "position"),
        **kernel_strides("b", b, "row", "position", "group"),
        **kernel_strides("state", state, "slot", "head", "column"),
        "PRECISION": PRECISION,
        "BLOCK_S": max(DOT_MINIMUM, triton.next_power_of_2(x.shape[1])),
        "num_warps": 4,
    }


def seeded_conv(inputs: ConvInputs) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_conv``."""
    x_RSC, cache_ZKC = inputs.x_RSC, inputs.cache_ZKC
    check_unit_strides(x_RSC=x_RSC)
    num_rows, width, channels = x_RSC.shape
    block_s = triton.next_power_of_2(width)
    block_c = min(256, CONV_TILE // block_s)
    out_RSC = torch.empty(num_rows, width, channels, dtype=x_RSC.dtype, device=x_RSC.device)
    launch(
        _seeded_conv,
        (num_rows, triton.cdiv(channels, block_c)),
        x_ptr=x_RSC,
        weight_ptr=inputs.weight_CK.contiguous(),
        bias_ptr=inputs.bias_C,
        cache_ptr=cache_ZKC,
        slot_ptr=inputs.slot_R.contiguous(),
        out_ptr=out_RSC,
        width=width,
        channels=channels,
        **kernel_strides("x", x_RSC, "row", "position"),
        **kernel_strides("cache", cache_ZKC, "slot", "tap", "channel"),
        TAPS=inputs.weight_CK.shape[1],
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out_RSC


def seeded_scan(inputs: ScanInputs, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_scan``."""
    x, c = inputs.x_RSHP, inputs.c_RSGN
    check_unit_strides(x_RSHP=x, dt_RSH=inputs.dt_RSH, b_RSGN=inputs.b_RSGN, c_RSGN=c, state_ZHPN=inputs.state_ZHPN)
    num_rows, width, heads, head_dim = x.shape
    out_RSHP = torch.empty(num_rows, width, heads, head_dim, dtype=out_dtype, device=x.device)
    block_p = max(DOT_MINIMUM, min(SCAN_HEAD_DIM, triton.next_power_of_2(head_dim)))
    launch(
        _seeded_scan,
        (num_rows, heads, triton.cdiv(head_dim, block_p)),
        **recurrence_arguments(inputs),
        c_ptr=c,
        **kernel_strides("c", c, "row", "position", "group"),
        skip_ptr=inputs.skip_H.contiguous(),
        out_ptr=out_RSHP,
        width=width,
        heads=heads,
        STAGES=SCAN_STAGES,
        BLOCK_P=block_p,
        BLOCK_N=max(DOT_MINIMUM, min(SCAN_STATE_SLICE, triton.next_power_of_2(c.shape[3]))),
    )
    return out_RSHP
