"""Time conditioning of the denoiser: from the noise level t to each layer's shift, scale and gate (adaLN-single).

A canvas of at most S tokens has finitely many noise levels, so everything before the layers' own tables is computed
once per level and looked up ever after.
"""

import math
from typing import Any

import torch
from torch import nn

from vllm_twotower.core import TIMESTEP_FEATURES, TIMESTEP_MAX_PERIOD, TIMESTEP_SCALE
from vllm_twotower.decoding.noise_level import all_noise_levels
from vllm_twotower.ops import Modulation


def timestep_features(level_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sinusoidal features of t, cosines then sines (reference: ``TimestepEmbedder.timestep_embedding``).

    Args:
        level_N: float32 [N], noise levels in [0, 1].
        dtype: the model's; t * 1000 is rounded to it, as the reference does.

    Returns:
        ``dtype`` [N, 256].

    """
    half = TIMESTEP_FEATURES // 2
    index = torch.arange(half, dtype=torch.float32, device=level_N.device)
    frequency = torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * index / half)
    angle = (level_N.to(dtype) * TIMESTEP_SCALE).float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class TimeConditioning(nn.Module):
    """``t_embedder``, ``t_block`` and the layers' ``scale_shift_tables``; replicated on every rank, never quantised."""

    def __init__(self, config: Any, max_canvas_length: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.max_canvas_length = max_canvas_length
        mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.scale_shift_tables = nn.ParameterList(
            nn.Parameter(torch.empty(3, hidden), requires_grad=False) for _ in config.hybrid_override_pattern
        )
        self._vector_by_level: torch.Tensor | None = None

    def modulation(self, layer: int, level_R: torch.Tensor, row_T: torch.Tensor) -> Modulation:
        """A layer's modulation of a batch's tokens.

        Args:
            layer: index.
            level_R: int64 [R], by ``decoding.noise_level.level_index``, or ``ops.UNMODULATED``.
            row_T: int64 [T], each token's row.

        """
        if self._vector_by_level is None:
            self._vector_by_level = self._tabulate(level_R.device)
        return Modulation(self._vector_by_level, self.scale_shift_tables[layer], level_R, row_T)

    def refresh(self) -> None:
        """Compute the table again, where it is: CUDA graphs have its address. To be called whenever weights change."""
        if self._vector_by_level is not None:
            self._vector_by_level.copy_(self._tabulate(self._vector_by_level.device))

    # made in vLLM's profile run, under inference mode, and written again outside of it
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _tabulate(self, device: torch.device) -> torch.Tensor:
        dtype = self.scale_shift_tables[0].dtype
        features = timestep_features(all_noise_levels(self.max_canvas_length).to(device), dtype)
        vectors = self.t_block(self.t_embedder["mlp"](features))
        return vectors.view(vectors.shape[0], 3, -1)
