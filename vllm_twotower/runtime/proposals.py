"""From logits to proposals: the request's sampling parameters, a token and its confidence.

vLLM's own logits processors and sampling states do the work, so the parameters mean what they mean everywhere else.
They were written for drafts: a request's rows lie next to each other, row j of a request sees its left context through
``input_ids`` shifted by one, and ``pos`` is the position before the one that is predicted. A canvas is presented so.

Legend: N rows of logits, V vocabulary, R requests, S canvas positions, T tokens in batch order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.decoding.unmask import propose
from vllm_twotower.ops import canvas_sample
from vllm_twotower.ops.canvas_sample.reference import NOISE_TILE
from vllm_twotower.runtime.logprobs import LogprobTable
from vllm_twotower.runtime.step import Tile

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What a tile of logits proposes."""

    tile: Tile
    """The rows that were wanted."""
    token_N: torch.Tensor
    """int64 [N]."""
    confidence_N: torch.Tensor
    """float32 [N], see ``decoding.unmask.propose``."""
    logits_NV: torch.Tensor
    """[N, V], processed, any float dtype; the mask id's column may be -inf or not."""


class ProposalSampler:
    """Applies sampling parameters to the denoiser's logits, through vLLM's sampler.

    Args:
        base: vLLM's ``Sampler`` of this worker.
        mask_token_id: never proposed.

    """

    def __init__(self, base: Any, mask_token_id: int) -> None:
        self.base = base
        self.mask_token_id = mask_token_id
        self.logprobs = LogprobTable(base)
        self._has_custom_processors = any(not _is_built_in(p) for p in base.logits_processors)
        self._processed_slots: set[int] = set()

    def add_request(self, slot: int, params: "SamplingParams") -> None:
        """Remember whether a request's logits are processed; they are then computed for its whole canvas."""
        self._processed_slots.discard(slot)
        if self._has_custom_processors or changes_logits(params):
            self._processed_slots.add(slot)
        self.logprobs.add_request(slot)

    def is_processed(self, slot: int) -> bool:
        """Whether anything but temperature, top-k, top-p and min-p changes the request's logits."""
        return slot in self._processed_slots

    def follows_reveals(self, slots: list[int]) -> bool:
        """Whether any of these requests' proposals must be made for what is still masked, and for nothing else."""
        return any(map(self.is_processed, slots)) or self.logprobs.wanted(np.array(slots))

    def propose(self, logits_NV: torch.Tensor, tile: Tile, wanted_N: torch.Tensor | None) -> Proposals:
        """A token and its confidence for every wanted row.

        Args:
            logits_NV: [N, V], the model's dtype, may be written.
            tile: what the rows are.
            wanted_N: bool [N] where the tile is whole canvases whose logits are processed; None where all are wanted.

        """
        if wanted_N is not None or self.logprobs.wanted(tile.rows.slots_np):
            logits_NV = logits_NV.float()  # vLLM's kernels add to logits and score them in fp32
        raw_NV = logits_NV
        if wanted_N is not None:
            if self.logprobs.wants_raw(tile.rows.slots_np):
                raw_NV = logits_NV.clone()
            processed_NV = self._process(logits_NV, tile)
            tile, logits_NV, raw_NV = tile.only(wanted_N), processed_NV[wanted_N], raw_NV[wanted_N]
        token_N, confidence_N = self._propose(logits_NV, tile)
        if self.logprobs.wanted(tile.rows.slots_np):
            logits_NV[:, self.mask_token_id] = float("-inf")
            raw_NV[:, self.mask_token_id] = float("-inf")
            self.logprobs.record(logits_NV if self.logprobs.of_processed else raw_NV, tile, token_N)
        return Proposals(tile=tile, token_N=token_N, confidence_N=confidence_N, logits_NV=logits_NV)

    def _propose(self, logits_NV: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows at once, unless a draw is shaped by top-k, top-p or min-p; those rows in tiles of noise."""
        if not tile.rows.any_random or self._shaping(tile) is None:
            sample = canvas_sample(logits_NV, self.mask_token_id, tile.draw() if tile.rows.any_random else None)
            return sample.token_N, sample.confidence_N
        token_N = torch.empty(len(tile.token_N), dtype=torch.int64, device=logits_NV.device)
        confidence_N = torch.empty_like(token_N, dtype=torch.float32)
        random_N = tile.draw().temperature_N > 0
        greedy = (~random_N).nonzero().squeeze(1)
        if greedy.numel():
            sample = canvas_sample(logits_NV[greedy], self.mask_token_id)
            token_N[greedy], confidence_N[greedy] = sample.token_N, sample.confidence_N
        for rows in random_N.nonzero().squeeze(1).split(NOISE_TILE):
            if not rows.numel():  # all rows of this tile are greedy
                continue
            part = tile.only(rows)
            draw = part.draw()
            noise = gumbel_noise(draw.seed_N, draw.position_N, draw.pass_index_N, logits_NV.shape[1])
            token_N[rows], confidence_N[rows] = propose(
                logits_NV[rows].float(), self.mask_token_id, draw.temperature_N, noise, self._shaping(part)
            )
        return token_N, confidence_N

    def _process(self, logits_NV: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Bias, allowed ids, minimum length, penalties, bad words, and processors of the user's own."""
        context = LogitsContext(
            expanded_idx_mapping=tile.slot_N,
            idx_mapping=torch.from_numpy(tile.rows.slots_np).to(logits_NV.device),
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

    def _shaping(self, tile: Tile) -> Callable[[torch.Tensor], torch.Tensor] | None:
        states, slots = self.base.sampling_states, tile.rows.slots_np
        unshaped = (states.min_p.np[slots] == 0) & (states.top_p.np[slots] == 1)
        if np.all(unshaped & (states.top_k.np[slots] == states.vocab_size)):
            return None

        def shape(score_NV: torch.Tensor) -> torch.Tensor:
            states.apply_min_p(score_NV, tile.slot_N, slots)
            return states.apply_top_k_top_p(score_NV, tile.slot_N, slots)

        return shape


def _is_built_in(processor: Any) -> bool:
    """vLLM's own bias, penalties and bad words."""
    return isinstance(processor, LogitBiasState | PenaltiesState | BadWordsState)


def changes_logits(params: "SamplingParams") -> bool:
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
