"""The towers' layers as matrix products, for training on a CPU: the functions of ``plain_towers.py``, several times
faster.

Matrices in bf16 with fp32 accumulation, residual stream, norms and scan in fp32. Experts are not gathered: at this size
all of them in one matrix product, with a gate of zero on those not chosen, cost less than sorting tokens. The scan is
the chunked form of state-space duality (Mamba-2 paper, section 6), its chunks a canvas long, as every context state at
a canvas boundary is needed anyway.

Legend: as in ``plain_towers.py``; n chunks, c tokens in a chunk, g query heads per KV head.
"""

import torch
import torch.nn.functional as F

from vllm_twotower.oracle.plain_towers import TowerShape

Weights = dict[str, torch.Tensor]
HALF = torch.bfloat16
EXACT = False
"""Set by the parity test: every product in fp32."""


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with bf16 inputs."""
    return F.linear(x, weight) if EXACT else F.linear(x.to(HALF), weight.to(HALF))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """In fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def grouped_attention(
    q_BLD: torch.Tensor, k_BJMd: torch.Tensor, v_BJMd: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Attention of Q query heads over J KV heads: [B, L, Q*d]; ``visible`` bool, broadcastable to [B, 1, 1, L, M]."""
    batch, length, _ = q_BLD.shape
    _, kv_heads, keys, d = k_BJMd.shape
    q = q_BLD.view(batch, length, kv_heads, -1, d).permute(0, 2, 3, 1, 4)  # [B, J, g, L, d]
    group = q.shape[2]
    scores = (q.reshape(batch * kv_heads, group * length, d) * d**-0.5) @ k_BJMd.flatten(0, 1).transpose(1, 2)
    scores = scores.view(batch, kv_heads, group, length, keys).float()
    weight = scores.masked_fill(~visible, -1e30).softmax(-1).to(v_BJMd.dtype)
    out = weight.view(batch * kv_heads, group * length, keys) @ v_BJMd.flatten(0, 1)
    return out.view(batch, kv_heads, group, length, d).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


def scan(
    x_BncHP: torch.Tensor,
    dt_BncH: torch.Tensor,
    a_H: torch.Tensor,
    b_BncGN: torch.Tensor,
    c_BncGN: torch.Tensor,
    start_BHPN: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Mamba-2 recurrence over all chunks.

    Returns y [B, n, c, H, P] without the skip term, and the states **before** each chunk, [B, n, H, P, N].
    """
    batch, num, chunk, heads, p = x_BncHP.shape
    groups, n = b_BncGN.shape[3:]
    log_BnHc = (dt_BncH * a_H).transpose(2, 3).cumsum(-1)
    x, b, c = (t.transpose(2, 3) for t in (x_BncHP, b_BncGN, c_BncGN))
    dt = dt_BncH.transpose(2, 3)
    past = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    decay = (log_BnHc[..., :, None] - log_BnHc[..., None, :]).masked_fill(~past, -1e30).exp()
    scores = (c @ b.transpose(-1, -2))[:, :, :, None] * decay.view(batch, num, groups, -1, chunk, chunk)
    scores = scores.view(batch, num, heads, chunk, chunk) * dt[..., None, :]
    y = scores @ x
    if num == 1:
        assert start_BHPN is not None
        before = start_BHPN[:, None]
    else:
        to_end = (log_BnHc[..., -1:] - log_BnHc).exp() * dt
        weighted = (x * to_end[..., None]).view(batch, num, groups, -1, chunk, p)
        gained = (weighted.transpose(-1, -2) @ b[:, :, :, None]).view(batch, num, heads, p * n)
        total = log_BnHc[..., -1].transpose(1, 2).cumsum(-1)  # [B, H, n]
        until = F.pad(total[..., :-1], (1, 0))
        earlier = torch.ones(num, num, dtype=torch.bool).tril(-1)
        between = (until[..., :, None] - total[..., None, :]).masked_fill(~earlier, -1e30).exp()
        before = (between @ gained.transpose(1, 2)).transpose(1, 2).reshape(batch, num, heads, p, n)
    decayed = (c[:, :, :, None] * log_BnHc.view(batch, num, groups, -1, chunk, 1).exp()).view(
        batch, num, heads, chunk, n
    )
    y = y + decayed @ before.transpose(-1, -2)
    return y.transpose(2, 3), before


def mamba(
    w: Weights,
    shape: TowerShape,
    x_BLD: torch.Tensor,
    valid_BL: torch.Tensor | None,
    history_BKC: torch.Tensor | None,
    start_BHPN: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mamba-2 over rows. Padding (``valid_BL`` False) neither enters the convolution nor the state.

    Returns the output [B, L, D], the conv inputs [B, L, C] and the states before each chunk [B, n, H, P, N].
    """
    s = shape
    inner, groups = s.mamba_num_heads * s.mamba_head_dim, s.n_groups * s.ssm_state_size
    z, xbc, dt = linear(x_BLD, w["in_proj"]).split([inner, inner + 2 * groups, s.mamba_num_heads], dim=-1)
    dt = F.softplus(dt.float() + w["dt_bias"])
    if valid_BL is not None:
        xbc, dt = xbc * valid_BL[..., None], dt * valid_BL[..., None]
    length = x_BLD.shape[1]
    padded = F.pad(xbc, (0, 0, s.conv_kernel - 1, 0)) if history_BKC is None else torch.cat([history_BKC, xbc], 1)
    conv = sum(padded[:, i : i + length].float() * w["conv1d"][:, 0, i] for i in range(s.conv_kernel))
    conv = F.silu(conv + w["conv1d_bias"])
    x, b, c = (t.unflatten(1, (-1, chunk)) for t in conv.split([inner, groups, groups], dim=-1))
    x = x.unflatten(-1, (s.mamba_num_heads, -1))
    b, c = b.unflatten(-1, (s.n_groups, -1)), c.unflatten(-1, (s.n_groups, -1))
    y, before = scan(x, dt.unflatten(1, (-1, chunk)), -w["A_log"].exp(), b, c, start_BHPN)
    y = (y + w["D"][:, None] * x).flatten(3).flatten(1, 2) * F.silu(z.float())
    y = y.unflatten(-1, (s.n_groups, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + s.layer_norm_epsilon)).flatten(2) * w["norm"]
    return linear(y, w["out_proj"]).float(), xbc, before


def experts(w: Weights, shape: TowerShape, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Routed and shared experts. Returns the output and how often each expert was chosen, [E]."""
    x = x_BLD.flatten(0, 1)
    score_TE = F.linear(x.float(), w["gate"]).sigmoid()
    chosen = (score_TE + w["correction_bias"]).topk(shape.num_experts_per_tok, dim=-1).indices
    mask_TE = torch.zeros_like(score_TE).scatter_(1, chosen, 1.0)
    gate_TE = score_TE * mask_TE
    gate_TE = gate_TE / (gate_TE.sum(-1, keepdim=True) + 1e-20) * shape.routed_scaling_factor
    hidden = F.relu(linear(x, w["up_proj"])).square()
    routed, shared = hidden.split([w["up_proj"].shape[0] - w["shared_size"], w["shared_size"]], dim=-1)
    routed = (routed.unflatten(-1, (shape.n_routed_experts, -1)) * gate_TE[..., None].to(routed.dtype)).flatten(1)
    out = linear(torch.cat([routed, shared], -1), w["down_proj"])
    return out.float().view_as(x_BLD), mask_TE.sum(0)
