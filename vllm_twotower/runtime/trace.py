"""A record of canvases filling in, for ``vllm-twotower trace`` and for tests; off unless asked for."""

from collections import defaultdict
from typing import Any

import torch

from vllm_twotower.runtime.proposals import Proposals
from vllm_twotower.runtime.step import Step

NUM_CANDIDATES = 4
"""The proposal and its runners-up, by probability."""


class CanvasTrace:
    """Every denoise pass by request, in order: the canvas before it and what it proposed where.

    A pass is a dict of plain values, so that it can cross a process border: ``tokens`` (list[int], the canvas before
    the pass), ``proposals`` (canvas position -> ``token``, ``confidence``, ``candidates`` as [token, probability]
    pairs). What the last pass of a canvas finds masked is revealed as proposed.

    Args:
        mask_token_id: never a candidate.

    """

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id
        self._passes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._current: dict[int, dict[str, Any]] = {}

    def start_pass(self, step: Step, unfinished_R: torch.Tensor, token_RS: torch.Tensor) -> None:
        """Record the canvases that a pass starts from; finished ones are left out.

        Args:
            step: whose rows they are.
            unfinished_R: bool [R].
            token_RS: int64 [R, S].

        """
        self._current.clear()
        for row, (req_id, slot, width) in enumerate(zip(step.req_ids, step.slots, step.widths, strict=True)):
            if unfinished_R[row]:
                self._current[slot] = {"tokens": token_RS[row, :width].tolist(), "proposals": {}}
                self._passes[req_id].append(self._current[slot])

    def record_proposals(self, made: Proposals) -> None:
        """Record what the pass proposes."""
        logits_NV = made.logits_NV.to(torch.float32, copy=True)
        logits_NV[:, self.mask_token_id] = float("-inf")
        top = logits_NV.softmax(dim=-1).topk(min(NUM_CANDIDATES, logits_NV.shape[1]), dim=-1)
        rows = zip(
            made.tile.slot_N.tolist(),
            made.tile.column_N.tolist(),
            made.sample.token_N.tolist(),
            made.sample.confidence_N.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
        for slot, column, token, confidence, ids, probabilities in rows:
            if slot in self._current:
                self._current[slot]["proposals"][column] = {
                    "token": token,
                    "confidence": confidence,
                    "candidates": [list(pair) for pair in zip(ids, probabilities, strict=True)],
                }

    def take(self) -> dict[str, list[dict[str, Any]]]:
        """The passes of each request id so far; starts over."""
        taken, self._passes = dict(self._passes), defaultdict(list)
        return taken
