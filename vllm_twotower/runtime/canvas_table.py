"""The unfinished canvases of one worker, by the runner's request slot. A canvas lives here from its first pass to its
emission.

What the host has to know about them it keeps a copy of, so that a step starts without asking the device.

Legend: R rows of a step, S widest canvas, Q request slots.
"""

import hashlib
from dataclasses import dataclass

import torch

from vllm_twotower.config import RequestOptions
from vllm_twotower.core import Mode
from vllm_twotower.runtime.host_copies import async_tensor_h2d, copy_together
from vllm_twotower.runtime.step import CanvasRows, DenoiseOutcome, KnownTokens, Step


def resolve_seed(req_id: str, seed: int | None, engine_seed: int) -> int:
    """The request's seed, or one derived from its id, so that all ranks draw the same noise."""
    if seed is not None:
        return seed
    digest = hashlib.blake2b(f"{engine_seed}/{req_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(kw_only=True, slots=True)
class SlotState:
    """What the host knows of a slot's request and its canvas."""

    is_random: bool
    """Its canvases are drawn with noise of canvas, position and pass."""
    is_drawn_as_ar: bool
    """Its drafts are drawn with the noise that AR draws with."""
    has_started: bool = False
    """A pass has run over its canvas, which is unfinished."""
    undecided: int = 0
    """Bit j is set where position j is masked; means something once the canvas has started, as the next."""
    pass_index: int = 0
    """Passes run over the canvas."""
    has_draft: bool = False
    """It holds a finished draft that nothing has been computed of yet."""


class CanvasTable:
    """Canvases and per-request denoise settings, on the device."""

    def __init__(self, num_slots: int, max_width: int, mask_token_id: int, device: torch.device) -> None:
        self.mask_token_id = mask_token_id
        self.device = device
        self.token_QS = torch.zeros(num_slots, max_width, dtype=torch.int64, device=device)
        self.pass_index_Q = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.max_steps_Q = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.threshold_Q = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.temperature_Q = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.seed_Q = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # of self-speculation: what of the last draft may hold, and of which position its first token is; -1: nothing
        self.hint_QS = torch.zeros_like(self.token_QS)
        self.hint_position_Q = torch.full_like(self.pass_index_Q, -1)
        self._column_S = torch.arange(max_width, device=device)
        self._slots: dict[int, SlotState] = {}

    def add_request(self, slot: int, options: RequestOptions, temperature: float, seed: int) -> None:
        """Put a request's settings into its slot; its canvas starts with its next denoise step."""
        is_drafted = options.mode is Mode.SELF_SPECULATION
        # filled and not assigned: torch would send an assigned number from pageable memory and wait
        self.max_steps_Q[slot].fill_(options.max_steps)
        self.threshold_Q[slot].fill_(options.confidence_threshold)
        self.temperature_Q[slot].fill_(0 if is_drafted else temperature)  # drafts are drawn as AR draws
        self.seed_Q[slot].fill_(seed)
        self.hint_position_Q[slot].fill_(-1)
        is_drawn = temperature > 0
        self._slots[slot] = SlotState(is_random=is_drawn and not is_drafted, is_drawn_as_ar=is_drawn and is_drafted)

    def has_draft(self, slot: int) -> bool:
        """Whether the slot holds a finished draft that nothing has been computed of yet."""
        state = self._slots.get(slot)  # none of a row that vLLM invented
        return state is not None and state.has_draft

    def take_drafts(self, slots: list[int]) -> torch.Tensor:
        """Finished drafts behind their known tokens, int64 [slots, S - 1]; from now on the slots hold none."""
        self.drop_drafts(slots)
        return self.token_QS[async_tensor_h2d(slots, self.device, torch.int64), 1:]

    def drop_drafts(self, slots: list[int]) -> None:
        """From now on the slots hold no finished draft."""
        for slot in slots:
            self._slots[slot].has_draft = False

    def keep_hints(self, step: Step, hint_FS: torch.Tensor, num_kept_F: torch.Tensor) -> None:
        """Keep hints for those canvases that start right behind what was verified; the others start without.

        Args:
            step: with the rows that verified.
            hint_FS: int64 [F, S], the mask id where there is none.
            num_kept_F: int [F], tokens of each verified canvas that the context keeps.

        """
        assert step.verify is not None
        rows = step.verify.rows
        slot_F, computed_F = copy_together(self.device, [step.slots[row] for row in rows], step.computed_np[rows])
        self.hint_QS[slot_F] = hint_FS
        self.hint_position_Q[slot_F] = computed_F + num_kept_F

    def gather(self, step: Step, slot_R: torch.Tensor, known: KnownTokens | None) -> CanvasRows:
        """The rows of a denoise step; a canvas that has not started yet is all mask, but for hints.

        Args:
            step: of which rows, widths and positions are read.
            slot_R: int64 [R], the step's slots.
            known: what mock-AR rows and drafts start from; None where there are no such rows.

        """
        slots = step.slots
        states = [self._slots[slot] for slot in slots]
        starts = [not state.has_started for state in states]
        width_R, first_position_R, starts_R = copy_together(self.device, step.widths, step.computed_np, starts)
        token_RS, pass_index_R = self.token_QS[slot_R], self.pass_index_Q[slot_R]
        if any(starts):
            empty_RS = self._start_canvases(slot_R, width_R, first_position_R, known is not None)
            starts_R = starts_R.to(torch.bool)
            token_RS = torch.where(starts_R[:, None], empty_RS, token_RS)
            pass_index_R = pass_index_R.masked_fill(starts_R, 0)
            for state, width in zip(states, step.widths, strict=True):
                if not state.has_started:  # where hints are the host does not know
                    state.undecided, state.pass_index = (1 << width) - 1, 0
        mock_ar_R = known_R = None
        undecided = [state.undecided for state in states]
        if known is not None:
            mock_ar_R, known_R = known.mock_ar_R, known.mock_ar_R | known.drafted_R
            token_RS[:, 0] = torch.where(known_R, known.token_R, token_RS[:, 0])
            undecided = [
                bits & ~1 if mode is Mode.SELF_SPECULATION else bits
                for bits, mode in zip(undecided, step.modes, strict=True)
            ]
        return CanvasRows(
            slots=slots,
            slot_R=slot_R,
            width_R=width_R,
            first_position_R=first_position_R,
            slots_np=step.slots_np,
            seq_lens_np=step.ends_np,
            token_RS=token_RS,
            mock_ar_R=mock_ar_R,
            known_R=known_R,
            pass_index_R=pass_index_R,
            max_steps_R=self.max_steps_Q[slot_R],
            threshold_R=self.threshold_Q[slot_R],
            temperature_R=self.temperature_Q[slot_R],
            seed_R=self.seed_Q[slot_R],
            any_random=any(state.is_random for state in states),
            any_drawn_as_ar=any(state.is_drawn_as_ar for state in states),
            undecided=undecided,
            passes_before=[state.pass_index for state in states],
        )

    def _start_canvases(
        self, slot_R: torch.Tensor, width_R: torch.Tensor, first_position_R: torch.Tensor, may_have_hints: bool
    ) -> torch.Tensor:
        """Canvases before their first pass: masks, and hints; int64 [R, S]."""
        empty_RS = torch.where(self._column_S < width_R[:, None], self.mask_token_id, 0)
        if not may_have_hints:
            return empty_RS
        hinted_R = self.hint_position_Q[slot_R] == first_position_R
        is_hinted_RS = hinted_R[:, None] & (empty_RS == self.mask_token_id)
        return torch.where(is_hinted_RS, self.hint_QS[slot_R], empty_RS)

    def scatter(self, step: Step, outcome: DenoiseOutcome) -> None:
        """Keep the rows as a step left them; the canvas of a finished one starts from masks next time."""
        assert step.canvases is not None
        slot_R = step.canvases.rows.slot_R
        self.token_QS[slot_R] = outcome.token_RS
        self.pass_index_Q[slot_R] = outcome.pass_index_R
        of_rows = zip(step.slots, outcome.undecided, outcome.pass_index, outcome.finished, step.modes, strict=True)
        for slot, undecided, pass_index, is_finished, mode in of_rows:
            state = self._slots[slot]
            state.undecided, state.pass_index, state.has_started = undecided, pass_index, not is_finished
            state.has_draft |= is_finished and mode is Mode.SELF_SPECULATION
