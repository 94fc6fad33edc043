"""Modulation, norm and gate of a denoiser layer, plainly and with every rounding of NVIDIA's code.

A canvas has finitely many noise levels, so what all layers share is a table with a row per level; a layer adds its own
table of three vectors. Both are looked up per token and nothing per token is computed beforehand.

Legend: T tokens, R rows (requests), D hidden, L noise levels; 3: shift, scale, gate.
"""

from dataclasses import dataclass

import torch

from vllm_twotower.ops.checks import FLOATS, INDEX, check_argument

UNMODULATED = -1
"""The level of a row without time conditioning: shift 0, scale 0, gate 1."""

SHIFT, SCALE, GATE = range(3)


@dataclass(frozen=True)
class Modulation:
    """A layer's modulation of every token of a batch; vectors have the model's dtype."""

    vector_L3D: torch.Tensor
    """What all layers share, by noise level."""
    table_3D: torch.Tensor
    """The layer's own."""
    level_R: torch.Tensor
    """int64 [R], each row's noise level, or ``UNMODULATED``."""
    row_T: torch.Tensor
    """int64 [T], each token's row."""

    def of_tokens(self, part: int) -> torch.Tensor:
        """Every token's shift, scale or gate, [T, D]."""
        part_RD = self.vector_L3D[self.level_R, part] + self.table_3D[part]
        neutral = 1.0 if part == GATE else 0.0
        return torch.where((self.level_R == UNMODULATED)[:, None], neutral, part_RD)[self.row_T]


def check_modulation(x_TD: torch.Tensor, modulation: Modulation) -> None:
    """Refuse a modulation that does not fit the tokens: a ``ValueError`` that names it."""
    check_argument("x_TD", x_TD, ("T", "D"), FLOATS)
    num_tokens, hidden = x_TD.shape
    dtype = (x_TD.dtype,)
    check_argument("modulation.vector_L3D", modulation.vector_L3D, ("L", 3, hidden), dtype, x_TD.device)
    check_argument("modulation.table_3D", modulation.table_3D, (3, hidden), dtype, x_TD.device)
    check_argument("modulation.level_R", modulation.level_R, ("R",), INDEX, x_TD.device)
    check_argument("modulation.row_T", modulation.row_T, (num_tokens,), INDEX, x_TD.device)


def check_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> None:
    """Refuse what is no weight or epsilon of a norm over x: a ``ValueError`` that names it."""
    check_argument("weight_D", weight_D, (x_TD.shape[1],), FLOATS, x_TD.device)
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be 0 or more")


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, fp32 inside and rounded once (``NemotronHRMSNorm``)."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (weight_D.float() * x).to(x_TD.dtype)


def modulate(x_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """x (1 + scale) + shift, each step rounded to the model's dtype."""
    return x_TD * (1 + modulation.of_tokens(SCALE)) + modulation.of_tokens(SHIFT)


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.modulate_norm``."""
    return rms_norm(modulate(x_TD, modulation), weight_D, eps)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.norm_modulate``."""
    return modulate(rms_norm(x_TD, weight_D, eps), modulation)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.gate_add``."""
    return residual_TD + modulation.of_tokens(GATE) * x_TD
