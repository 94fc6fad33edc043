"""The unfinished canvases of one worker, by the runner's request slot. A canvas lives here from its first pass to its
emission.

What the host has to know about them it keeps a copy of, so that a step starts without asking the device.

Legend: R rows of a step, S widest canvas, B request slots.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_twotower.config import RequestOptions

if TYPE_CHECKING:
    from vllm_twotower.runtime.denoise_step import DenoiseOutcome


def request_seed(req_id: str, seed: int | None, engine_seed: int) -> int:
    """The request's seed, or one derived from its id, so that all ranks draw the same noise."""
    if seed is not None:
        return seed
    digest = hashlib.blake2b(f"{engine_seed}/{req_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class CanvasRows:
    """The settings and canvases of one step's rows, gathered from the table."""

    slots: list[int]
    """Request slot of each row, on the host."""
    slot_R: torch.Tensor
    """The same, int64 [R]."""
    token_RS: torch.Tensor
    """int64 [R, S], the mask id where undecided; positions past a row's width hold 0."""
    pass_index_R: torch.Tensor
    """int64 [R], passes already run over each canvas."""
    max_steps_R: torch.Tensor
    threshold_R: torch.Tensor
    temperature_R: torch.Tensor
    seed_R: torch.Tensor
    any_random: bool
    """Whether any row has a temperature above 0."""
    undecided: list[int]
    """On the host, per row: bit j is set where position j is masked."""
    passes_before: list[int]
    """``pass_index_R``, on the host."""


class CanvasTable:
    """Canvases and per-request denoise settings, on the device."""

    def __init__(self, num_slots: int, max_width: int, mask_token_id: int, device: torch.device) -> None:
        self.mask_token_id = mask_token_id
        self.token_BS = torch.zeros(num_slots, max_width, dtype=torch.int64, device=device)
        self.pass_index_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.max_steps_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.threshold_B = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.temperature_B = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.seed_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._started: dict[int, bool] = {}
        self._undecided: dict[int, int] = {}
        self._pass_index: dict[int, int] = {}
        self._random: dict[int, bool] = {}

    def add_request(self, slot: int, options: RequestOptions, temperature: float, seed: int) -> None:
        """Put a request's settings into its slot; its canvas starts with its next denoise step."""
        self.max_steps_B[slot] = options.max_steps
        self.threshold_B[slot] = options.confidence_threshold
        self.temperature_B[slot] = temperature
        self.seed_B[slot] = seed
        self._random[slot] = temperature > 0
        self._started[slot] = False

    def gather(self, slots: list[int], widths: list[int], slot_R: torch.Tensor) -> CanvasRows:
        """The rows of a step; a canvas that has not started yet is all mask."""
        for slot, width in zip(slots, widths, strict=True):
            if not self._started[slot]:
                self.token_BS[slot] = 0
                self.token_BS[slot, :width] = self.mask_token_id
                self.pass_index_B[slot] = 0
                self._started[slot] = True
                self._undecided[slot], self._pass_index[slot] = (1 << width) - 1, 0
        return CanvasRows(
            slots,
            slot_R,
            self.token_BS[slot_R],
            self.pass_index_B[slot_R],
            self.max_steps_B[slot_R],
            self.threshold_B[slot_R],
            self.temperature_B[slot_R],
            self.seed_B[slot_R],
            any(self._random[slot] for slot in slots),
            [self._undecided[slot] for slot in slots],
            [self._pass_index[slot] for slot in slots],
        )

    def scatter(self, rows: CanvasRows, outcome: "DenoiseOutcome") -> None:
        """Keep the rows as a step left them."""
        self.token_BS[rows.slot_R] = outcome.token_RS
        self.pass_index_B[rows.slot_R] = outcome.pass_index_R
        for slot, undecided, passes in zip(rows.slots, outcome.undecided, outcome.pass_index, strict=True):
            self._undecided[slot], self._pass_index[slot] = undecided, passes

    def finish(self, slot: int) -> None:
        """The slot's canvas was emitted; the next one starts from masks."""
        self._started[slot] = False
