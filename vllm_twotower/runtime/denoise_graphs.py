"""A denoise pass as a CUDA graph: one graph per number of rows, over buffers that never move.

A pass is hundreds of small kernels over 16 tokens per row, so at small batches launching them takes longer than running
them. What a pass reads that changes from step to step (where the canvases' keys, values and Mamba states are) is copied
into the buffers once per step; tokens and noise levels once per pass. Rows up to the captured number are padding: no
query tokens, no slot to write to, the null block's state to read.

Captured at start-up, through the hook vLLM has for graphs that run inside a model's forward, for the batch sizes of its
own ``cudagraph_capture_sizes`` up to 1,024 tokens. Whatever has another shape runs layer by layer: a last short canvas,
mock-AR rows, more rows than were captured. No GPU has run this yet (``docs/limits.md``); on a CPU the tests run the
same buffers with a recorder that repeats the pass instead of replaying it.

Legend: R rows, P rows of the buffers, S canvas length, T = R S tokens, D hidden.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower import compat
from vllm_twotower.models.denoiser_tower import DenoiserTower
from vllm_twotower.runtime.host_copies import async_tensor_h2d
from vllm_twotower.runtime.step import CanvasLayout, CanvasPlaces

Replay = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""One denoise pass: canvases int64 [R, S] and noise levels int64 [R] (``DenoiserTower.forward``) to final hidden states
[T, D], which the next pass overwrites."""

MOST_CAPTURED_TOKENS = 1024
"""Of one pass; more keep a GPU busy for longer than their launches take."""

MOST_SPLIT_ROWS = 128
"""Rows times FlashAttention's splits of a row's keys."""

CAPTURABLE_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
"""Attention backends whose kernels read lengths and block tables on the device, and plan nothing on the host.

FlashInfer plans: every step has new tensors and a new division of the work, and a graph would keep the capture's."""


def select_attention(attn_groups: list[list[AttentionGroup]]) -> list[list[AttentionGroup]]:
    """The groups of attention layers: a canvas has no metadata for Mamba layers, whose states it only reads."""
    return [[g for g in groups if not isinstance(g.kv_cache_spec, MambaSpec)] for groups in attn_groups]


def build_canvas_metadata(attn_groups: list[list[AttentionGroup]], **lengths: Any) -> dict[str, Any]:
    """vLLM's attention metadata by layer name, not causal; ``lengths`` is the rest of what it is built from."""
    return build_attn_metadata(attn_groups=select_attention(attn_groups), causal=False, **lengths)


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    hidden_TD: torch.Tensor
    replay: Callable[[], None]
    run: Callable[[], None]
    """What was recorded: a graph holds addresses only, and this keeps the tensors there alive."""


