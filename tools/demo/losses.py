"""What each phase minimises."""

import torch
import torch.nn.functional as F

from demo.batches import Batch
from demo.towers import TrainingTowers, corrupt, masked_canvases

Chosen = dict[int, torch.Tensor]


def next_token(towers: TrainingTowers, batch: Batch) -> tuple[torch.Tensor, Chosen]:
    """Mean cross-entropy of the scored tokens: answers, and all of prose and code."""
    hidden, states = towers.context(batch.tokens_BL, batch.valid_BL)
    scored = batch.scored_BL[:, 1:]
    logits = towers.context_logits(hidden[:, :-1][scored])
    return F.cross_entropy(logits, batch.tokens_BL[:, 1:][scored]), states.chosen


def masked_tokens(
    towers: TrainingTowers, batch: Batch, num_noises: int, generator: torch.Generator
) -> tuple[torch.Tensor, Chosen]:
    """Mean cross-entropy over masked positions, one level t per row and corruption (spec 8.1, 8.2).

    Levels come in pairs t, 1 - t: each is uniform, and half of all positions are masked in every batch.
    """
    with torch.no_grad():
        _, states = towers.context(batch.tokens_BL, batch.valid_BL)
    level = torch.rand(len(batch.tokens_BL), generator=generator)
    drawn = [masked_canvases(batch, level if i % 2 == 0 else 1 - level, generator) for i in range(num_noises)]
    clean, masked, level_A, row, canvas = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    logits, chosen = towers.denoiser(
        corrupt(clean, masked), level_A.clamp(min=1e-3), row, canvas, batch.valid_BL, states, masked
    )
    return F.cross_entropy(logits, clean[masked]), chosen
