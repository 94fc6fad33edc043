"""Router and routed experts, plainly, with NVIDIA's roundings: the routing in fp64, the sum of experts in fp32.

Legend: T tokens, D hidden, E experts, I their width, k experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_twotower.ops.checks import FLOATS, check_argument


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighed (``NemotronHTopkRouter``, one group)."""

    weight_ED: torch.Tensor
    """The router's."""
    bias_E: torch.Tensor
    """float32; added to the sigmoid scores to choose, not to weigh."""
    top_k: int
    """Experts per token."""
    normalise: bool
    """Whether the chosen scores are divided by their sum."""
    scaling: float
    """What the weights are multiplied with."""


def check_experts(x_TD: torch.Tensor, routing: Routing, up_EDI: torch.Tensor, down_EID: torch.Tensor) -> None:
    """Refuse experts or a routing that do not fit the tokens: a ``ValueError`` that names it."""
    check_argument("x_TD", x_TD, ("T", "D"), FLOATS)
    hidden = x_TD.shape[1]
    check_argument("up_EDI", up_EDI, ("E", hidden, "I"), FLOATS, x_TD.device)
    num_experts, _, width = up_EDI.shape
    check_argument("down_EID", down_EID, (num_experts, width, hidden), FLOATS, x_TD.device)
    check_argument("routing.weight_ED", routing.weight_ED, (num_experts, hidden), FLOATS, x_TD.device)
    check_argument("routing.bias_E", routing.bias_E, (num_experts,), (torch.float32,), x_TD.device)
    if not 1 <= routing.top_k <= num_experts:
        raise ValueError(f"routing.top_k={routing.top_k}: must be in [1, {num_experts}], the experts there are")


def route(x_TD: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts, int64 [T, k], and their weights, float32 [T, k]."""
    score_TE = F.linear(x_TD.double(), routing.weight_ED.double()).sigmoid()
    chosen_Tk = (score_TE + routing.bias_E).topk(routing.top_k, dim=-1).indices
    weight_Tk = score_TE.gather(1, chosen_Tk)
    if routing.normalise:
        weight_Tk = weight_Tk / (weight_Tk.sum(-1, keepdim=True) + 1e-20)
    return chosen_Tk, (weight_Tk * routing.scaling).float()


def mixture_of_experts(
    x_TD: torch.Tensor, routing: Routing, up_EDI: torch.Tensor, down_EID: torch.Tensor
) -> torch.Tensor:
    """See ``vllm_twotower.ops.mixture_of_experts``."""
    chosen_Tk, weight_Tk = route(x_TD, routing)
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert in chosen_Tk.unique().tolist():
        token, slot = (chosen_Tk == expert).nonzero(as_tuple=True)
        y = F.relu(x_TD[token] @ up_EDI[expert]).square() @ down_EID[expert]
        out_TD.index_add_(0, token, y.float() * weight_Tk[token, slot, None])
    return out_TD
