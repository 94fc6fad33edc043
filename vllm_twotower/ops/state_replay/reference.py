"""States after some of a canvas's tokens, from the states before it and what the layer was fed, plainly.

Legend: R rows, S canvas positions, C conv channels, K conv kernel, H heads, P head dim, G groups, N state size, Z cache
    slots, T = K - 1 taps.
"""

import torch
import torch.nn.functional as F

from vllm_twotower.ops.seeded_scan.reference import ScanInputs


def state_replay(
    inputs: ScanInputs, *, raw_RSC: torch.Tensor, conv_cache_ZKC: torch.Tensor, num_tokens_R: torch.Tensor
) -> None:
    """See ``vllm_twotower.ops.state_replay``."""
    num_taps, num_heads = conv_cache_ZKC.shape[1], inputs.x_RSHP.shape[2]
    counts_RS = torch.arange(raw_RSC.shape[1], device=raw_RSC.device) < num_tokens_R[:, None]
    # a token with dt = 0 neither decays the state nor adds to it
    dt_RSH = F.softplus(inputs.dt_RSH.float() + inputs.dt_bias_H.float()) * counts_RS[..., None]
    log_decay_RSH = (dt_RSH * inputs.a_H.float()).cumsum(dim=1)
    to_end_RSH = (log_decay_RSH[:, -1:] - log_decay_RSH).exp() * dt_RSH
    b_RSHN = inputs.b_RSGN.float().repeat_interleave(num_heads // inputs.b_RSGN.shape[2], dim=2)
    gained_RHPN = torch.einsum("rsh,rshp,rshn->rhpn", to_end_RSH, inputs.x_RSHP.float(), b_RSHN)
    slot_R, state_ZHPN = inputs.slot_R, inputs.state_ZHPN
    before_RHPN = state_ZHPN[slot_R].float() * log_decay_RSH[:, -1].exp()[..., None, None]
    state_ZHPN[slot_R] = (before_RHPN + gained_RHPN).to(state_ZHPN.dtype)
    history_RTC = torch.cat([conv_cache_ZKC[slot_R], raw_RSC.to(conv_cache_ZKC.dtype)], dim=1)
    newest_RT = num_tokens_R[:, None] + torch.arange(num_taps, device=raw_RSC.device)
    conv_cache_ZKC[slot_R] = history_RTC.gather(1, newest_RT[..., None].expand(-1, -1, history_RTC.shape[2]))
