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
    """Mean over rows of the mean cross-entropy over a row's masked positions, one level t per row and corruption.

    The paper's expectation over t and noise (spec 8.1): a row with few masks counts as much as one with many. Levels
    come in pairs t, 1 - t: each is uniform, and half of all positions are masked in every batch. Of each pair one
    masks independently, as published, the other everything behind a cut: what denoising meets where one step follows
    from the one before, and where independent masks mostly give the later step away.
    """
    with torch.no_grad():
        _, states = towers.context(batch.tokens_BL, batch.valid_BL)
    num_rows = len(batch.tokens_BL)
    level = torch.rand(num_rows, generator=generator)
    drawn = [masked_canvases(batch, abs(i % 2 - level), generator, behind_a_cut=i % 2 == 1) for i in range(num_noises)]
    sample = torch.cat([row + i * num_rows for i, (*_, row, _) in enumerate(drawn)])
    clean, masked, level_A, row, canvas = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    logits, chosen = towers.denoiser(
        corrupt(clean, masked), level_A.clamp(min=1e-3), row, canvas, batch.valid_BL, states, masked
    )
    num_masked = torch.zeros(num_noises * num_rows).index_add(0, sample, masked.sum(1).float())
    weight = 1 / num_masked[sample][:, None].expand(masked.shape)[masked]
    losses = F.cross_entropy(logits, clean[masked], reduction="none")
    return (losses * weight).sum() / (num_masked > 0).sum(), chosen
