"""Log-probabilities of revealed tokens: from the pass that revealed each, untempered, the mask id excluded.

Every pass writes the proposals' log-probabilities of all positions that are still masked; a revealed position is never
written again, so what stays is the revealing pass's.

Legend: N rows of logits, V vocabulary, S canvas positions, K top log-probabilities asked for.
"""

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from vllm_twotower.runtime.host_copies import async_tensor_h2d
from vllm_twotower.runtime.step import Tile


class LogprobTable:
    """Log-probabilities of unfinished canvases, by request slot."""

    def __init__(self, base: Sampler) -> None:
        self.num_logprobs = base.sampling_states.num_logprobs
        self.of_processed = base.logprobs_mode in PROCESSED_LOGPROBS_MODES
        self.as_logits = base.logprobs_mode in ("raw_logits", "processed_logits")
        self._columns: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def clear_slot(self, slot: int) -> None:
        """Forget the slot's previous request."""
        self._columns.pop(slot, None)

    def is_wanted(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests asked for log-probabilities."""
        return bool(np.any(self.num_logprobs[slots_np] != NO_LOGPROBS))

    def wants_raw(self, slots_np: np.ndarray) -> bool:
        """Whether logits must be kept as they were before processing."""
        return self.is_wanted(slots_np) and not self.of_processed

    def record(self, logits_NV: torch.Tensor, tile: Tile, token_N: torch.Tensor) -> None:
        """Write the proposals of this pass over those of the last."""
        wants = async_tensor_h2d(self.num_logprobs != NO_LOGPROBS, logits_NV.device)[tile.slot_N]
        if not wants.any():
            return
        slots, columns = tile.slot_N[wants].tolist(), tile.column_N[wants].tolist()
        scores = compute_topk_scores(
            logits_NV[wants], int(self.num_logprobs[slots].max()), token_N[wants], None, logits_mode=self.as_logits
        )
        rows = zip(scores.logprob_token_ids, scores.logprobs, scores.selected_token_ranks, strict=True)
        for slot, column, row in zip(slots, columns, rows, strict=True):
            self._columns.setdefault(slot, {})[column] = row

    def take(self, slots: list[int], emitted: list[int]) -> LogprobsTensors | None:
        """What a step emits: the rows of its finished canvases, one after the other; None if nobody asked."""
        rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        starts = []
        for slot, width in zip(slots, emitted, strict=True):
            starts.append(len(rows))
            if width and (canvas := self._columns.pop(slot, None)):
                rows += [canvas[column] for column in range(width)]
        if not rows:
            return None
        widest = max(ids.shape[0] for ids, _, _ in rows)
        return LogprobsTensors(
            torch.stack([_widened(ids, widest, 0) for ids, _, _ in rows]),
            torch.stack([_widened(scores, widest, float("-inf")) for _, scores, _ in rows]),
            torch.stack([rank for _, _, rank in rows]),
            cu_num_generated_tokens=starts,
        )


def _widened(row: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, width - row.shape[0]), value=value)
