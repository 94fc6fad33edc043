"""Gate, then RMSNorm within groups, plainly.

Legend: T tokens, D = C * W channels, C groups of W.
"""

import torch

from vllm_twotower.ops.adaln.reference import check_norm
from vllm_twotower.ops.checks import FLOATS, check_argument


def check_gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> None:
    """Refuse what does not fit together: a ``ValueError`` that names it."""
    check_argument("x_TD", x_TD, ("T", "D"), FLOATS)
    check_argument("gate_TD", gate_TD, tuple(x_TD.shape), (x_TD.dtype,), x_TD.device)
    check_norm(x_TD, weight_D, eps)
    if num_groups < 1 or x_TD.shape[1] % num_groups:
        raise ValueError(f"num_groups={num_groups}: must divide the {x_TD.shape[1]} columns of x_TD")


def gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> torch.Tensor:
    """See ``vllm_twotower.ops.gated_norm``."""
    gate = gate_TD.float()
    x_TCW = (x_TD.float() * gate * torch.sigmoid(gate)).unflatten(-1, (num_groups, -1))
    x_TCW = x_TCW * torch.rsqrt(x_TCW.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (x_TCW.flatten(1) * weight_D.float()).to(x_TD.dtype)
