"""From logits to proposals: the request's sampling parameters, a token and its confidence.

vLLM's own logits processors and sampling states do the work, so the parameters mean what they mean everywhere else.
They were written for drafts: a request's rows lie next to each other, row j of a request sees its left context through
``input_ids`` shifted by one, and ``pos`` is the position before the one that is predicted. A canvas is presented so.

Legend: N rows of logits, V vocabulary, R requests, S canvas positions, T tokens in batch order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

from vllm_twotower.ops import Sample, ShapeScores, canvas_sample
from vllm_twotower.runtime.logprobs import LogprobTable
from vllm_twotower.runtime.step import Tile


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What a tile of logits proposes."""

    tile: Tile
    """The rows that were wanted."""
    sample: Sample
    """Their tokens and confidences."""
    logits_NV: torch.Tensor
    """[N, V], processed, any float dtype; the mask id's column may be -inf or not."""


class ProposalSampler:
    """Applies sampling parameters to the denoiser's logits, through vLLM's sampler.

    Args:
        base: vLLM's, of this worker.
        mask_token_id: never proposed.

    """

    def __init__(self, base: vllm_sampler.Sampler, mask_token_id: int) -> None:
        self.base = base
        self.mask_token_id = mask_token_id
        self.logprobs = LogprobTable(base)
        self._has_custom_processors = any(not _is_built_in(p) for p in base.logits_processors)
        self._processed_slots: set[int] = set()

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Remember whether a request's logits are processed; they are then computed for its whole canvas."""
        self._processed_slots.discard(slot)
        if self._has_custom_processors or changes_logits(params):
            self._processed_slots.add(slot)
        self.logprobs.clear_slot(slot)

    def is_processed(self, slot: int) -> bool:
        """Whether anything but temperature, top-k, top-p and min-p changes the request's logits."""
        return slot in self._processed_slots

    def follows_reveals(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests' proposals must be made for what is still masked, and for nothing else."""
        return not self._processed_slots.isdisjoint(slots_np.tolist()) or self.logprobs.is_wanted(slots_np)

    def propose(self, logits_NV: torch.Tensor, tile: Tile, wanted_N: torch.Tensor | None) -> Proposals:
        """A token and its confidence for every wanted row.

        Args:
            logits_NV: [N, V], the model's dtype, may be written.
            tile: what the rows are.
            wanted_N: bool [N] where the tile is whole canvases whose logits are processed; None where all are wanted.

        """
        if wanted_N is not None or self.logprobs.is_wanted(tile.rows.slots_np):
            logits_NV = logits_NV.float()  # vLLM's kernels add to logits and score them in fp32
        raw_NV = logits_NV
        if wanted_N is not None:
            if self.logprobs.wants_raw(tile.rows.slots_np):
                raw_NV = logits_NV.clone()
            processed_NV = self._process(logits_NV, tile)
            tile, logits_NV, raw_NV = tile.only(wanted_N), processed_NV[wanted_N], raw_NV[wanted_N]
        draw = tile.draw() if tile.rows.any_random else None
        sample = canvas_sample(logits_NV, self.mask_token_id, draw, None if draw is None else self._shaping(tile))
        if tile.rows.any_drawn_as_ar:
            sample = self._draw_drafts(logits_NV, tile, sample)
        if self.logprobs.is_wanted(tile.rows.slots_np):
            logits_NV[:, self.mask_token_id] = float("-inf")
            raw_NV[:, self.mask_token_id] = float("-inf")
            self.logprobs.record(logits_NV if self.logprobs.of_processed else raw_NV, tile, sample.token_N)
        return Proposals(tile=tile, sample=sample, logits_NV=logits_NV)

    def _process(self, logits_NV: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Bias, allowed ids, minimum length, penalties, bad words, and processors of the user's own."""
        context = LogitsContext(
            expanded_idx_mapping=tile.slot_N,
            idx_mapping=tile.rows.slot_R.to(torch.int64),
            idx_mapping_np=tile.rows.slots_np,
            expanded_local_pos=tile.column_N.to(torch.int32),
            # the row of canvas position j finds the token of position k < j in row k + 1 of its request
            input_ids=tile.canvas_token_N.roll(1).to(torch.int32),
            pos=tile.position_N - 1,
            seq_lens_upper_bound_np=tile.rows.seq_lens_np,
        )
        for processor in self.base.logits_processors:
            logits_NV = processor.apply(logits_NV, context)
        return logits_NV

    def _draw_drafts(self, logits_NV: torch.Tensor, tile: Tile, sample: Sample) -> Sample:
        """Drafts chosen as vLLM's sampler will choose at their positions, with the same noise: they are then right more
        often."""
        states = self.base.sampling_states
        score_NV = logits_NV.to(torch.float32, copy=True)
        score_NV[:, self.mask_token_id] = float("-inf")
        states.apply_temperature(score_NV, tile.slot_N, tile.rows.slots_np)
        if (shape := self._shaping(tile)) is not None:
            score_NV = shape(score_NV, torch.arange(len(score_NV), device=score_NV.device))
        drawn_N = vllm_sampler.gumbel_sample(
            score_NV,
            tile.slot_N,
            states.temperature.gpu,
            states.seeds.gpu,
            tile.position_N - 1,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.base.use_fp64_gumbel,
        )
        token_N = torch.where(tile.is_draft_N, drawn_N, sample.token_N)
        logit_of = logits_NV.gather(1, torch.stack([token_N, sample.token_N], dim=1)).float()
        return Sample(token_N, sample.confidence_N * (logit_of[:, 0] - logit_of[:, 1]).exp())

    def _shaping(self, tile: Tile) -> ShapeScores | None:
        """Top-k, top-p and min-p of a tile's requests; None where none has any."""
        states, slots = self.base.sampling_states, tile.rows.slots_np
        unshaped = (states.min_p.np[slots] == 0) & (states.top_p.np[slots] == 1)
        if np.all(unshaped & (states.top_k.np[slots] == states.vocab_size)):
            return None

        def shape(score_NV: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            slot_N = tile.slot_N[rows]
            states.apply_min_p(score_NV, slot_N, slots)
            return states.apply_top_k_top_p(score_NV, slot_N, slots)

        return shape


def _is_built_in(processor: Any) -> bool:
    """vLLM's own bias, penalties and bad words."""
    return isinstance(processor, LogitBiasState | PenaltiesState | BadWordsState)


def changes_logits(params: SamplingParams) -> bool:
    """Whether a request's parameters change processed logits."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens > 0
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
    )
