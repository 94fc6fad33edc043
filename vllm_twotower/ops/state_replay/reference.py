"""States after some of a canvas's tokens, from the states before it and what the layer was fed, plainly.

Legend: R rows, S canvas positions, C conv channels, K conv kernel, H heads, P head dim, G groups, N state size, Z cache
    slots, T = K - 1 taps.
"""

import torch
import torch.nn.functional as F

from vllm_twotower.ops.checks import FLOATS, INDEX, check_argument
from vllm_twotower.ops.seeded_scan.reference import ScanInputs, check_scan


def check_replay(
    inputs: ScanInputs, raw_RSC: torch.Tensor, conv_cache_ZKC: torch.Tensor, num_tokens_R: torch.Tensor
) -> None:
    """Refuse inputs of the wrong shape, dtype or device: a ``ValueError`` that names it."""
    check_scan(inputs)
    (num_rows, width), device = inputs.x_RSHP.shape[:2], inputs.x_RSHP.device
    check_argument("raw_RSC", raw_RSC, (num_rows, width, "C"), FLOATS, device)
    num_slots, channels = inputs.state_ZHPN.shape[0], raw_RSC.shape[2]
    check_argument("conv_cache_ZKC", conv_cache_ZKC, (num_slots, "K - 1", channels), FLOATS, device)
    check_argument("num_tokens_R", num_tokens_R, (num_rows,), INDEX, device)


def state_replay(
    inputs: ScanInputs, *, raw_RSC: torch.Tensor, conv_cache_ZKC: torch.Tensor, num_tokens_R: torch.Tensor
) -> None:
    """See ``vllm_twotower.ops.state_replay``."""
    slot_R, state_ZHPN, heads = inputs.slot_R, inputs.state_ZHPN, inputs.x_RSHP.shape[2]
    behind_RS = torch.arange(raw_RSC.shape[1], device=raw_RSC.device) >= num_tokens_R[:, None]
    x, b = (t.float().masked_fill(behind_RS[..., None, None], 0) for t in (inputs.x_RSHP, inputs.b_RSGN))
    # a token with dt = 0 neither decays the state nor adds to it
    dt_RSH = F.softplus(inputs.dt_RSH.float() + inputs.dt_bias_H.float()).masked_fill(behind_RS[..., None], 0)
    log_decay_RSH = dt_RSH * inputs.a_H.float()
    # over the tokens after each one: a sum from the end, not a difference of long sums
    log_later_RSH = F.pad(log_decay_RSH[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(dim=1).flip(1)
    b_RSHN = b.repeat_interleave(heads // b.shape[2], dim=2)
    gained_RHPN = torch.einsum("rsh,rshp,rshn->rhpn", log_later_RSH.exp() * dt_RSH, x, b_RSHN)
    before_RHPN = state_ZHPN[slot_R]
    after_RHPN = before_RHPN.float() * log_decay_RSH.sum(dim=1).exp()[..., None, None] + gained_RHPN
    # adding nothing may still change a bit: -0.0 + 0.0 is 0.0
    is_same_R = num_tokens_R == 0
    after_RHPN = torch.where(is_same_R[:, None, None, None], before_RHPN, after_RHPN.to(before_RHPN.dtype))
    state_ZHPN[slot_R] = after_RHPN
    history_RTC = torch.cat([conv_cache_ZKC[slot_R], raw_RSC.to(conv_cache_ZKC.dtype)], dim=1)
    newest_RT = num_tokens_R[:, None] + torch.arange(conv_cache_ZKC.shape[1], device=raw_RSC.device)
    conv_cache_ZKC[slot_R] = history_RTC.gather(1, newest_RT[..., None].expand(-1, -1, history_RTC.shape[2]))
