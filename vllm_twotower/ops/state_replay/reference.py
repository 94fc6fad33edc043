"""States after some of a canvas's tokens, from the states before it and what the layer was fed, plainly.

Legend: R rows, S canvas positions, C conv channels, K conv kernel, H heads, P head dim, G groups, N state size, B cache
    slots.
"""

import torch
import torch.nn.functional as F


def state_replay(
    *,
    raw_RSC: torch.Tensor,
    x_RSHP: torch.Tensor,
    dt_RSH: torch.Tensor,
    a_H: torch.Tensor,
    b_RSGN: torch.Tensor,
    dt_bias_H: torch.Tensor,
    num_tokens_R: torch.Tensor,
    conv_cache_BKC: torch.Tensor,
    state_BHPN: torch.Tensor,
    slot_R: torch.Tensor,
) -> None:
    """See ``vllm_twotower.ops.state_replay``."""
    taps = conv_cache_BKC.shape[1]
    counts_RS = torch.arange(raw_RSC.shape[1], device=raw_RSC.device) < num_tokens_R[:, None]
    # a token with dt = 0 neither decays the state nor adds to it
    dt_RSH = F.softplus(dt_RSH.float() + dt_bias_H.float()) * counts_RS[..., None]
    log_decay_RSH = (dt_RSH * a_H.float()).cumsum(dim=1)
    to_end_RSH = (log_decay_RSH[:, -1:] - log_decay_RSH).exp() * dt_RSH
    b_RSHN = b_RSGN.float().repeat_interleave(x_RSHP.shape[2] // b_RSGN.shape[2], dim=2)
    gained_RHPN = torch.einsum("rsh,rshp,rshn->rhpn", to_end_RSH, x_RSHP.float(), b_RSHN)
    before_RHPN = state_BHPN[slot_R].float() * log_decay_RSH[:, -1].exp()[..., None, None]
    state_BHPN[slot_R] = (before_RHPN + gained_RHPN).to(state_BHPN.dtype)
    history_RTC = torch.cat([conv_cache_BKC[slot_R], raw_RSC.to(conv_cache_BKC.dtype)], dim=1)
    newest_RK = num_tokens_R[:, None] + torch.arange(taps, device=raw_RSC.device)
    conv_cache_BKC[slot_R] = history_RTC.gather(1, newest_RK[..., None].expand(-1, -1, history_RTC.shape[2]))
