"""Convolution and state-space scan over one canvas per row, from read-only states picked by slot.

Legend: R rows, W canvas positions, C = H*P + 2*G*N conv channels, K conv kernel, H heads, P head dim, G groups, N state
    size, B cache slots. Positions past a row's own canvas may hold anything: the scan is causal and nothing is written
    back.
"""

import torch
import torch.nn.functional as F


def seeded_conv(
    x_RWC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    history_RKC: torch.Tensor,
) -> torch.Tensor:
    """Depthwise causal convolution and SiLU, seeded with the K - 1 inputs before the canvas.

    Args:
        x_RWC: inputs, any float dtype.
        weight_CK: one filter per channel, oldest tap first.
        bias_C: or None.
        history_RKC: [R, K - 1, C], the newest inputs of the context, oldest first.

    Returns:
        [R, W, C], dtype of ``x_RWC``.

    """
    taps = weight_CK.shape[1]
    if history_RKC.shape[1] != taps - 1:
        raise ValueError(
            f"history_RKC has {history_RKC.shape[1]} inputs per row, a kernel of {taps} taps needs {taps - 1}"
        )
    padded = torch.cat([history_RKC.to(x_RWC.dtype), x_RWC], dim=1).transpose(1, 2)
    out = F.conv1d(padded, weight_CK[:, None].to(x_RWC.dtype), bias_C, groups=weight_CK.shape[0])
    return F.silu(out).transpose(1, 2)


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
) -> torch.Tensor:
    """The Mamba-2 recurrence over at most a canvas, in closed form, all fp32 (Mamba-2 paper, section 6; spec 3.3).

    h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t, with dt = softplus(dt + dt_bias). fp32
    throughout, because states of long contexts grow to thousands and a bf16 scan of them turns into NaN (spec, known
    bug 2).

    Args:
        x_RWHP: inputs.
        dt_RWH: raw step sizes.
        a_H: decay rates, negative.
        b_RWGN: input projections; head h uses group h // (H / G).
        c_RWGN: output projections.
        skip_H: D of the paper.
        dt_bias_H: added to dt before softplus.
        state_BHPN: the cache, not written.
        slot_R: int64, each row's slot in the cache.

    Returns:
        float32 [R, W, H, P].

    """
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
    return inside + carried + skip_H.float()[:, None] * x
