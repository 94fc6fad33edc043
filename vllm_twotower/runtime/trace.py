"""A record of canvases filling in and of drafts verified, for ``vllm-twotower trace`` and for tests; off unless asked
for."""

from collections import defaultdict
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_twotower.core import Mode
from vllm_twotower.runtime.proposals import Proposals
from vllm_twotower.runtime.step import Step

NUM_CANDIDATES = 4
"""The proposal and its runners-up, by probability."""


class CanvasTrace:
    """What happened to each request, in order, as dicts of plain values, which can cross a process border.

    A denoise pass has ``tokens`` (list[int], the canvas before it) and ``proposals`` (canvas position -> ``token``,
    ``confidence``, ``candidates`` as [token, probability] pairs). What the last pass of a canvas finds masked is
    revealed as proposed.

    A context step that gave a request in self-speculation tokens has ``drafts`` (list[int], without the known token;
    empty where it verified none: at the prompt's end and in plain AR steps), ``num_accepted``, the drafts that were
    kept, from the first on, and ``next_token``, AR's own, which comes after these. So the kept drafts and the next
    tokens, one after the other, are the output, and beyond its end what the last round wrote too much.

    Args:
        mask_token_id: never a candidate.

    """

    def __init__(self, mask_token_id: int) -> None:
        self.mask_token_id = mask_token_id
        self._records: dict[str, list[dict[str, Any]]] = defaultdict(list)
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
                self._records[req_id].append(self._current[slot])

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

    def record_verifications(self, step: Step, chosen: SamplerOutput) -> None:
        """Record what a context step gave the requests in self-speculation; one that ends with an error got nothing.

        Args:
            step: the context step.
            chosen: per row of the step, accepted drafts and the token after them (``accept_drafts``).

        """
        drafts_of: dict[int, list[int]] = {}
        if step.verify is not None:
            drafts_of = dict(zip(step.verify.rows, step.verify.draft_FS.tolist(), strict=True))
        assert chosen.num_nans is not None
        counts = zip(chosen.num_sampled.tolist(), chosen.num_nans.tolist(), strict=True)
        for row, (count, num_nans) in enumerate(counts):
            if step.modes[row] is Mode.SELF_SPECULATION and count and not num_nans:
                drafts = drafts_of[row][: step.widths[row] - 1] if row in drafts_of else []
                next_token = int(chosen.sampled_token_ids[row, count - 1])
                self._records[step.req_ids[row]].append(
                    {"drafts": drafts, "num_accepted": count - 1, "next_token": next_token}
                )

    def take(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each request id so far; starts over."""
        taken, self._records = dict(self._records), defaultdict(list)
        return taken
