"""One denoise step of a worker: one or more denoise passes over the step's canvases, and the reveals between them.

The passes run inside the model's ``forward``, because that is where vLLM's forward context (attention metadata, slot
mappings) is set; the sampler afterwards only reports what ``run`` left in ``outcome``.

Legend: R rows (requests), S widest canvas, T tokens in batch order, N masked positions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.decoding.noise_level import level_index
from vllm_twotower.decoding.unmask import num_to_reveal, propose, reveal
from vllm_twotower.models.denoiser_tower import LOGITS_TILE, CanvasLayout, DenoiserTower
from vllm_twotower.runtime.canvas_table import CanvasRows


@dataclass(frozen=True)
class DenoiseOutcome:
    """What a denoise step did."""

    token_RS: torch.Tensor
    """int64 [R, S], the canvases after the step."""
    pass_index_R: torch.Tensor
    """int64 [R], passes run over each canvas so far."""
    finished: list[bool]
    """Per row: nothing is masked any more."""
    num_passes: list[int]
    """Per row: passes run in this step while the canvas was unfinished."""
    num_forwards: int
    """Forwards of the denoiser tower."""


class DenoiseStep:
    """The passes of one engine step.

    Args:
        rows: the step's canvases and settings.
        layout: how the canvases lie in the batch.
        widths: canvas width of each row.
        first_position_R: int64 [R], absolute position of each canvas's first token.
        passes: passes at most.
        mask_token_id: the mask.
        observe: called before each pass with (rows with masked positions, their canvases), for ``trace``; None to skip.

    """

    def __init__(
        self,
        rows: CanvasRows,
        layout: CanvasLayout,
        widths: list[int],
        first_position_R: torch.Tensor,
        passes: int,
        mask_token_id: int,
        observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self.rows = rows
        self.layout = layout
        self.width_R = torch.tensor(widths, device=rows.token_RS.device)
        self.first_position_R = first_position_R
        self.passes = passes
        self.mask_token_id = mask_token_id
        self.observe = observe
        self.outcome: DenoiseOutcome | None = None

    def run(self, denoiser: DenoiserTower, context_layers: nn.ModuleList) -> None:
        """Run the passes and leave the result in ``outcome``."""
        token_RS, pass_index_R = self.rows.token_RS, self.rows.pass_index_R
        started_at_R, num_forwards = pass_index_R, 0
        for _ in range(self.passes):
            masked_RS = token_RS == self.mask_token_id
            unfinished_R = masked_RS.any(dim=1)
            if not unfinished_R.any():
                break
            if self.observe is not None:
                self.observe(unfinished_R, token_RS)
            level_R = level_index(masked_RS.sum(dim=1), self.width_R)
            token_T = token_RS[self.layout.row_T, self.layout.column_T]
            hidden_TD = denoiser(token_T, level_R, self.layout, context_layers)
            proposal_RS, confidence_RS = self._propose(denoiser, hidden_TD, masked_RS, pass_index_R)
            k_R = num_to_reveal(confidence_RS, masked_RS, self.rows.threshold_R, pass_index_R, self.rows.max_steps_R)
            token_RS = reveal(token_RS, proposal_RS, confidence_RS, masked_RS, k_R)
            pass_index_R = pass_index_R + unfinished_R
            num_forwards += 1
        still_masked_R = (token_RS == self.mask_token_id).any(dim=1)
        self.outcome = DenoiseOutcome(
            token_RS,
            pass_index_R,
            (~still_masked_R).tolist(),
            (pass_index_R - started_at_R).tolist(),
            num_forwards,
        )

    def _propose(
        self, denoiser: DenoiserTower, hidden_TD: torch.Tensor, masked_RS: torch.Tensor, pass_index_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Proposal and confidence for every masked position, in tiles of logits; elsewhere 0."""
        proposal_RS = torch.zeros_like(masked_RS, dtype=torch.int64)
        confidence_RS = torch.zeros_like(masked_RS, dtype=torch.float32)
        masked_T = masked_RS[self.layout.row_T, self.layout.column_T].nonzero().squeeze(1)
        for token_N in masked_T.split(LOGITS_TILE):
            row_N, column_N = self.layout.row_T[token_N], self.layout.column_T[token_N]
            logits_NV = denoiser.logits(hidden_TD[token_N])
            noise_NV = None
            if self.rows.any_random:
                position_N = self.first_position_R[row_N] + column_N
                noise_NV = gumbel_noise(self.rows.seed_R[row_N], position_N, pass_index_R[row_N], logits_NV.shape[1])
            token, confidence = propose(logits_NV, self.mask_token_id, self.rows.temperature_R[row_N], noise_NV)
            proposal_RS[row_N, column_N] = token
            confidence_RS[row_N, column_N] = confidence
        return proposal_RS, confidence_RS
