"""Proposal, confidence and log-sum-exp of each row of logits, plainly.

Legend: N rows (masked canvas positions), V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.ops.checks import FLOATS, INDEX, check_argument

ShapeScores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tempered scores [N, V], indices of their rows [N]) -> the scores with top-k, top-p and min-p applied."""

NOISE_TILE = 64
"""Most rows whose noise is drawn at once where no kernel does it: 0.7 GiB of temporaries at a vocabulary of 131,072."""


@dataclass(frozen=True)
class Draw:
    """How each row's token is drawn: the Gumbel maximum over logits / temperature, noise keyed by the other three (see
    ``decoding.noise``)."""

    temperature_N: torch.Tensor
    """float32 [N]; a row of temperature 0 is greedy."""
    seed_N: torch.Tensor
    """int64 [N], the request's seed."""
    position_N: torch.Tensor
    """int64 [N], the token's absolute position, in [0, 2**32)."""
    pass_index_N: torch.Tensor
    """int64 [N], the denoise pass within the canvas, in [0, 2**32)."""

    def only(self, keep: torch.Tensor) -> "Draw":
        """Some of the rows: a bool mask or int64 indices."""
        return Draw(*(getattr(self, f.name)[keep] for f in fields(self)))


@dataclass(frozen=True)
class Sample:
    """What a row of logits says."""

    token_N: torch.Tensor
    """int64 [N], the proposal; 0 for a row without a finite logit."""
    confidence_N: torch.Tensor
    """float32 [N], untempered probability of the proposal without the mask id; NaN for a row without a finite logit."""


def check_logits(logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None) -> None:
    """Refuse logits, a mask id or a draw that do not fit together: a ``ValueError`` that names it."""
    check_argument("logits_NV", logits_NV, ("N", "V"), FLOATS)
    num_rows, vocab_size = logits_NV.shape
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id={mask_token_id}: must be in [0, {vocab_size}), the columns of logits_NV")
    if draw is not None:
        check_argument("draw.temperature_N", draw.temperature_N, (num_rows,), (torch.float32,), logits_NV.device)
        for name in ("seed_N", "position_N", "pass_index_N"):
            check_argument(f"draw.{name}", getattr(draw, name), (num_rows,), INDEX, logits_NV.device)


def canvas_sample(
    logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None, shape_scores: ShapeScores | None = None
) -> Sample:
    """See ``vllm_twotower.ops.canvas_sample``."""
    logits_NV = logits_NV.float()
    logits_NV[:, mask_token_id] = float("-inf")
    token_N = logits_NV.argmax(dim=-1)
    if draw is not None:
        # only rows with a temperature draw noise
        for rows in draw.temperature_N.nonzero().squeeze(1).split(NOISE_TILE):
            part = draw.only(rows)
            noise_NV = gumbel_noise(part.seed_N, part.position_N, part.pass_index_N, logits_NV.shape[1])
            score_NV = logits_NV[rows] / part.temperature_N[:, None]
            if shape_scores is not None and len(rows):
                score_NV = shape_scores(score_NV, rows)
            token_N[rows] = (score_NV + noise_NV).argmax(dim=-1)
    log_total_N = logits_NV.logsumexp(dim=-1)
    confidence_N = (logits_NV.gather(1, token_N[:, None]).squeeze(1) - log_total_N).exp()
    return Sample(token_N, confidence_N)
