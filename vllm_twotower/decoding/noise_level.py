"""The noise level t of a canvas and the finite set of values it can take.

t is the masked fraction of the request's **own** canvas. (The reference takes the mean over the batch, a defect it
shares with no training code; at batch 1 they agree.) A canvas of width W has exactly W + 1 levels, so whatever depends
on t can be tabulated.
"""

import torch


def noise_level(num_masked: int, width: int) -> float:
    """Masked fraction of a canvas, in [0, 1]."""
    return num_masked / width


def level_index(num_masked_R: torch.Tensor, width_R: torch.Tensor) -> torch.Tensor:
    """Row of ``all_noise_levels`` that holds each canvas's t.

    Levels are laid out width by width: the W + 1 levels of width W start at W * (W + 1) / 2 - 1.

    Args:
        num_masked_R: int64 [R], masked positions of each canvas.
        width_R: int64 [R], canvas width, at least 1.

    Returns:
        int64 [R].

    """
    return width_R * (width_R + 1) // 2 - 1 + num_masked_R


def all_noise_levels(max_width: int) -> torch.Tensor:
    """Every t that a canvas of width 1 to ``max_width`` can have, float32 [W_max * (W_max + 3) / 2], see
    ``level_index``."""
    return torch.cat([torch.arange(width + 1, dtype=torch.float32) / width for width in range(1, max_width + 1)])
