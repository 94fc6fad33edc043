"""Convolution and state-space scan over one canvas per row, from read-only states picked by slot.

Legend: R rows, W canvas positions, C = H*P + 2*G*N conv channels, K conv kernel, H heads, P head dim, G groups, N state
    size, B cache slots. Positions past a row's own canvas may hold any finite numbers: both ops are causal and nothing
    is written back.
"""

import torch
import torch.nn.functional as F

from vllm_twotower.ops.checks import FLOATS, INDEX, check_tensor

MAX_WIDTH = 32
"""Widest canvas."""


def check_width(name: str, tensor: torch.Tensor) -> None:
    """Refuse canvases that are wider than any canvas.

    Raises:
        ValueError: names the argument, what it is and what is allowed.

    """
    if not 1 <= tensor.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{name} has {tensor.shape[1]} positions per canvas, allowed: 1 to {MAX_WIDTH}")


def check_conv(
    x_RWC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    cache_BKC: torch.Tensor,
    slot_R: torch.Tensor,
) -> None:
    """Refuse what neither form of the convolution can work with.

    Raises:
        ValueError: names the argument, what it is and what is allowed.

    """
    check_tensor("x_RWC", x_RWC, ("R", "W", "C"), FLOATS)
    check_width("x_RWC", x_RWC)
    num_rows, _, channels = x_RWC.shape
    check_tensor("weight_CK", weight_CK, (channels, "K"), FLOATS, x_RWC.device)
    if bias_C is not None:
        check_tensor("bias_C", bias_C, (channels,), FLOATS, x_RWC.device)
    check_tensor("cache_BKC", cache_BKC, ("B", weight_CK.shape[1] - 1, channels), FLOATS, x_RWC.device)
    check_tensor("slot_R", slot_R, (num_rows,), INDEX, x_RWC.device)


def seeded_conv(
    x_RWC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    cache_BKC: torch.Tensor,
    slot_R: torch.Tensor,
) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_conv``."""
    check_conv(x_RWC, weight_CK, bias_C, cache_BKC, slot_R)
    dtype = x_RWC.dtype
    padded = torch.cat([cache_BKC[slot_R].to(dtype), x_RWC], dim=1).transpose(1, 2)
    bias_C = None if bias_C is None else bias_C.to(dtype)
    out = F.conv1d(padded, weight_CK[:, None].to(dtype), bias_C, groups=weight_CK.shape[0])
    return F.silu(out).transpose(1, 2)


def check_scan(
    x_RWHP: torch.Tensor,
    dt_RWH: torch.Tensor,
    vectors_H: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    b_RWGN: torch.Tensor,
    c_RWGN: torch.Tensor,
    state_BHPN: torch.Tensor,
    slot_R: torch.Tensor,
) -> None:
    """Refuse what neither form of the scan can work with.

    Args:
        vectors_H: decay rates, D and dt_bias; the others are ``seeded_scan``'s.

    Raises:
        ValueError: names the argument, what it is and what is allowed.

    """
    check_tensor("x_RWHP", x_RWHP, ("R", "W", "H", "P"), FLOATS)
    check_width("x_RWHP", x_RWHP)
    num_rows, width, heads, head_dim = x_RWHP.shape
    device = x_RWHP.device
    check_tensor("dt_RWH", dt_RWH, (num_rows, width, heads), FLOATS, device)
    for name, vector_H in zip(("a_H", "skip_H", "dt_bias_H"), vectors_H, strict=True):
        check_tensor(name, vector_H, (heads,), FLOATS, device)
    check_tensor("b_RWGN", b_RWGN, (num_rows, width, "G", "N"), FLOATS, device)
    groups, state_size = b_RWGN.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"b_RWGN has {groups} groups, which do not divide the {heads} heads of x_RWHP")
    check_tensor("c_RWGN", c_RWGN, (num_rows, width, groups, state_size), FLOATS, device)
    check_tensor("state_BHPN", state_BHPN, ("B", heads, head_dim, state_size), FLOATS, device)
    check_tensor("slot_R", slot_R, (num_rows,), INDEX, device)


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
    """See ``vllm_twotower.ops.seeded_scan``."""
    check_scan(x_RWHP, dt_RWH, (a_H, skip_H, dt_bias_H), b_RWGN, c_RWGN, state_BHPN, slot_R)
    width, heads = x_RWHP.shape[1], x_RWHP.shape[2]
    x = x_RWHP.float()
    dt = F.softplus(dt_RWH.float() + dt_bias_H.float())
    b, c = (t.float().repeat_interleave(heads // t.shape[2], dim=2) for t in (b_RWGN, c_RWGN))
    log_decay_RWH = (dt * a_H.float()).cumsum(dim=1)
    # between two positions; masked before exp, which overflows where the order is reversed
    between_RWWH = log_decay_RWH[:, :, None] - log_decay_RWH[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()[:, :, None]
    decay_RWWH = torch.where(causal, between_RWWH, float("-inf")).exp()
    scores = torch.einsum("rthn,rshn->rtsh", c, b) * decay_RWWH
    inside = torch.einsum("rtsh,rsh,rshp->rthp", scores, dt, x)
    carried = torch.einsum("rthn,rhpn->rthp", c * log_decay_RWH.exp()[..., None], state_BHPN[slot_R].float())
    return (inside + carried + skip_H.float()[:, None] * x).to(out_dtype)
