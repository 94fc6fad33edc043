"""What each phase minimises."""

import torch
import torch.nn.functional as F

from tools.demo_training.batches import Batch
from tools.demo_training.corruptions import masked_canvases, masked_logits, met_canvases
from tools.demo_training.towers import TrainingTowers

Chosen = dict[int, torch.Tensor]


def next_token(towers: TrainingTowers, batch: Batch) -> tuple[torch.Tensor, Chosen]:
    """Mean cross-entropy of the scored tokens: answers, and all of prose and code."""
    hidden, states = towers.context(batch.tokens_BL, batch.valid_BL)
    scored = batch.scored_BL[:, 1:]
    logits = towers.context_logits(hidden[:, :-1][scored])
    return F.cross_entropy(logits, batch.tokens_BL[:, 1:][scored]), states.chosen


def masked_tokens(towers: TrainingTowers, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, Chosen]:
    """Mean over rows of the mean cross-entropy over a row's masked positions, of two corruptions of each row.

    One is drawn, at one level t per row: the paper's expectation over t and noise, for half of the batches
    with everything behind a cut masked. The other is met: what the denoiser itself leaves masked. Drawn ones alone
    mostly give a step of an answer away by what comes after it, and are seldom masked whole, as denoising starts.
    """
    with torch.no_grad():
        _, states = towers.context(batch.tokens_BL, batch.valid_BL)
    num_rows = len(batch.tokens_BL)
    level = torch.rand(num_rows, generator=generator)
    behind_a_cut = bool(torch.rand((), generator=generator) < 0.5)
    drawn = masked_canvases(batch, level, generator, behind_a_cut=behind_a_cut)
    met = met_canvases(towers, batch, states, generator)
    sample = torch.cat([drawn.row_A, met.row_A + num_rows])
    both = drawn.joined(met)
    logits, chosen = masked_logits(towers, both, batch, states)
    num_masked = torch.zeros(2 * num_rows).index_add(0, sample, both.masked_AS.sum(1).float())
    weight = 1 / num_masked[sample][:, None].expand(both.masked_AS.shape)[both.masked_AS]
    losses = F.cross_entropy(logits, both.clean_AS[both.masked_AS], reduction="none")
    return (losses * weight).sum() / (num_masked > 0).sum(), chosen
