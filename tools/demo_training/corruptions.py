"""Which positions of a batch's answer canvases are masked: drawn, or as denoising leaves them.

Legend: as in ``towers.py``; N masked positions of all canvases.
"""

from dataclasses import dataclass, replace
from functools import reduce

import torch

from tools.demo_training.batches import Batch
from tools.demo_training.config import CANVAS
from tools.demo_training.towers import ContextStates, TrainingTowers
from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.ops.canvas_sample.reference import canvas_sample
from vllm_twotower.ops.reveal.reference import num_to_reveal, select_surest

MAX_PASSES = 4
THRESHOLDS = (0.8, 0.95)
"""Where serving stands; each canvas reveals at one of them, drawn anew for every pass."""


@dataclass(frozen=True)
class Canvases:
    """Canvases of a batch, and what of them is masked."""

    clean_AS: torch.Tensor
    masked_AS: torch.Tensor
    level_A: torch.Tensor
    """What the denoiser is told of the share that is masked."""
    row_A: torch.Tensor
    canvas_A: torch.Tensor
    """Index in its row."""

    def joined(self, other: "Canvases") -> "Canvases":
        """These, then those."""
        return Canvases(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def only(self, these_A: torch.Tensor) -> "Canvases":
        """Those where ``these_A`` is true."""
        return Canvases(*(tensor[these_A] for tensor in vars(self).values()))


def corrupt(clean: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Clean tokens with the mask id where masked."""
    return torch.where(masked, MASK_TOKEN_ID, clean)


def masked_canvases(
    batch: Batch, levels_B: torch.Tensor, generator: torch.Generator, behind_a_cut: bool = False
) -> Canvases:
    """Every answer canvas of a batch, corrupted at its row's level: each position for itself, or the canvas's end."""
    num = batch.tokens_BL.shape[1] // CANVAS
    index = torch.arange(num)
    row, canvas = ((index >= batch.first_canvas_B[:, None]) & (index < batch.end_canvas_B[:, None])).nonzero(
        as_tuple=True
    )
    clean = batch.tokens_BL.unflatten(1, (num, CANVAS))[row, canvas]
    level = levels_B[row]
    draw = torch.rand(clean.shape, generator=generator)
    masked = draw.sort(dim=1, descending=True).values < level[:, None] if behind_a_cut else draw < level[:, None]
    return Canvases(clean, masked, level, row, canvas)


@torch.no_grad()
def met_canvases(towers: TrainingTowers, batch: Batch, states: ContextStates, generator: torch.Generator) -> Canvases:
    """Every answer canvas of a batch after 0 to 3 passes of the denoiser, those finished before left out.

    What a pass reveals is the right token, even where the denoiser would have written another: so there is still one
    right answer to go on to.
    """
    canvases = masked_canvases(batch, torch.ones(len(batch.tokens_BL)), generator)
    passes_A = torch.randint(MAX_PASSES, canvases.row_A.shape, generator=generator)
    reached = [canvases.only(passes_A == 0)]
    for number in range(1, MAX_PASSES):
        canvases, passes_A = canvases.only(passes_A >= number), passes_A[passes_A >= number]
        if not len(passes_A):
            break
        logits, _ = masked_logits(towers, canvases, batch, states)
        masked = canvases.masked_AS & ~revealed(canvases.masked_AS, logits, number - 1, generator)
        canvases = replace(canvases, masked_AS=masked, level_A=masked.float().mean(1))
        left = masked.any(1)
        canvases, passes_A = canvases.only(left), passes_A[left]
        reached.append(canvases.only(passes_A == number))
    return reduce(Canvases.joined, reached)


def masked_logits(
    towers: TrainingTowers, canvases: Canvases, batch: Batch, states: ContextStates
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The denoiser's logits [N, V] at masked positions, and experts chosen per layer."""
    return towers.denoiser(
        corrupt(canvases.clean_AS, canvases.masked_AS),
        canvases.level_A.clamp(min=1e-3),
        canvases.row_A,
        canvases.canvas_A,
        batch.valid_BL,
        states,
        canvases.masked_AS,
    )


def revealed(
    masked_AS: torch.Tensor, logits_NV: torch.Tensor, pass_index: int, generator: torch.Generator
) -> torch.Tensor:
    """[A, S]: what decoding would reveal now; writes into ``logits_NV``."""
    num_canvases = len(masked_AS)
    confidence_N = canvas_sample(logits_NV, MASK_TOKEN_ID).confidence_N
    confidence_AS = torch.zeros(masked_AS.shape).masked_scatter(masked_AS, confidence_N)
    threshold_A = torch.tensor(THRESHOLDS)[torch.randint(len(THRESHOLDS), (num_canvases,), generator=generator)]
    passes_A, max_steps_A = torch.full((num_canvases,), pass_index), torch.full((num_canvases,), CANVAS)
    num_A = num_to_reveal(confidence_AS, masked_AS, threshold_A, passes_A, max_steps_A)
    return select_surest(confidence_AS, masked_AS, num_A)