class DenoiseGraphs:
    """The captured passes of one worker and the buffers they read.

    Args:
        vllm_config: of the engine.
        denoiser: the tower.
        context_layers: the context tower's layers, whose caches it reads.
        canvas_length: S.
        attn_groups: of this worker.
        kv_cache_config: vLLM's.
        block_tables: per KV cache group, a table of the width that steps bring.
        device: of all of it.

    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        denoiser: DenoiserTower,
        context_layers: nn.ModuleList,
        canvas_length: int,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        block_tables: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self.vllm_config, self.denoiser, self.context_layers = vllm_config, denoiser, context_layers
        self.canvas_length, self.kv_cache_config, self.device = canvas_length, kv_cache_config, device
        self.attn_groups = attn_groups
        self.row_counts = list_row_counts(vllm_config, canvas_length)
        most = max(self.row_counts, default=0)
        self.token_PS = torch.zeros(most, canvas_length, dtype=torch.int64, device=device)
        self.level_P = torch.zeros(most, dtype=torch.int64, device=device)
        self.query_start_loc = torch.zeros(most + 1, dtype=torch.int32, device=device)
        self.seq_lens_P = torch.zeros(most, dtype=torch.int32, device=device)
        self.block_tables = tuple(table.new_zeros(most, table.shape[1]) for table in block_tables)
        self.slot_mappings_GT = torch.full(
            (len(block_tables), most * canvas_length), PAD_SLOT_ID, dtype=torch.int64, device=device
        )
        self.is_padding_T = torch.zeros(most * canvas_length, dtype=torch.bool, device=device)
        self.mamba_groups = [
            (group.layer_names, torch.zeros_like(self.level_P))
            for group in kv_cache_config.kv_cache_groups
            if isinstance(group.kv_cache_spec, MambaSpec)
        ]
        self._recorded: dict[int, _Recorded] = {}

    def capture(self) -> None:
        """Record a pass for every number of rows, largest first: the smaller ones fit into its memory."""
        with graph_capture(self.device):
            for num_rows in sorted(self.row_counts, reverse=True):
                self._recorded[num_rows] = self._capture_pass(num_rows)

    def _capture_pass(self, num_rows: int) -> _Recorded:
        self._fill_with_dummies(num_rows)
        num_tokens = num_rows * self.canvas_length
        hidden_TD = torch.zeros(
            num_tokens,
            self.denoiser.norm_f.weight.shape[0],
            dtype=self.vllm_config.model_config.dtype,
            device=self.device,
        )
        slots = {name: slots_P[:num_rows] for names, slots_P in self.mamba_groups for name in names}
        layout = CanvasLayout.from_widths(
            [self.canvas_length] * num_rows,
            self.device,
            mamba_slots=slots,
            is_padding_T=self.is_padding_T[:num_tokens],
        )
        tokens, levels = self.token_PS.view(-1)[:num_tokens], self.level_P[:num_rows]
        run = functools.partial(self._run_pass, hidden_TD, tokens, levels, layout)
        replay = record_cuda_graph(functools.partial(self._forward_context, num_rows), run)
        return _Recorded(hidden_TD=hidden_TD, replay=replay, run=run)

    def _run_pass(
        self, out_TD: torch.Tensor, token_T: torch.Tensor, level_R: torch.Tensor, layout: CanvasLayout
    ) -> None:
        out_TD.copy_(self.denoiser(token_T, level_R, layout, self.context_layers))

    def load(self, widths: Sequence[int], places: CanvasPlaces) -> Replay | None:
        """A captured pass with a step's rows in its buffers; None where none has their shape."""
        num_rows = len(widths)
        captured = min((n for n in self._recorded if n >= num_rows), default=None)
        if captured is None or any(width != self.canvas_length for width in widths):
            return None
        num_tokens = num_rows * self.canvas_length
        ends = [min(row, num_rows) * self.canvas_length for row in range(captured + 1)]
        async_tensor_h2d(ends, out=self.query_start_loc[: captured + 1])
        self._copy_padded(self.seq_lens_P, places.seq_lens_R[:num_rows], captured, 0)
        for table, rows in zip(self.block_tables, places.block_tables, strict=True):
            self._copy_padded(table, rows[:num_rows], captured, 0)
        for slots, step in zip(self.slot_mappings_GT, places.slot_mappings_GT, strict=True):
            self._copy_padded(slots, step[:num_tokens], captured * self.canvas_length, PAD_SLOT_ID)
        self.is_padding_T[:num_tokens] = False
        self.is_padding_T[num_tokens:] = True
        for names, slots_P in self.mamba_groups:
            self._copy_padded(slots_P, places.mamba_slots[names[0]], captured, 0)
        return functools.partial(self._replay, self._recorded[captured])

    def _replay(self, recorded: _Recorded, token_RS: torch.Tensor, level_R: torch.Tensor) -> torch.Tensor:
        self.token_PS[: len(token_RS)] = token_RS
        self.level_P[: len(level_R)] = level_R
        recorded.replay()
        return recorded.hidden_TD[: token_RS.numel()]

    @staticmethod
    def _copy_padded(buffer: torch.Tensor, values: torch.Tensor, length: int, padding: int) -> None:
        buffer[: len(values)] = values
        buffer[len(values) : length] = padding

    def _fill_with_dummies(self, num_rows: int) -> None:
        """Rows of one canvas each, in the null block, writing nowhere."""
        step = torch.arange(num_rows + 1, dtype=torch.int32, device=self.device)
        self.query_start_loc[: num_rows + 1] = step * self.canvas_length
        self.seq_lens_P[:num_rows] = self.canvas_length
        self.slot_mappings_GT.fill_(PAD_SLOT_ID)

    @contextmanager
    def _forward_context(self, num_rows: int) -> Iterator[None]:
        """vLLM's forward context of a pass over the buffers, not causal, for lengths up to the longest allowed."""
        num_tokens = num_rows * self.canvas_length
        slot_mappings = self.slot_mappings_GT[:, :num_tokens]
        longest = self.vllm_config.model_config.max_model_len
        metadata = build_canvas_metadata(
            self.attn_groups,
            num_reqs=num_rows,
            num_tokens=num_tokens,
            query_start_loc_gpu=self.query_start_loc[: num_rows + 1],
            query_start_loc_cpu=self.query_start_loc[: num_rows + 1].cpu(),
            max_query_len=self.canvas_length,
            seq_lens=self.seq_lens_P[:num_rows],
            max_seq_len=longest,
            block_tables=tuple(table[:num_rows] for table in self.block_tables),
            slot_mappings=slot_mappings,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full((num_rows,), longest, dtype=torch.int32),
        )
        most_splits = self.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        # a split's workspace grows with the rows, and many rows fill a GPU without splits
        compat.drop_attention_plans(metadata, min(most_splits, max(1, MOST_SPLIT_ROWS // num_rows)))
        by_layer = build_slot_mappings_by_layer(slot_mappings, self.kv_cache_config)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            slot_mapping=by_layer,
            is_padding=self.is_padding_T[:num_tokens],
        ):
            yield


def list_row_counts(vllm_config: VllmConfig, canvas_length: int) -> list[int]:
    """Numbers of rows to capture: vLLM's sizes for decode steps, where a row is one token."""
    scheduler = vllm_config.scheduler_config
    tokens = min(MOST_CAPTURED_TOKENS, scheduler.max_num_batched_tokens)
    most = min(scheduler.max_num_seqs, tokens // canvas_length)
    return sorted(n for n in vllm_config.compilation_config.cudagraph_capture_sizes or [] if n <= most)


def find_uncapturable(attn_groups: list[list[AttentionGroup]]) -> list[str]:
    """Names of the attention backends of which no graph can be replayed."""
    groups = itertools.chain.from_iterable(select_attention(attn_groups))
    return sorted({group.backend.get_name() for group in groups} - set(CAPTURABLE_BACKENDS))


def record_cuda_graph(
    context: Callable[[], AbstractContextManager[None]], run: Callable[[], None]
) -> Callable[[], None]:
    """Run once, for whatever kernels and layers set up on first use, then capture."""
    with context():
        run()
    graph = torch.cuda.CUDAGraph()
    pool = current_platform.get_global_graph_pool()
    with context(), torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return graph.replay
