"""The plain towers with parts of the published system switched off, to measure what each is worth.

Only here: the product has none of these switches. One pass per canvas and other canvas lengths need no switch, they are
settings of ``reference.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_twotower.oracle.plain_towers import (
    AttentionCache,
    ContextCache,
    PlainTwoTower,
    TowerShape,
    empty_mamba_cache,
)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is switched off; nothing by default."""

    frozen_level: float | None = None
    """The noise level t that every pass is told, whatever is masked."""
    mamba_seed: bool = True
    """Start the canvas's Mamba layers from the context's states, not from zeros."""
    bidirectional: bool = True
    """Let a canvas position attend to those after it."""


class AblatedTwoTower(PlainTwoTower):
    """Plain towers whose denoise passes lack something."""

    def __init__(self, weights: Mapping[str, torch.Tensor], shape: TowerShape, ablation: Ablation) -> None:
        super().__init__(weights, shape)
        self.ablation = ablation

    def denoise(self, canvas_BS: torch.Tensor, level_B: torch.Tensor, cache: ContextCache) -> torch.Tensor:
        """As ``PlainTwoTower.denoise``, without what is switched off."""
        if self.ablation.frozen_level is not None:
            level_B = torch.full_like(level_B, self.ablation.frozen_level)
        if not self.ablation.mamba_seed:
            like = next(iter(cache.mamba.values())).conv_BKC
            empty = empty_mamba_cache(self.shape, like)
            cache = ContextCache(cache.attention, dict.fromkeys(cache.mamba, empty))
        return super().denoise(canvas_BS, level_B, cache)

    def _attention(
        self, name: str, x_BLD: torch.Tensor, cache: AttentionCache | None, causal: bool
    ) -> tuple[torch.Tensor, AttentionCache]:
        return super()._attention(name, x_BLD, cache, causal or not self.ablation.bidirectional)
