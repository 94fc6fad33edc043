"""One denoise pass's decisions, for a batch of canvases: propose a token per masked position, then reveal the surest
ones.

Legend: R rows (requests), S canvas positions, N masked positions of all rows, V vocabulary.

The laws, each pinned in ``tests/test_unmask_laws.py``: a revealed token never changes; a row with masked positions
reveals at least one and never more than the rule's number; ties go to the lowest position; rows do not see each other.
"""

from collections.abc import Callable

import torch


def propose(
    logits_NV: torch.Tensor,
    mask_token_id: int,
    temperature_N: torch.Tensor,
    noise_NV: torch.Tensor | None,
    shape_scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for each masked position and say how sure the denoiser is of it.

    Args:
        logits_NV: float32 [N, V], processed; written: the mask id's column is set to -inf (it is never proposed).
        mask_token_id: excluded from the softmax.
        temperature_N: float32 [N], 0 for greedy.
        noise_NV: float32 [N, V] standard Gumbel noise, or None where every row is greedy.
        shape_scores: tempered scores [N, V] -> the same with top-k, top-p and min-p applied, or None.

    Returns:
        Tokens, int64 [N], and confidences, float32 [N]: the untempered probability of each proposed token
        (``generate_mask_diffusion``, Gumbel-max over log-softmax(logits / temperature)).

    """
    logits_NV[:, mask_token_id] = float("-inf")
    if noise_NV is None:
        token_N = logits_NV.argmax(dim=-1)
    else:
        greedy_N1 = (temperature_N == 0)[:, None]
        scale_N1 = torch.where(greedy_N1, 1.0, temperature_N[:, None])
        score_NV = logits_NV / scale_N1
        if shape_scores is not None:
            score_NV = shape_scores(score_NV)
        token_N = (score_NV + torch.where(greedy_N1, 0.0, noise_NV)).argmax(dim=-1)
    log_total_N = logits_NV.logsumexp(dim=-1)
    confidence_N = (logits_NV.gather(1, token_N[:, None]).squeeze(1) - log_total_N).exp()
    return token_N, confidence_N


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
