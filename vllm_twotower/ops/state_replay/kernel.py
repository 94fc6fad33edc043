"""States after some of a canvas's tokens, on the device: each state is read once and written in place.

The recurrence over the row's first tokens in closed form: the state decays once over all of them, and each token adds
x b^T, decayed by what comes after it. Products are sums of three TF32 products, as in ``ops.seeded_scan``.

Every place is read and written by one program only, which reads a tile before it writes any of it: the barriers are for
threads that hold the same elements twice, or elements that another thread's go into.

Legend: R rows, S canvas positions, C conv channels, K conv kernel, H heads, P head dim, G groups, N state size, Z cache
    slots.
"""

import torch
import triton
import triton.language as tl

from vllm_twotower.ops.checks import check_unit_strides
from vllm_twotower.ops.launch import launch
from vllm_twotower.ops.seeded_scan.kernel import (
    DOT_MINIMUM,
    kernel_strides,
    load_rows,
    recurrence_arguments,
    softplus,
)
from vllm_twotower.ops.seeded_scan.reference import ScanInputs

REPLAY_HEAD_DIM = 32
"""Columns of a head per program: half a head of the real model, 16 KiB of its state."""

REPLAY_STATE_SLICE = 64
"""State columns per iteration."""

WINDOW_TILE = 1024
"""Inputs of a window per program."""


@triton.jit
def _replay_state(
    # inputs, raw step sizes, input projections, int64 slots, int64 tokens that count
    x_ptr,
    dt_ptr,
    b_ptr,
    slot_ptr,
    num_tokens_ptr,
    # [H] each
    a_ptr,
    dt_bias_ptr,
    # cached states, read and written
    state_ptr,
    # sizes
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
    state_slot_stride,
    state_head_stride,
    state_column_stride,
    # compile-time
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK_P
    num_tokens = tl.load(num_tokens_ptr + row)
    position = tl.arange(0, BLOCK_S)
    counts = position < num_tokens
    dt_at = dt_ptr + row * dt_row_stride + head + position * dt_position_stride
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = tl.where(counts, softplus(tl.load(dt_at, mask=counts, other=0.0).to(tl.float32) + dt_bias), 0.0)
    log_decay = dt * tl.load(a_ptr + head).to(tl.float32)
    later = position[None, :] > position[:, None]
    weight = tl.exp(tl.sum(tl.where(later, log_decay[None, :], 0.0), 1)) * dt
    x_row = x_ptr + row * x_row_stride + head * x_head_stride
    x = load_rows(x_row, x_position_stride, num_tokens, head_dim, first, BLOCK_S, BLOCK_P) * weight[:, None]
    kept = tl.exp(tl.sum(log_decay, 0))
    column = first + tl.arange(0, BLOCK_P)
    state_at = state_ptr + tl.load(slot_ptr + row) * state_slot_stride + head * state_head_stride
    state_at += column[None, :] * state_column_stride
    b_row = b_ptr + row * b_row_stride + (head // heads_per_group) * b_group_stride
    # a row of no tokens reads and writes nothing
    is_here = (column < head_dim)[None, :] & (num_tokens > 0)
    for start in range(0, state_size, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        mask = is_here & (n < state_size)
        state = tl.load(state_at + n, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
        b = load_rows(b_row, b_position_stride, num_tokens, state_size, start, BLOCK_S, BLOCK_N)
        state = tl.dot(tl.trans(b), x, acc=state * kept, input_precision=PRECISION)
        tl.store(state_at + n, state, mask=mask)


@triton.jit
def _shift_window(
    # inputs, int64 slots, int64 tokens that count
    raw_ptr,
    slot_ptr,
    num_tokens_ptr,
    # cached inputs, read and written
    cache_ptr,
    # sizes and strides
    channels,
    raw_row_stride,
    raw_position_stride,
    cache_slot_stride,
    cache_tap_stride,
    cache_channel_stride,
    # compile-time
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    num_tokens = tl.load(num_tokens_ptr + row)
    tap = tl.arange(0, BLOCK_T)[:, None]
    mask = (tap < TAPS) & (channel < channels) & (num_tokens > 0)
    source = tap + num_tokens  # among the old window and then the canvas
    cache_row = cache_ptr + tl.load(slot_ptr + row) * cache_slot_stride + channel * cache_channel_stride
    old = tl.load(cache_row + source * cache_tap_stride, mask=mask & (source < TAPS), other=0.0)
    raw_at = raw_ptr + row * raw_row_stride + (source - TAPS) * raw_position_stride + channel
    new = tl.load(raw_at, mask=mask & (source >= TAPS), other=0.0)
    tl.debug_barrier()
    tl.store(cache_row + tap * cache_tap_stride, tl.where(source < TAPS, old, new.to(old.dtype)), mask=mask)


def state_replay(
    inputs: ScanInputs, *, raw_RSC: torch.Tensor, conv_cache_ZKC: torch.Tensor, num_tokens_R: torch.Tensor
) -> None:
    """See ``vllm_twotower.ops.state_replay``."""
    x, b = inputs.x_RSHP, inputs.b_RSGN
    check_unit_strides(x_RSHP=x, dt_RSH=inputs.dt_RSH, b_RSGN=b, state_ZHPN=inputs.state_ZHPN, raw_RSC=raw_RSC)
    num_rows, _, heads, head_dim = x.shape
    num_tokens_R = num_tokens_R.contiguous()
    block_p = max(DOT_MINIMUM, min(REPLAY_HEAD_DIM, triton.next_power_of_2(head_dim)))
    launch(
        _replay_state,
        (num_rows, heads, triton.cdiv(head_dim, block_p)),
        **recurrence_arguments(inputs),
        num_tokens_ptr=num_tokens_R,
        BLOCK_P=block_p,
        BLOCK_N=max(DOT_MINIMUM, min(REPLAY_STATE_SLICE, triton.next_power_of_2(b.shape[3]))),
    )
    num_taps, channels = conv_cache_ZKC.shape[1:]
    block_t = triton.next_power_of_2(num_taps)
    block_c = WINDOW_TILE // block_t
    launch(
        _shift_window,
        (num_rows, triton.cdiv(channels, block_c)),
        raw_ptr=raw_RSC,
        slot_ptr=inputs.slot_R.contiguous(),
        num_tokens_ptr=num_tokens_R,
        cache_ptr=conv_cache_ZKC,
        channels=channels,
        **kernel_strides("raw", raw_RSC, "row", "position"),
        **kernel_strides("cache", conv_cache_ZKC, "slot", "tap", "channel"),
        TAPS=num_taps,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
    )
