"""Convolution and state-space scan over one canvas per row, from read-only states picked by slot.

Legend: R rows, S canvas positions, C = H*P + 2*G*N conv channels, K conv kernel, H heads, P head dim, G groups, N state
    size, Z cache slots. Positions past a row's own canvas may hold any finite numbers: both ops are causal and nothing
    is written back.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_twotower.ops.checks import FLOATS, INDEX, check_argument, check_canvas_width


@dataclass(frozen=True, kw_only=True)
class ConvInputs:
    """What ``seeded_conv`` reads; nothing of it is written. Dtypes are float32, bfloat16 or float16, each its own."""

    x_RSC: torch.Tensor
    """S at most 32; its dtype is what the others are rounded to."""
    weight_CK: torch.Tensor
    """One filter per channel, oldest tap first."""
    bias_C: torch.Tensor | None
    cache_ZKC: torch.Tensor
    """[Z, K - 1, C], the context's newest inputs, oldest first; any strides."""
    slot_R: torch.Tensor
    """int64, each row's slot in the cache; not checked on a device, so it must be a slot."""


@dataclass(frozen=True, kw_only=True)
class ScanInputs:
    """What ``seeded_scan`` reads; nothing of it is written. Dtypes are float32, bfloat16 or float16, each its own."""

    x_RSHP: torch.Tensor
    """S at most 32."""
    dt_RSH: torch.Tensor
    """Raw step sizes."""
    a_H: torch.Tensor
    """Decay rates, negative."""
    b_RSGN: torch.Tensor
    """Input projections; head h uses group h // (H / G)."""
    c_RSGN: torch.Tensor
    """Output projections."""
    skip_H: torch.Tensor
    """D of the paper."""
    dt_bias_H: torch.Tensor
    """Added to dt before softplus."""
    state_ZHPN: torch.Tensor
    """The cache."""
    slot_R: torch.Tensor
    """int64, each row's slot in the cache; not checked on a device, so it must be a slot."""


def check_conv(inputs: ConvInputs) -> None:
    """Refuse inputs of the wrong shape, dtype or device: a ``ValueError`` that names it."""
    i, device = inputs, inputs.x_RSC.device
    check_argument("x_RSC", i.x_RSC, ("R", "S", "C"), FLOATS)
    check_canvas_width("x_RSC", i.x_RSC)
    num_rows, _, channels = i.x_RSC.shape
    check_argument("weight_CK", i.weight_CK, (channels, "K"), FLOATS, device)
    if i.bias_C is not None:
        check_argument("bias_C", i.bias_C, (channels,), FLOATS, device)
    check_argument("cache_ZKC", i.cache_ZKC, ("Z", i.weight_CK.shape[1] - 1, channels), FLOATS, device)
    check_argument("slot_R", i.slot_R, (num_rows,), INDEX, device)


def check_scan(inputs: ScanInputs) -> None:
    """Refuse inputs of the wrong shape, dtype or device: a ``ValueError`` that names it."""
    i, device = inputs, inputs.x_RSHP.device
    check_argument("x_RSHP", i.x_RSHP, ("R", "S", "H", "P"), FLOATS)
    check_canvas_width("x_RSHP", i.x_RSHP)
    num_rows, width, heads, head_dim = i.x_RSHP.shape
    check_argument("dt_RSH", i.dt_RSH, (num_rows, width, heads), FLOATS, device)
    for name in ("a_H", "skip_H", "dt_bias_H"):
        check_argument(name, getattr(i, name), (heads,), FLOATS, device)
    check_argument("b_RSGN", i.b_RSGN, (num_rows, width, "G", "N"), FLOATS, device)
    groups, state_size = i.b_RSGN.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"b_RSGN has {groups} groups, which do not divide the {heads} heads of x_RSHP")
    check_argument("c_RSGN", i.c_RSGN, (num_rows, width, groups, state_size), FLOATS, device)
    check_argument("state_ZHPN", i.state_ZHPN, ("Z", heads, head_dim, state_size), FLOATS, device)
    check_argument("slot_R", i.slot_R, (num_rows,), INDEX, device)


def seeded_conv(inputs: ConvInputs) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_conv``."""
    x_RSC, bias_C = inputs.x_RSC, inputs.bias_C
    dtype = x_RSC.dtype
    padded = torch.cat([inputs.cache_ZKC[inputs.slot_R].to(dtype), x_RSC], dim=1).transpose(1, 2)
    bias_C = None if bias_C is None else bias_C.to(dtype)
    out = F.conv1d(padded, inputs.weight_CK[:, None].to(dtype), bias_C, groups=x_RSC.shape[2])
    return F.silu(out).transpose(1, 2)


def seeded_scan(inputs: ScanInputs, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_scan``."""
    x = inputs.x_RSHP.float()
    width, heads = x.shape[1:3]
    dt = F.softplus(inputs.dt_RSH.float() + inputs.dt_bias_H.float())
    b, c = (t.float().repeat_interleave(heads // t.shape[2], dim=2) for t in (inputs.b_RSGN, inputs.c_RSGN))
    log_decay_RSH = (dt * inputs.a_H.float()).cumsum(dim=1)
    # between two positions; masked before exp, which overflows where the order is reversed
    between_RSSH = log_decay_RSH[:, :, None] - log_decay_RSH[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()[:, :, None]
    decay_RSSH = torch.where(causal, between_RSSH, float("-inf")).exp()
    scores = torch.einsum("rthn,rshn->rtsh", c, b) * decay_RSSH
    inside = torch.einsum("rtsh,rsh,rshp->rthp", scores, dt, x)
    state_RHPN = inputs.state_ZHPN[inputs.slot_R].float()
    carried = torch.einsum("rthn,rhpn->rthp", c * log_decay_RSH.exp()[..., None], state_RHPN)
    return (inside + carried + inputs.skip_H.float()[:, None] * x).to(out_dtype)
