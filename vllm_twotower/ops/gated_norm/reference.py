"""Gate, then RMSNorm within groups, plainly.

Legend: T tokens, D = C * W channels, C groups of W.
"""

import torch

from vllm_twotower.ops.checks import FLOATS, check_tensor


def check_gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> None:
    """Refuse what does not fit together: a ``ValueError`` that names it."""
    check_tensor("x_TD", x_TD, ("T", "D"), FLOATS)
    check_tensor("gate_TD", gate_TD, tuple(x_TD.shape), (x_TD.dtype,), x_TD.device)
    check_tensor("weight_D", weight_D, (x_TD.shape[1],), FLOATS, x_TD.device)
    if num_groups < 1 or x_TD.shape[1] % num_groups:
        raise ValueError(f"num_groups={num_groups}: must divide the {x_TD.shape[1]} columns of x_TD")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be 0 or more")


def gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> torch.Tensor:
    """See ``vllm_twotower.ops.gated_norm``."""
    gate = gate_TD.float()
    x_TCW = (x_TD.float() * gate * torch.sigmoid(gate)).unflatten(-1, (num_groups, -1))
    x_TCW = x_TCW * torch.rsqrt(x_TCW.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x_TCW.flatten(1) * weight_D.float()).to(x_TD.dtype)
