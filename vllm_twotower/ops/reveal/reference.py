"""The reveal rule over a batch of canvases, plainly.

Legend: R rows (requests), S canvas positions of the table, at most 32.

Its laws, each pinned in ``tests/test_unmask_laws.py``: a revealed token never changes; a row with masked positions
reveals at least one and never more than the rule's number; ties go to the lowest position; rows do not see each other.
"""

from dataclasses import dataclass

import torch

from vllm_twotower.decoding.noise_level import level_index
from vllm_twotower.ops.checks import INDEX, check_argument, check_canvas_width


@dataclass(frozen=True)
class CanvasRules:
    """What each row's canvas is revealed by."""

    width_R: torch.Tensor
    """int64 [R], canvas width; positions from there on are not masked."""
    threshold_R: torch.Tensor
    """float32 [R], gamma."""
    max_steps_R: torch.Tensor
    """int64 [R], T."""


@dataclass(frozen=True, kw_only=True)
class MaskedCanvases:
    """Canvases before or after a pass."""

    token_RS: torch.Tensor
    """int64 [R, S], S at most 32."""
    masked_RS: torch.Tensor
    """bool [R, S], undecided positions; none from a row's width on."""
    level_R: torch.Tensor
    """int64 [R], noise level for the next pass, see ``decoding.noise_level.level_index``."""
    pass_index_R: torch.Tensor
    """int64 [R], passes run over each so far."""


def check_canvases(
    before: MaskedCanvases, proposal_RS: torch.Tensor, confidence_RS: torch.Tensor, rules: CanvasRules
) -> None:
    """Refuse canvases, proposals or rules that do not fit together: a ``ValueError`` that names it."""
    check_argument("before.token_RS", before.token_RS, ("R", "S"), INDEX)
    check_canvas_width("before.token_RS", before.token_RS)
    num_rows, width = before.token_RS.shape
    device = before.token_RS.device
    check_argument("proposal_RS", proposal_RS, (num_rows, width), INDEX, device)
    check_argument("confidence_RS", confidence_RS, (num_rows, width), (torch.float32,), device)
    check_argument("before.masked_RS", before.masked_RS, (num_rows, width), (torch.bool,), device)
    check_argument("before.pass_index_R", before.pass_index_R, (num_rows,), INDEX, device)
    check_argument("rules.width_R", rules.width_R, (num_rows,), INDEX, device)
    check_argument("rules.threshold_R", rules.threshold_R, (num_rows,), (torch.float32,), device)
    check_argument("rules.max_steps_R", rules.max_steps_R, (num_rows,), INDEX, device)


def num_to_reveal(
    confidence_RS: torch.Tensor,
    masked_RS: torch.Tensor,
    threshold_R: torch.Tensor,
    pass_index_R: torch.Tensor,
    max_steps_R: torch.Tensor,
) -> torch.Tensor:
    """How many masked positions each row reveals in this pass.

    k = max(#(confidence > threshold), 1, ceil(masked / (T - pass))), and everything that is left in the last pass
    (``generate_mask_diffusion``, number to commit).

    Returns:
        int64 [R], 0 for a row without masked positions.

    """
    num_masked_R = masked_RS.sum(dim=1)
    num_sure_R = (masked_RS & (confidence_RS > threshold_R[:, None])).sum(dim=1)
    passes_left_R = (max_steps_R - pass_index_R).clamp(min=1)
    num_due_R = (num_masked_R + passes_left_R - 1) // passes_left_R
    wanted_R = torch.maximum(num_sure_R, num_due_R).clamp(min=1)
    return torch.minimum(wanted_R, num_masked_R)


def select_surest(confidence_RS: torch.Tensor, masked_RS: torch.Tensor, num_to_reveal_R: torch.Tensor) -> torch.Tensor:
    """The ``num_to_reveal_R`` most confident masked positions of each row, bool [R, S]; ties to the lowest position."""
    ranked_RS = torch.where(masked_RS, confidence_RS, float("-inf"))
    # a confidence can underflow to 0 but never reach -inf, so masked positions always rank first; stable: lowest
    # position first
    order_RS = ranked_RS.sort(dim=1, descending=True, stable=True).indices
    rank_RS = torch.empty_like(order_RS)
    rank_RS.scatter_(1, order_RS, torch.arange(rank_RS.shape[1], device=rank_RS.device).expand_as(order_RS))
    return masked_RS & (rank_RS < num_to_reveal_R[:, None])


def reveal(
    before: MaskedCanvases, proposal_RS: torch.Tensor, confidence_RS: torch.Tensor, rules: CanvasRules
) -> MaskedCanvases:
    """See ``vllm_twotower.ops.reveal``."""
    masked_RS, pass_index_R = before.masked_RS, before.pass_index_R
    k_R = num_to_reveal(confidence_RS, masked_RS, rules.threshold_R, pass_index_R, rules.max_steps_R)
    revealed_RS = select_surest(confidence_RS, masked_RS, k_R)
    still_masked_RS = masked_RS & ~revealed_RS
    return MaskedCanvases(
        token_RS=torch.where(revealed_RS, proposal_RS, before.token_RS),
        masked_RS=still_masked_RS,
        level_R=level_index(still_masked_RS.sum(dim=1), rules.width_R),
        pass_index_R=pass_index_R + masked_RS.any(dim=1),
    )
