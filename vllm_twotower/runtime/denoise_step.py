"""One denoise step of a worker: one or more denoise passes over the step's canvases, and the reveals between them.

A mock-AR row is a canvas of one token, the request's last: it runs in the first pass without time conditioning, and
what is proposed there is the token *after* it.

The passes run inside the model's ``forward``, because that is where vLLM's forward context (attention metadata, slot
mappings) is set; the sampler afterwards only reports what ``run`` left in ``outcome``.

On a GPU every read of a result makes the host wait for the device and the device for the host, so a step reads once, at
its end: what is masked at its start the host knows from the last step, and positions revealed in between are scored
once more than needed. Where reads are free (a CPU) or somebody looks at each reveal (log-probabilities, processed
logits, a trace) every pass reads what is still masked, computes no more than that, and ends the step when nothing is.

Legend: R rows (requests), S widest canvas, T tokens in batch order, N masked positions, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from vllm_twotower.config import MAX_CANVAS_LENGTH
from vllm_twotower.decoding.noise_level import level_index
from vllm_twotower.models.denoiser_tower import LOGITS_TILE, CanvasLayout, DenoiserTower
from vllm_twotower.ops import CanvasRules, reveal
from vllm_twotower.runtime.canvas_table import CanvasRows
from vllm_twotower.runtime.denoise_graphs import DenoiseGraph
from vllm_twotower.runtime.proposals import ProposalSampler, Tile
from vllm_twotower.split.link import TowerLink


@dataclass(frozen=True)
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

    @property
    def finished(self) -> list[bool]:
        """Per row: nothing is masked any more."""
        return [bits == 0 for bits in self.undecided]


class DenoiseStep:
    """The passes of one engine step.

    Args:
        rows: the step's canvases and settings.
        layout: how the canvases lie in the batch.
        widths: canvas width of each row.
        first_position_np: int64 [R] on the host, absolute position of each canvas's first token.
        proposals: turns logits into proposals.
        passes: passes at most.
        mask_token_id: the mask.
        reads_between_passes: whether every pass reads what the one before revealed, see above.
        start_pass: called before each pass with (rows with masked positions, their canvases); None to skip.
        link: to the other tower's ranks; None where the towers are not split.
        graph: a captured denoise pass, loaded with this step's rows; None to run the layers one by one.

    """

    def __init__(
        self,
        rows: CanvasRows,
        layout: CanvasLayout,
        widths: list[int],
        first_position_np: np.ndarray,
        proposals: ProposalSampler,
        passes: int,
        mask_token_id: int,
        *,
        reads_between_passes: bool,
        start_pass: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
        link: TowerLink | None = None,
        graph: DenoiseGraph | None = None,
    ) -> None:
        self.rows = rows
        self.layout = layout
        self.widths = widths
        self.width_R = torch.tensor(widths, device=rows.token_RS.device)
        self.first_position_R = torch.from_numpy(first_position_np).to(rows.token_RS.device, torch.int64)
        self.seq_lens_np = first_position_np + np.array(widths)
        self.proposals = proposals
        self.passes = passes
        self.mask_token_id = mask_token_id
        self.reads_between_passes = reads_between_passes
        self.start_pass = start_pass
        self.link = link
        self.graph = graph
        self.outcome: DenoiseOutcome | None = None
        self._token_RS = rows.token_RS
        self._mock_ar_RS = torch.zeros_like(rows.token_RS, dtype=torch.bool)
        if layout.unmodulated_R is not None:
            self._mock_ar_RS[:, 0] = layout.unmodulated_R

    def run(self, denoiser: DenoiserTower | None, context_layers: nn.ModuleList) -> None:
        """Run the passes and leave the result in ``outcome``; without a denoiser, its rank's result."""
        canvases = None
        if denoiser is not None:
            pass_index_R, broken_R = self._run_passes(denoiser, context_layers)
            # a broken row has run a pass: the sign is free, and costs the link nothing
            signed_R = torch.where(broken_R, -pass_index_R, pass_index_R)
            canvases = torch.cat([self._token_RS, signed_R[:, None]], dim=1)
        if self.link is not None:
            num_rows, width = self.rows.token_RS.shape
            canvases = self.link.share_canvases(canvases, (num_rows, width + 1))
        assert canvases is not None, "a rank without a denoiser has a link"
        token_RS, signed_R = canvases[:, :-1], canvases[:, -1]
        undecided_RS = self._masked(token_RS) << torch.arange(token_RS.shape[1], device=token_RS.device)
        signed, undecided = torch.stack([signed_R, undecided_RS.sum(dim=1)]).tolist()  # the step's one read
        pass_index = [abs(count) for count in signed]
        num_passes = [after - before for after, before in zip(pass_index, self.rows.passes_before, strict=True)]
        self.outcome = DenoiseOutcome(
            token_RS,
            signed_R.abs(),
            pass_index,
            undecided,
            [count < 0 for count in signed],
            num_passes,
            max(num_passes) if self.reads_between_passes else self.passes,
        )

    def _run_passes(self, denoiser: DenoiserTower, context_layers: nn.ModuleList) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the passes on ``_token_RS``; returns the pass counts after them, int64 [R], and what is broken, bool
        [R]."""
        pass_index_R = self.rows.pass_index_R
        broken_R = torch.zeros_like(pass_index_R, dtype=torch.bool)
        rules = CanvasRules(self.width_R, self.rows.threshold_R, self.rows.max_steps_R)
        masked_RS = self._masked(self._token_RS)
        level_R = level_index(masked_RS.sum(dim=1), self.width_R)
        undecided_T = None if self.reads_between_passes else self._undecided_at_start()
        for step in range(self.passes):
            mock_ar_RS = self._mock_ar_RS if step == 0 else torch.zeros_like(masked_RS)
            wanted_RS = masked_RS | mock_ar_RS
            if self.reads_between_passes and not wanted_RS.any():
                break
            if self.start_pass is not None:
                self.start_pass(masked_RS.any(dim=1), self._token_RS)
            hidden_TD = self._hidden(denoiser, level_R, context_layers)
            wanted_T = wanted_RS[self.layout.row_T, self.layout.column_T] if undecided_T is None else undecided_T
            proposal_RS, confidence_RS = self._propose(denoiser, hidden_TD, wanted_T, pass_index_R)
            broken_R |= (confidence_RS.isnan() & wanted_RS).any(dim=1)
            after = reveal(self._token_RS, proposal_RS, confidence_RS, masked_RS, pass_index_R, rules)
            self._token_RS = torch.where(mock_ar_RS, proposal_RS, after.token_RS)
            pass_index_R = after.pass_index_R + mock_ar_RS.any(dim=1)
            masked_RS, level_R = after.masked_RS, after.level_R
        return pass_index_R, broken_R

    def _hidden(self, denoiser: DenoiserTower, level_R: torch.Tensor, context_layers: nn.ModuleList) -> torch.Tensor:
        """One denoise pass, [T, D]."""
        if self.graph is not None:
            return self.graph.run(self._token_RS, level_R)
        token_T = self._token_RS[self.layout.row_T, self.layout.column_T]
        return denoiser(token_T, level_R, self.layout, context_layers)

    def _undecided_at_start(self) -> torch.Tensor:
        """Indices in T of what was masked when the step began, from the host's copy; int64 [N]."""
        bits_RS = np.array(self.rows.undecided)[:, None] >> np.arange(self.layout.max_width) & 1
        in_canvas_RS = np.arange(self.layout.max_width) < np.array(self.widths)[:, None]
        return torch.from_numpy(bits_RS[in_canvas_RS].nonzero()[0]).to(self.width_R.device)

    def _masked(self, token_RS: torch.Tensor) -> torch.Tensor:
        """Undecided positions; the last token of a mock-AR row may be the mask id, as any token of a prompt."""
        return (token_RS == self.mask_token_id) & ~self._mock_ar_RS

    def _propose(
        self, denoiser: DenoiserTower, hidden_TD: torch.Tensor, wanted: torch.Tensor, pass_index_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Proposal and confidence for every wanted position, in tiles of logits; elsewhere 0.

        ``wanted`` is bool [T], or the indices in T: int64 [N].
        """
        shape = self._token_RS.shape
        proposal_RS = torch.zeros(shape, dtype=torch.int64, device=wanted.device)
        confidence_RS = torch.zeros(shape, dtype=torch.float32, device=wanted.device)
        for token_N, whole_canvases in self._tiles(wanted):
            tile = self._tile(token_N, pass_index_R)
            row_N, column_N = self.layout.row_T[token_N], tile.column_N
            wanted_N = wanted[token_N] if whole_canvases else None
            tile, token, confidence = self.proposals.propose(denoiser.logits(hidden_TD[token_N]), tile, wanted_N)
            if wanted_N is not None:
                row_N, column_N = row_N[wanted_N], column_N[wanted_N]
            proposal_RS[row_N, column_N] = token
            confidence_RS[row_N, column_N] = confidence
        return proposal_RS, confidence_RS

    def _tiles(self, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        """Token indices of each tile, and whether it is whole canvases (of requests whose logits are processed)."""
        if wanted.dtype == torch.int64:
            for token_N in wanted.split(LOGITS_TILE):
                yield token_N, False
            return
        processed = [self.proposals.is_processed(slot) for slot in self.rows.slots]
        if not any(processed):
            for token_N in wanted.nonzero().squeeze(1).split(LOGITS_TILE):
                yield token_N, False
            return
        processed_T = torch.tensor(processed, device=wanted.device)[self.layout.row_T]
        plain_T = wanted & ~processed_T
        if plain_T.any():
            for token_N in plain_T.nonzero().squeeze(1).split(LOGITS_TILE):
                yield token_N, False
        rows = torch.tensor([row for row, whole in enumerate(processed) if whole], device=wanted.device)
        for row_N in rows.split(LOGITS_TILE // MAX_CANVAS_LENGTH):
            yield torch.isin(self.layout.row_T, row_N).nonzero().squeeze(1), True

    def _tile(self, token_N: torch.Tensor, pass_index_R: torch.Tensor) -> Tile:
        row_N, column_N = self.layout.row_T[token_N], self.layout.column_T[token_N]
        rows = self.rows
        # a canvas position is about its own token, a mock-AR row about the next one
        position_N = self.first_position_R[row_N] + column_N + self._mock_ar_RS[row_N, column_N]
        return Tile(
            slots_np=np.array(rows.slots, dtype=np.int64),
            seq_lens_np=self.seq_lens_np,
            slot_N=rows.slot_R[row_N],
            column_N=column_N,
            position_N=position_N,
            token_N=self._token_RS[row_N, column_N],
            pass_index_N=pass_index_R[row_N],
            temperature_N=rows.temperature_R[row_N],
            seed_N=rows.seed_R[row_N],
            any_random=rows.any_random,
        )
