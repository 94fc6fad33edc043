"""The worker's side of a step: which tower it runs, what it needs, and what of the runner's bookkeeping it skips.

The runner builds positions, slots and sequence lengths for a canvas by itself, because the scheduler gave it S tokens
past the end of the request. What is left: attention metadata that is not causal, and no Mamba bookkeeping, since a
denoise step advances no state.
"""

import functools
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_twotower import compat
from vllm_twotower.config import EngineOptions, RequestOptions, mask_token_id_of
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.models.denoiser_tower import CanvasLayout
from vllm_twotower.runtime import denoise_graphs
from vllm_twotower.runtime.canvas_table import CanvasTable, request_seed
from vllm_twotower.runtime.denoise_graphs import (
    CAPTURABLE_BACKENDS,
    CanvasPlaces,
    DenoiseGraphs,
    can_capture,
)
from vllm_twotower.runtime.denoise_step import DenoiseStep
from vllm_twotower.runtime.proposals import ProposalSampler
from vllm_twotower.runtime.stats import DiffusionStats
from vllm_twotower.runtime.trace import CanvasTrace
from vllm_twotower.split.link import ContextStep, TowerLink

logger = init_logger("vllm.twotower")


class TwoTowerModelState(MambaHybridModelState):
    """vLLM's hybrid model state, and the denoise step beside it."""

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        options = model.options
        assert isinstance(options, EngineOptions), "this state is used with diffusion on only"
        self.options = options
        self.mask_token_id = mask_token_id_of(self.model_config.hf_config)
        self.canvases = CanvasTable(self.max_num_reqs, options.canvas_length, self.mask_token_id, device)
        self.request_options: dict[str, RequestOptions] = {}
        self.reads_are_free = device.type == "cpu"
        """Whether reading a result costs nothing, so that a step may look at every pass (``denoise_step.py``)."""
        self.stats = DiffusionStats()
        self.trace: CanvasTrace | None = None
        self.step: DenoiseStep | None = None
        self.proposals: ProposalSampler | None = None
        self.graphs: DenoiseGraphs | None = None
        self._places: CanvasPlaces | None = None
        self._mamba_slots: dict[str, torch.Tensor] = {}
        self.link: TowerLink | None = None
        if model.placement.is_split:
            self.link = TowerLink(model.placement, model.model.layers, self.model_config.dtype, device)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take over a request's settings; called again after a preemption, whose canvas starts over."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if params is None or compat.is_warmup_request(new_req_data.req_id):
            return
        options = RequestOptions.from_extra_args(params.extra_args, self.options)
        self.request_options[new_req_data.req_id] = options
        seed = request_seed(new_req_data.req_id, params.seed, self.model_config.seed)
        self.canvases.add_request(req_index, options, params.temperature, seed)

    def start_trace(self) -> None:
        """Record denoise passes from now on."""
        assert self.proposals is not None, "the sampler is there once the engine has started"
        self.trace = self.proposals.trace = CanvasTrace(self.mask_token_id)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted."""
        super().remove_request(req_id)
        self.request_options.pop(req_id, None)

    def step_kind(self, batch: InputBatch) -> StepKind:
        """Which tower a batch runs, from the modes of its requests; dummy and warm-up batches run the context
        tower."""
        rows = [self._is_denoise_row(batch, row) for row in range(batch.num_reqs)]
        assert all(rows) or not any(rows), "an engine step runs one tower"
        return StepKind.DENOISE if rows[0] else StepKind.CONTEXT

    def _is_denoise_row(self, batch: InputBatch, row: int) -> bool:
        options = self.request_options.get(batch.req_ids[row])
        if options is None or options.mode is Mode.AR:
            return False
        # prefill_len is the request's length here: it grows with every emission
        computed, length = int(batch.num_computed_tokens_np[row]), int(batch.prefill_len_np[row])
        if options.mode is Mode.MOCK_AR:
            return computed == length - 1
        if computed < length:
            return False
        width = min(options.canvas_length, self.max_model_len - computed)
        assert int(batch.num_scheduled_tokens[row]) == width, "a canvas is scheduled whole"
        return True

    # ---- the runner's hooks, in the order of a step
    # --------------------------------------------------------------------

    def preprocess_state(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> None:
        """Mamba states move across block boundaries in context steps only."""
        if self.step_kind(input_batch) is StepKind.CONTEXT:
            super().preprocess_state(input_batch, *args, **kwargs)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Metadata of the step; in a denoise step not causal, for attention layers only."""
        if self.step_kind(input_batch) is StepKind.CONTEXT:
            if self.link is not None:
                self._mamba_slots = self._slots_to_denoise_from(input_batch, block_tables, kv_cache_config)
            return super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, *args, **kwargs
            )
        assert cudagraph_mode != CUDAGraphMode.FULL, "no graph of the context tower may replay in a denoise step"
        computed = input_batch.num_computed_tokens_np[: input_batch.num_reqs]
        self._mamba_slots = self._state_slots(np.arange(input_batch.num_reqs), computed, block_tables, kv_cache_config)
        num_reqs = input_batch.num_reqs
        self._places = CanvasPlaces(input_batch.seq_lens, block_tables, slot_mappings, self._mamba_slots)
        seq_lens_upper_bound = input_batch.seq_lens_cpu_upper_bound
        return build_attn_metadata(
            attn_groups=[[g for g in gs if not isinstance(g.kv_cache_spec, MambaSpec)] for gs in attn_groups],
            num_reqs=num_reqs,
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=input_batch.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1]),
            max_query_len=int(input_batch.num_scheduled_tokens.max()),
            seq_lens=input_batch.seq_lens,
            max_seq_len=int(seq_lens_upper_bound[:num_reqs].max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_upper_bound,
            positions=input_batch.positions,
            causal=False,
        )

    def _slots_to_denoise_from(
        self, batch: InputBatch, block_tables: tuple[torch.Tensor, ...], kv_cache_config: KVCacheConfig
    ) -> dict[str, torch.Tensor]:
        """Where this context step leaves the states that denoise steps will start from, by layer name."""
        num_reqs = batch.num_reqs
        computed = batch.num_computed_tokens_np[:num_reqs] + batch.num_scheduled_tokens[:num_reqs]
        options = [self.request_options.get(req_id) for req_id in batch.req_ids]
        # a mock-AR row is denoised one token before its end; a prompt chunk that is not the last leaves nothing to read
        lag = np.array([o is not None and o.mode is Mode.MOCK_AR for o in options], dtype=np.int64)
        denoised = np.array([o is not None and o.mode is not Mode.AR for o in options])
        rows = np.flatnonzero(denoised & (computed >= batch.prefill_len_np[:num_reqs] - lag))
        return self._state_slots(rows, computed[rows], block_tables, kv_cache_config)

    def _state_slots(
        self,
        rows: np.ndarray,
        computed: np.ndarray,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, torch.Tensor]:
        """Where the Mamba states of some rows lie after ``computed`` tokens, by layer name; int64 [R].

        Not where a denoise step's own Mamba metadata points: in ``align`` mode that is the block of the canvas's end.
        """
        block_size = self.cache_config.mamba_block_size
        column = (computed - 1) // block_size if self._align_mode else np.zeros_like(computed)
        row_R = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        column_R = torch.from_numpy(column.astype(np.int64)).to(self.device)
        slots: dict[str, torch.Tensor] = {}
        for table, group in zip(block_tables, kv_cache_config.kv_cache_groups, strict=True):
            if isinstance(group.kv_cache_spec, MambaSpec):
                slots.update(dict.fromkeys(group.layer_names, table[row_R, column_R].to(torch.int64)))
        return slots

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The model's extra inputs: the denoise step in a denoise step, what crosses in a context step of split
        towers."""
        inputs = super().prepare_inputs(input_batch, req_states)
        self.step = None
        if self.step_kind(input_batch) is StepKind.DENOISE:
            self.step = inputs["denoise_step"] = self._denoise_step(input_batch)
        elif self.link is not None:
            num_tokens = int(input_batch.num_scheduled_tokens[: input_batch.num_reqs].sum())
            inputs["context_step"] = ContextStep(self.link, num_tokens, self._mamba_slots)
        return inputs

    def _denoise_step(self, batch: InputBatch) -> DenoiseStep:
        num_reqs = batch.num_reqs
        widths = [int(n) for n in batch.num_scheduled_tokens[:num_reqs]]
        slots = [int(i) for i in batch.idx_mapping_np[:num_reqs]]
        rows = self.canvases.gather(slots, widths, batch.idx_mapping[:num_reqs])
        mock_ar = [self.request_options[req_id].mode is Mode.MOCK_AR for req_id in batch.req_ids]
        mock_ar_R = None
        if any(mock_ar):
            mock_ar_R = torch.tensor(mock_ar, device=self.device)
            last_token_R = batch.input_ids[batch.query_start_loc[:num_reqs]].to(torch.int64)
            rows.token_RS[:, 0] = torch.where(mock_ar_R, last_token_R, rows.token_RS[:, 0])
        layout = CanvasLayout.from_widths(widths, self.device, unmodulated_R=mock_ar_R, mamba_slots=self._mamba_slots)
        start_pass = None
        if self.trace is not None:
            start_pass = functools.partial(self.trace.start_pass, batch.req_ids, slots, widths)
        graph = None
        if self.graphs is not None and not any(mock_ar):  # a captured pass modulates every row
            assert self._places is not None, "the runner prepares attention before inputs"
            graph = self.graphs.load(widths, self._places)
        assert self.proposals is not None, "the sampler is there before the first request"
        return DenoiseStep(
            rows,
            layout,
            widths,
            batch.num_computed_tokens_np[:num_reqs].astype(np.int64),
            self.proposals,
            1 if all(mock_ar) else self.options.passes_per_step,
            self.mask_token_id,
            reads_between_passes=self.reads_are_free or self.trace is not None or self.proposals.follows_reveals(slots),
            start_pass=start_pass,
            link=self.link,
            graph=graph,
        )

    # ---- start-up ----------------------------------------------------------------------------------------------------

    def capture_inner_cudagraphs(
        self,
        input_buffers: Any,
        block_tables: BlockTables,
        attn_groups: list[list[Any]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture denoise passes; vLLM asks after its own captures, and once before to measure the memory."""
        if self.model.denoiser is None:
            return
        if not can_capture(attn_groups):
            logger.warning_once("Denoise passes run without CUDA graphs: only %s can be captured", CAPTURABLE_BACKENDS)
            return
        self.graphs = DenoiseGraphs(
            self.vllm_config,
            self.model.denoiser,
            self.model.model.layers,
            self.options.canvas_length,
            attn_groups,
            kv_cache_config,
            block_tables.input_block_tables,
            self.device,
        )
        with denoise_graphs.capturing(self.device):
            self.graphs.capture(denoise_graphs.record_cuda_graph)

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """Nothing was advanced by a denoise step."""
        if self.step is None:
            super().postprocess_state(*args, **kwargs)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """Put the canvas sampler around vLLM's."""
        from vllm_twotower.runtime.sampler import CanvasSampler

        self.proposals = ProposalSampler(sampler, self.mask_token_id)
        return CanvasSampler(sampler, self), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """No full CUDA graphs: they are chosen by shape alone, and a canvas can have the shape of a decode step.

        vLLM asks whenever it sets up caches: graphs of passes over earlier ones, such as the memory measurement's, go.
        """
        self.graphs = None
        return AttentionCGSupport.NEVER, type(self).__name__
