"""The nouns of a step: what a worker knows of one engine step, from the scheduler's batch to the sampler's report.

A ``Step`` is built once per batch and passed along. Its parts are filled in as the step goes by: ``canvases`` when vLLM
has its block tables, ``outcome`` by the forward.

Legend: R rows (requests), S widest canvas of the batch, T canvas tokens in batch order, N rows of logits, C channels,
    G KV cache groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vllm_twotower.config import RequestOptions
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.ops import Draw, MaskedCanvases
from vllm_twotower.runtime.host_copies import copy_together


@dataclass(frozen=True, kw_only=True)
class CanvasPlaces:
    """Where a step's canvases and what they read lie in the caches; tensors on the device."""

    seq_lens_R: torch.Tensor
    """int32, each row's length with its canvas."""
    block_tables: Sequence[torch.Tensor]
    """Per KV cache group, int32 [R, blocks]."""
    slot_mappings_GT: torch.Tensor
    """int64, per KV cache group, each token's slot."""
    mamba_slots: Mapping[str, torch.Tensor]
    """Name of a context Mamba layer -> int64 [R], slot of each row's committed state."""


@dataclass(frozen=True, kw_only=True)
class CanvasLayout:
    """How the canvases of a batch lie in the flat token dimension, and where each row's Mamba states are."""

    row_T: torch.Tensor
    """int64 [T], each token's row."""
    column_T: torch.Tensor
    """int64 [T], each token's position in its canvas."""
    num_rows: int
    max_width: int
    """S."""
    unmodulated_R: torch.Tensor | None = None
    """bool [R], rows that run without time conditioning (mock-AR); None where there are none."""
    mamba_slots: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """As ``CanvasPlaces.mamba_slots``; empty in a profile run."""
    is_padding_T: torch.Tensor | None = None
    """bool [T], tokens of no canvas (``runtime/denoise_graphs.py``); None where there are none."""

    @classmethod
    def from_widths(cls, widths: Sequence[int], device: torch.device, **more: Any) -> "CanvasLayout":
        """Canvases of the given widths, one after the other; ``more`` are other fields."""
        row_np = np.arange(len(widths)).repeat(widths)
        ends_np = np.cumsum(widths)
        column_np = np.arange(len(row_np)) - (ends_np - widths)[row_np]
        row_T, column_T = copy_together(device, row_np, column_np)
        return cls(
            row_T=row_T,
            column_T=column_T,
            num_rows=len(widths),
            max_width=max(widths),
            **more,
        )

    def pad(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [R, S, C]; positions past a canvas are zero."""
        if x_TC.shape[0] == self.num_rows * self.max_width:
            return x_TC.view(self.num_rows, self.max_width, -1)
        padded = x_TC.new_zeros(self.num_rows, self.max_width, x_TC.shape[-1])
        padded[self.row_T, self.column_T] = x_TC
        return padded

    def unpad(self, x_RSC: torch.Tensor) -> torch.Tensor:
        """[R, S, C] -> [T, C]."""
        if len(self.row_T) == self.num_rows * self.max_width:
            return x_RSC.flatten(0, 1)
        return x_RSC[self.row_T, self.column_T]


@dataclass(frozen=True, kw_only=True)
class KnownTokens:
    """Of a denoise step with rows that start from a known token: mock-AR rows and drafts."""

    token_R: torch.Tensor
    """int64 [R], each request's newest token."""
    mock_ar_R: torch.Tensor
    """bool [R]."""
    drafted_R: torch.Tensor
    """bool [R]."""


@dataclass(frozen=True, kw_only=True)
class CanvasRows:
    """The canvases of a step and their requests' settings, gathered from the table (``runtime/canvas_table.py``)."""

    slots: list[int]
    """Request slot of each row, on the host."""
    slot_R: torch.Tensor
    """The same, int64 [R]."""
    width_R: torch.Tensor
    """int64 [R], tokens of each canvas."""
    first_position_R: torch.Tensor
    """int64 [R], absolute position of each canvas's first token."""
    slots_np: np.ndarray
    """int64 [R] on the host, the same."""
    seq_lens_np: np.ndarray
    """int64 [R] on the host, each row's length with its canvas."""
    token_RS: torch.Tensor
    """int64 [R, S], the mask id where undecided; positions past a row's width hold 0."""
    mock_ar_R: torch.Tensor | None
    """bool [R], mock-AR rows: of one token, a known one, about whose successor the pass is asked. None if all rows are
    mask diffusion's."""
    known_R: torch.Tensor | None
    """bool [R], rows whose first token no pass may change: those, and drafts. None likewise."""
    pass_index_R: torch.Tensor
    """int64 [R], passes already run over each canvas."""
    max_steps_R: torch.Tensor
    """int64 [R]."""
    threshold_R: torch.Tensor
    """float32 [R]."""
    temperature_R: torch.Tensor
    """float32 [R], of the noise of canvas, position and pass; 0 for drafts."""
    seed_R: torch.Tensor
    """int64 [R]."""
    any_random: bool
    """Whether any of these temperatures is above 0."""
    any_drawn_as_ar: bool
    """Whether any row is a draft of a request with a temperature: drawn with the noise that AR draws with."""
    undecided: list[int]
    """On the host, per row: bit j is set where position j is masked."""
    passes_before: list[int]
    """``pass_index_R``, on the host."""


@dataclass(frozen=True, kw_only=True)
class StepCanvases:
    """What the passes of a denoise step start from."""

    rows: CanvasRows
    layout: CanvasLayout
    places: CanvasPlaces


@dataclass(kw_only=True)
class KeptRows:
    """Rows of a context step of which is kept what the Mamba layers were fed: from it, and from the states before the
    step, follow the states after any number of the rows' tokens.

    Legend: F rows, U their tokens in batch order, S widest.
    """

    rows: list[int]
    """Their rows of the batch."""
    row_F: torch.Tensor
    """The same, int64 [F]."""
    layout: CanvasLayout
    """How their tokens lie among themselves, [U], and the slots of the states that they start from, by layer."""
    token_U: torch.Tensor
    """int64 [U], where their tokens are in the batch."""
    width_F: torch.Tensor
    """int64 [F], tokens of each row."""
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name of a context Mamba layer -> its raw convolution inputs [U, C] and step sizes [U, H]; filled in by the
    forward."""


@dataclass(kw_only=True)
class VerifyRows(KeptRows):
    """The rows of a context step that verify drafts: the known token and the drafts behind it."""

    draft_FS: torch.Tensor
    """int64 [F, S - 1], the drafts; past a row's width anything."""


@dataclass(frozen=True, kw_only=True)
class DenoiseOutcome:
    """What a denoise step did."""

    token_RS: torch.Tensor
    """int64 [R, S], the canvases after the step."""
    pass_index_R: torch.Tensor
    """int64 [R], passes run over each canvas so far."""
    pass_index: list[int]
    """The same, on the host."""
    undecided: list[int]
    """Per row: bit j is set where position j is still masked."""
    broken: list[bool]
    """Per row: a confidence of this step was NaN, so the canvas means nothing and its request has to end."""
    num_passes: list[int]
    """Per row: passes run in this step while the canvas was unfinished."""
    num_forwards: int
    """Forwards of the denoiser tower."""

    @cached_property
    def finished(self) -> list[bool]:
        """Per row: nothing is masked any more, and the canvas can be emitted."""
        return [bits == 0 and not broken for bits, broken in zip(self.undecided, self.broken, strict=True)]


@dataclass(kw_only=True)
class Step:
    """One engine step of a worker."""

    kind: StepKind
    """Which tower runs."""
    req_ids: list[str]
    options: list[RequestOptions | None]
    """Per row; None for a request that vLLM invented (a dummy batch, its warm-up)."""
    slots: list[int]
    """Per row, the runner's request slot."""
    widths: list[int]
    """Per row, scheduled tokens; of a canvas all of it."""
    computed_np: np.ndarray
    """int64 [R], tokens that the context held before the step."""
    canvases: StepCanvases | None = None
    """Of a denoise step, before its forward."""
    outcome: DenoiseOutcome | None = None
    """Of a denoise step, after its forward."""
    verify: VerifyRows | None = None
    """Of a context step, its rows that verify drafts; None where there are none."""
    kept: list[KeptRows] = field(default_factory=list)
    """Of a context step, all rows of which is kept what the Mamba layers were fed, those that verify among them."""

    @cached_property
    def slots_np(self) -> np.ndarray:
        """int64 [R], ``slots``."""
        return np.array(self.slots, dtype=np.int64)

    @cached_property
    def ends_np(self) -> np.ndarray:
        """int64 [R], each row's length with the step's tokens."""
        return self.computed_np + np.array(self.widths)

    @cached_property
    def modes(self) -> list[Mode | None]:
        """Per row; None as in ``options``."""
        return [options.mode if options else None for options in self.options]

    @property
    def is_real(self) -> bool:
        """Whether any row is somebody's request."""
        return any(options is not None for options in self.options)


@dataclass(frozen=True, kw_only=True)
class Canvases(MaskedCanvases):
    """The canvases of a step between two passes, on the device."""

    broken_R: torch.Tensor
    """bool [R], rows with a confidence that was NaN."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows of logits of one pass: some masked positions of some requests, or whole canvases.

    What a row is about is looked up when somebody asks: a greedy pass asks for next to nothing.
    """

    token_N: torch.Tensor
    """int64 [N], indices in T."""
    rows: CanvasRows
    layout: CanvasLayout
    canvases: Canvases
    """Before the pass."""

    def only(self, keep_N: torch.Tensor) -> "Tile":
        """Some of the rows: a bool mask or int64 indices."""
        return replace(self, token_N=self.token_N[keep_N])

    @cached_property
    def row_N(self) -> torch.Tensor:
        """int64 [N], row of the step."""
        return self.layout.row_T[self.token_N]

    @cached_property
    def column_N(self) -> torch.Tensor:
        """int64 [N], canvas position."""
        return self.layout.column_T[self.token_N]

    @property
    def slot_N(self) -> torch.Tensor:
        """int64 [N], request slot."""
        return self.rows.slot_R[self.row_N]

    @property
    def is_draft_N(self) -> torch.Tensor:
        """bool [N], whether the row is of a draft."""
        rows = self.rows
        assert rows.known_R is not None
        assert rows.mock_ar_R is not None
        return (rows.known_R & ~rows.mock_ar_R)[self.row_N]

    @property
    def canvas_token_N(self) -> torch.Tensor:
        """int64 [N], the token there."""
        return self.canvases.token_RS[self.row_N, self.column_N]

    @cached_property
    def position_N(self) -> torch.Tensor:
        """int64 [N], absolute position of the token that the logits are about: a canvas position's own, a mock-AR
        row's next."""
        position_N = self.rows.first_position_R[self.row_N] + self.column_N
        return position_N if self.rows.mock_ar_R is None else position_N + self.rows.mock_ar_R[self.row_N]

    def draw(self) -> Draw:
        """How the rows' tokens are drawn."""
        rows = self.rows
        return Draw(
            rows.temperature_R[self.row_N],
            rows.seed_R[self.row_N],
            self.position_N,
            self.canvases.pass_index_R[self.row_N],
        )
