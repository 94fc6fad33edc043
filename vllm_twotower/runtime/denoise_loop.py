"""The passes of a denoise step: one or more forwards of the denoiser over the step's canvases, and the reveals between.

A mock-AR row is a canvas of one token, the request's last: it runs in the first pass without time conditioning, and
what is proposed there is the token *after* it.

The passes run inside the model's ``forward``, because that is where vLLM's forward context (attention metadata, slot
mappings) is set; the sampler afterwards only reports their outcome.

On a GPU every read of a result makes the host wait for the device and the device for the host, so a step reads once, at
its end: what is masked at its start the host knows from the last step, and positions revealed in between are scored
once more than needed. Where reads are free (a CPU) or somebody looks at each reveal (log-probabilities, processed
logits, a trace) every pass reads what is still masked, computes no more than that, and ends the step when nothing is.

Legend: R rows (requests), S widest canvas, T tokens in batch order, D hidden, N masked positions, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vllm_twotower.core import MAX_CANVAS_LENGTH, Mode
from vllm_twotower.decoding.noise_level import level_index
from vllm_twotower.models.denoiser_tower import LOGITS_TILE, DenoiserTower
from vllm_twotower.ops import CanvasRules, reveal
from vllm_twotower.runtime.denoise_graphs import DenoiseGraphs
from vllm_twotower.runtime.host_copies import async_tensor_h2d
from vllm_twotower.runtime.proposals import ProposalSampler
from vllm_twotower.runtime.step import Canvases, CanvasLayout, CanvasRows, DenoiseOutcome, Step, Tile
from vllm_twotower.runtime.trace import CanvasTrace


class DenoiseLoop:
    """Runs denoise steps, one after the other.

    Args:
        denoiser: the tower.
        context_layers: the context tower's layers, whose caches the denoiser reads.
        proposals: turns logits into proposals.
        passes_per_step: passes of a step at most.
        find_trace: who records, if anybody does now.
        reads_are_free: whether reading a result costs nothing, so that every pass may be looked at, see above.

    """

    def __init__(
        self,
        *,
        denoiser: DenoiserTower,
        context_layers: nn.ModuleList,
        proposals: ProposalSampler,
        passes_per_step: int,
        reads_are_free: bool,
        find_trace: Callable[[], CanvasTrace | None],
    ) -> None:
        self.denoiser = denoiser
        self.context_layers = context_layers
        self.proposals = proposals
        self.passes_per_step = passes_per_step
        self.reads_are_free = reads_are_free
        self.find_trace = find_trace

    @property
    def trace(self) -> CanvasTrace | None:
        """Who records, if anybody does now."""
        return self.find_trace()

    def run(self, step: Step, graphs: DenoiseGraphs | None) -> DenoiseOutcome:
        """Run a step's passes, within vLLM's forward context.

        Args:
            step: with its canvases.
            graphs: captured passes, or None.

        """
        now = self.run_passes(step, graphs)
        return self.read_outcome(step, now.token_RS, now.pass_index_R, now.broken_R)

    def run_passes(self, step: Step, graphs: DenoiseGraphs | None) -> Canvases:
        """The passes alone; nothing is read where ``reads_between_passes`` says so."""
        assert step.canvases is not None
        rows, layout, places = step.canvases.rows, step.canvases.layout, step.canvases.places
        # a captured pass modulates every row
        replay = graphs.load(step.widths, places) if graphs is not None and layout.unmodulated_R is None else None
        reads = self.reads_between_passes(step)
        undecided_T = None if reads else _undecided_at_start(step.widths, rows, layout)
        rules = CanvasRules(rows.width_R, rows.threshold_R, rows.max_steps_R)
        masked_RS = self._masked(rows.token_RS, rows)
        now = Canvases(
            token_RS=rows.token_RS,
            masked_RS=masked_RS,
            level_R=level_index(masked_RS.sum(dim=1), rows.width_R),
            pass_index_R=rows.pass_index_R,
            broken_R=torch.zeros_like(rows.pass_index_R, dtype=torch.bool),
        )
        for index in range(self._num_passes(step)):
            mock_ar_R = rows.mock_ar_R if index == 0 else None
            wanted_RS = now.masked_RS if mock_ar_R is None else now.masked_RS | mock_ar_R[:, None]
            if reads and not wanted_RS.any():
                break
            if self.trace is not None:
                self.trace.start_pass(step, now.masked_RS.any(dim=1), now.token_RS)
            if replay is not None:
                hidden_TD = replay(now.token_RS, now.level_R)
            else:
                token_T = now.token_RS[layout.row_T, layout.column_T]
                hidden_TD = self.denoiser(token_T, now.level_R, layout, self.context_layers)
            wanted_T = wanted_RS[layout.row_T, layout.column_T] if undecided_T is None else undecided_T
            proposal_RS, confidence_RS = self._propose(hidden_TD, wanted_T, rows, layout, now)
            broken_R = now.broken_R | (confidence_RS.isnan() & wanted_RS).any(dim=1)
            now = Canvases(**vars(reveal(now, proposal_RS, confidence_RS, rules)), broken_R=broken_R)
            if mock_ar_R is not None:
                token_RS = torch.where(mock_ar_R[:, None], proposal_RS, now.token_RS)
                now = replace(now, token_RS=token_RS, pass_index_R=now.pass_index_R + mock_ar_R)
        return now

    def read_outcome(
        self, step: Step, token_RS: torch.Tensor, pass_index_R: torch.Tensor, broken_R: torch.Tensor
    ) -> DenoiseOutcome:
        """What the passes did (see ``Canvases``), with the host's copy of it: the step's one read."""
        assert step.canvases is not None
        rows = step.canvases.rows
        column_S = torch.arange(token_RS.shape[1], device=token_RS.device)
        undecided_R = (self._masked(token_RS, rows) << column_S).sum(dim=1)
        pass_index, undecided, broken = torch.stack([pass_index_R, undecided_R, broken_R.to(torch.int64)]).tolist()
        num_passes = [after - before for after, before in zip(pass_index, rows.passes_before, strict=True)]
        return DenoiseOutcome(
            token_RS=token_RS,
            pass_index_R=pass_index_R,
            pass_index=pass_index,
            undecided=undecided,
            broken=list(map(bool, broken)),
            num_passes=num_passes,
            num_forwards=max(num_passes) if self.reads_between_passes(step) else self._num_passes(step),
        )

    def reads_between_passes(self, step: Step) -> bool:
        """Whether every pass of a step reads what the one before revealed, see above."""
        return self.reads_are_free or self.trace is not None or self.proposals.follows_reveals(step.slots_np)

    def _num_passes(self, step: Step) -> int:
        return 1 if all(mode is Mode.MOCK_AR for mode in step.modes) else self.passes_per_step

    def _masked(self, token_RS: torch.Tensor, rows: CanvasRows) -> torch.Tensor:
        """Undecided positions; a known token may be the mask id, as any token of a prompt."""
        masked_RS = token_RS == self.proposals.mask_token_id
        if rows.known_R is not None:
            masked_RS[:, 0] &= ~rows.known_R
        return masked_RS

    def _propose(
        self,
        hidden_TD: torch.Tensor,
        wanted: torch.Tensor,
        rows: CanvasRows,
        layout: CanvasLayout,
        now: Canvases,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Proposal and confidence for every wanted position, in tiles of logits; elsewhere 0.

        ``wanted`` is bool [T], or the indices in T: int64 [N].
        """
        shape = now.token_RS.shape
        proposal_RS = torch.zeros(shape, dtype=torch.int64, device=wanted.device)
        confidence_RS = torch.zeros(shape, dtype=torch.float32, device=wanted.device)
        for token_N, whole_canvases in self._tiles(wanted, rows, layout):
            tile = Tile(token_N=token_N, rows=rows, layout=layout, canvases=now)
            wanted_N = wanted[token_N] if whole_canvases else None
            made = self.proposals.propose(self.denoiser.logits(hidden_TD[token_N]), tile, wanted_N)
            if self.trace is not None:
                self.trace.record_proposals(made)
            proposal_RS[made.tile.row_N, made.tile.column_N] = made.sample.token_N
            confidence_RS[made.tile.row_N, made.tile.column_N] = made.sample.confidence_N
        return proposal_RS, confidence_RS

    def _tiles(
        self, wanted: torch.Tensor, rows: CanvasRows, layout: CanvasLayout
    ) -> Iterator[tuple[torch.Tensor, bool]]:
        """Token indices of each tile, and whether it is whole canvases (of requests whose logits are processed)."""
        if wanted.dtype == torch.int64:
            for token_N in wanted.split(LOGITS_TILE):
                yield token_N, False
            return
        processed = [self.proposals.is_processed(slot) for slot in rows.slots]
        plain_T = wanted
        if any(processed):
            plain_T = wanted & ~async_tensor_h2d(processed, wanted.device)[layout.row_T]
        for token_N in plain_T.nonzero().squeeze(1).split(LOGITS_TILE):
            if len(token_N):
                yield token_N, False
        whole = async_tensor_h2d([row for row, p in enumerate(processed) if p], wanted.device, torch.int64)
        for row_N in whole.split(LOGITS_TILE // MAX_CANVAS_LENGTH):
            if len(row_N):
                yield torch.isin(layout.row_T, row_N).nonzero().squeeze(1), True


def _undecided_at_start(widths: list[int], rows: CanvasRows, layout: CanvasLayout) -> torch.Tensor:
    """Indices in T of what was masked when the step began, from the host's copy; int64 [N]."""
    column_S = np.arange(layout.max_width)
    bits_RS = np.array(rows.undecided)[:, None] >> column_S & 1
    in_canvas_RS = column_S < np.array(widths)[:, None]
    return async_tensor_h2d(bits_RS[in_canvas_RS].nonzero()[0], rows.width_R.device)
