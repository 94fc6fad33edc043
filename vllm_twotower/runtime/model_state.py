"""The worker's side of a step: which tower it runs, what it needs, and what of the runner's bookkeeping it skips.

The runner builds positions, slots and sequence lengths for a canvas by itself, because the scheduler gave it S tokens
past the end of the request. What is left: in a denoise step attention metadata that is not causal, and no Mamba
bookkeeping, since it advances no state; in a context step the drafts that it verifies, and Mamba states that end where
the accepted ones do.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_twotower import compat
from vllm_twotower.config import RequestOptions, read_mask_token_id
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.models.denoiser_tower import DenoiserTower
from vllm_twotower.models.kernel_names import describe_kernels
from vllm_twotower.models.mamba import list_mamba_mixers
from vllm_twotower.models.twotower import TwoTowerForCausalLM
from vllm_twotower.runtime.canvas_table import CanvasTable, resolve_seed
from vllm_twotower.runtime.denoise_graphs import (
    CAPTURABLE_BACKENDS,
    DenoiseGraphs,
    build_canvas_metadata,
    find_uncapturable,
)
from vllm_twotower.runtime.denoise_loop import DenoiseLoop
from vllm_twotower.runtime.host_copies import copy_together
from vllm_twotower.runtime.proposals import ProposalSampler
from vllm_twotower.runtime.sampler import CanvasSampler
from vllm_twotower.runtime.stats import DiffusionStats
from vllm_twotower.runtime.step import (
    CanvasLayout,
    CanvasPlaces,
    KeptRows,
    KnownTokens,
    Step,
    StepCanvases,
    VerifyRows,
)
from vllm_twotower.runtime.trace import CanvasTrace
from vllm_twotower.runtime.verification import ask_for_logits, keep_layer_inputs, mark_kept_rows, replay_states

logger = init_logger("vllm.twotower")


class TwoTowerModelState(MambaHybridModelState):
    """vLLM's hybrid model state, and the denoise step beside it."""

    model: TwoTowerForCausalLM
    step_type: ClassVar[type[Step]] = Step

    def __init__(
        self, vllm_config: VllmConfig, model: TwoTowerForCausalLM, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        options = model.options
        assert options is not None, "this state is used with diffusion on only"
        self.options = options
        self.mask_token_id = read_mask_token_id(self.model_config.hf_config)
        self.canvases = CanvasTable(self.max_num_reqs, options.canvas_length, self.mask_token_id, device)
        self.request_options: dict[str, RequestOptions] = {}
        self.stats = DiffusionStats()
        self.graphs: DenoiseGraphs | None = None
        self.trace: CanvasTrace | None = None
        """Records passes and verifications while it is there."""
        self._loop: DenoiseLoop | None = None
        # vLLM's hooks are called one after the other with the batch, but the last one without
        self._current: tuple[InputBatch, Step] | None = None

    @property
    def last_step(self) -> Step | None:
        """The step of the last batch."""
        return self._current[1] if self._current is not None else None

    @property
    def loop(self) -> DenoiseLoop:
        """Runs the denoise steps."""
        assert self._loop is not None, "vLLM asks for the sampler when it has loaded the model"
        return self._loop

    @property
    def last_sampled_tokens(self) -> torch.Tensor:
        """vLLM's, int64 [request slots, 1]: of requests in AR and self-speculation the newest token."""
        return self.loop.proposals.base.req_states.last_sampled_tokens

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Take over a request's settings; called again after a preemption, whose canvas starts over."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        if params is None or compat.is_warmup_request(new_req_data.req_id):
            return
        options = RequestOptions.from_extra_args(params.extra_args, self.options)
        self.request_options[new_req_data.req_id] = options
        seed = resolve_seed(new_req_data.req_id, params.seed, self.model_config.seed)
        self.canvases.add_request(req_index, options, params.temperature, seed)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted."""
        super().remove_request(req_id)
        self.request_options.pop(req_id, None)

    def find_step(self, batch: InputBatch) -> Step:
        """The step that a batch is; made once for each."""
        if self._current is None or self._current[0] is not batch:
            self._current = batch, self._make_step(batch)
        return self._current[1]

    def _make_step(self, batch: InputBatch) -> Step:
        num_reqs = batch.num_reqs
        computed_np = batch.num_computed_tokens_np[:num_reqs].astype(np.int64)
        options = [self.request_options.get(req_id) for req_id in batch.req_ids]
        slots, widths = batch.idx_mapping_np[:num_reqs].tolist(), batch.num_scheduled_tokens[:num_reqs].tolist()
        # of a denoised request its length: it grows with every emission; in self-speculation, where vLLM's sampler
        # chooses the tokens, its length when it started
        lengths = batch.prefill_len_np[:num_reqs].tolist()
        rows = zip(options, slots, widths, computed_np.tolist(), lengths, strict=True)
        denoised = [
            one is not None
            and one.is_denoisable(computed, length)
            and not (one.is_sampled and (width == 1 or self.canvases.has_draft(slot)))
            for one, slot, width, computed, length in rows
        ]
        assert all(denoised) or not any(denoised), "an engine step runs one tower"
        return self.step_type(
            kind=StepKind.DENOISE if denoised[0] else StepKind.CONTEXT,
            req_ids=batch.req_ids,
            options=options,
            slots=slots,
            widths=widths,
            computed_np=computed_np,
        )

    def preprocess_state(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> None:
        """Mamba states move across block boundaries in context steps only."""
        step = self.find_step(input_batch)
        if step.kind is StepKind.CONTEXT:
            super().preprocess_state(input_batch, *args, **kwargs)
            step.verify = self._begin_verification(step, input_batch, *args, **kwargs)
            step.kept = [step.verify] if step.verify is not None else []

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Metadata of the step; in a denoise step not causal, for attention layers only."""
        step = self.find_step(input_batch)
        if step.kind is StepKind.CONTEXT:
            metadata = super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, *args, **kwargs
            )
            return mark_kept_rows(step, metadata)
        assert cudagraph_mode != CUDAGraphMode.FULL, "no graph of the context tower may replay in a denoise step"
        num_reqs = input_batch.num_reqs
        places = CanvasPlaces(
            seq_lens_R=input_batch.seq_lens,
            block_tables=block_tables,
            slot_mappings_GT=slot_mappings,
            mamba_slots=self.find_mamba_slots(range(num_reqs), step.computed_np, block_tables, kv_cache_config),
        )
        step.canvases = self._lay_out_canvases(step, input_batch, places)
        seq_lens_upper_bound = input_batch.seq_lens_cpu_upper_bound
        return build_canvas_metadata(
            attn_groups,
            num_reqs=num_reqs,
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=input_batch.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1]),
            max_query_len=max(step.widths),
            seq_lens=input_batch.seq_lens,
            max_seq_len=int(seq_lens_upper_bound[:num_reqs].max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens_upper_bound,
            positions=input_batch.positions,
        )

    def _begin_verification(
        self,
        step: Step,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: torch.Tensor,
    ) -> VerifyRows | None:
        """The rows of a context step that hold drafts; their tokens go into the batch, and each asks for logits."""
        drafted = [row for row, slot in enumerate(step.slots) if self.canvases.has_draft(slot)]
        if not drafted:
            return None
        rows = [row for row in drafted if step.widths[row] > 1]
        self.canvases.drop_drafts([step.slots[row] for row in drafted if step.widths[row] == 1])
        if not rows:
            return None
        drafts_FS = self.canvases.take_drafts([step.slots[row] for row in rows])
        kept_rows = self.place_kept_rows(rows, step, batch, block_tables, kv_cache_config)
        verify = VerifyRows(**vars(kept_rows), draft_FS=drafts_FS)
        layout = verify.layout
        last_F = self.last_sampled_tokens[batch.idx_mapping[verify.row_F]].view(-1)
        canvas_FS = torch.cat([last_F[:, None], drafts_FS], dim=1)
        batch.input_ids[verify.token_U] = canvas_FS[layout.row_T, layout.column_T].to(batch.input_ids.dtype)
        ask_for_logits(batch, step, rows)
        return verify

    def place_kept_rows(
        self,
        rows: list[int],
        step: Step,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
    ) -> KeptRows:
        """Some rows of a context step, of which nothing is kept yet."""
        widths = [step.widths[row] for row in rows]
        # where the states are now: vLLM has moved those that would cross a block
        slots = self.find_mamba_slots(rows, step.ends_np[rows], block_tables, kv_cache_config)
        layout = CanvasLayout.from_widths(widths, self.device, mamba_slots=slots)
        row_F, width_F = copy_together(self.device, rows, widths)
        return KeptRows(
            rows=rows,
            row_F=row_F,
            layout=layout,
            token_U=batch.query_start_loc[row_F].long()[layout.row_T] + layout.column_T,
            width_F=width_F,
        )

    def find_mamba_slots(
        self,
        rows: Sequence[int],
        computed_np: np.ndarray,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, torch.Tensor]:
        """Where the Mamba states of some rows lie after ``computed_np`` tokens, by layer name; int64 [rows].

        Not where a denoise step's own Mamba metadata points: in ``align`` mode that is the block of the canvas's end.
        """
        block_size = self.cache_config.mamba_block_size
        column_np = (computed_np - 1) // block_size if self._align_mode else np.zeros_like(computed_np)
        row_R, column_R = copy_together(self.device, rows, column_np)
        slots: dict[str, torch.Tensor] = {}
        for table, group in zip(block_tables, kv_cache_config.kv_cache_groups, strict=True):
            if isinstance(group.kv_cache_spec, MambaSpec):
                slots.update(dict.fromkeys(group.layer_names, table[row_R, column_R].to(torch.int64)))
        return slots

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The model's extra inputs: in a denoise step what to run instead of the context tower."""
        inputs = super().prepare_inputs(input_batch, req_states)
        step = self.find_step(input_batch)
        if step.kind is StepKind.DENOISE:
            inputs["denoise"] = functools.partial(self._denoise, step)
        return inputs

    def _lay_out_canvases(self, step: Step, batch: InputBatch, places: CanvasPlaces) -> StepCanvases:
        slot_R = batch.idx_mapping[: batch.num_reqs]
        unmodulated_R = known = None
        if any(mode is not Mode.MASK_DIFFUSION for mode in step.modes):
            mock_ar = [mode is Mode.MOCK_AR for mode in step.modes]
            drafted = [mode is Mode.SELF_SPECULATION for mode in step.modes]
            mock_ar_R, drafted_R = copy_together(self.device, mock_ar, drafted, dtype=np.bool_)
            prompts_R = batch.input_ids[batch.query_start_loc[: batch.num_reqs]].to(torch.int64)
            last_token_R = torch.where(drafted_R, self.last_sampled_tokens[slot_R].view(-1), prompts_R)
            known = KnownTokens(token_R=last_token_R, mock_ar_R=mock_ar_R, drafted_R=drafted_R)
            unmodulated_R = mock_ar_R if any(mock_ar) else None
        layout = CanvasLayout.from_widths(
            step.widths, self.device, unmodulated_R=unmodulated_R, mamba_slots=places.mamba_slots
        )
        return StepCanvases(rows=self.canvases.gather(step, slot_R, known), layout=layout, places=places)

    def _denoise(self, step: Step) -> None:
        step.outcome = self.loop.run(step, self.graphs)

    def postprocess_state(
        self, idx_mapping: torch.Tensor, num_sampled: Any, num_computed_tokens: torch.Tensor | None = None
    ) -> None:
        """Nothing was advanced by a denoise step; verified rows get the states after what was accepted."""
        step = self.last_step
        if step is not None and step.kind is StepKind.DENOISE:
            return
        if step is not None and step.verify is not None:
            verify = step.verify
            replay_states(self.model.model.layers, verify, num_sampled[verify.row_F].to(torch.int64))
            num_sampled = num_sampled.clamp(max=1)
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)

    def custom_sampler(self, sampler: Sampler) -> tuple[CanvasSampler, None]:
        """Put the canvas sampler around vLLM's."""
        for mixer in list_mamba_mixers(self.model.model.layers):
            keep_layer_inputs(mixer)
        proposals = ProposalSampler(sampler, self.mask_token_id)
        self._loop = self.make_loop(
            context_layers=self.model.model.layers,
            proposals=proposals,
            passes_per_step=self.options.passes_per_step,
            reads_are_free=self.device.type == "cpu",
            find_trace=lambda: self.trace,
        )
        canvas_sampler = self.make_sampler(
            sampler,
            find_step=self.find_step,
            canvases=self.canvases,
            proposals=proposals,
            stats=self.stats,
            find_trace=lambda: self.trace,
        )
        return canvas_sampler, None

    def make_loop(self, **parts: Any) -> DenoiseLoop:
        """The loop, of its parts without the denoiser."""
        denoiser = self.model.denoiser
        assert denoiser is not None
        self.log_kernels(denoiser)
        return DenoiseLoop(denoiser=denoiser, **parts)

    def log_kernels(self, denoiser: DenoiserTower) -> None:
        """Say what the denoiser's passes run on."""
        logger.info("Denoise passes run on these kernels: %s", describe_kernels(denoiser, self.model.model.layers))

    def make_sampler(self, base: Sampler, **parts: Any) -> CanvasSampler:
        """The canvas sampler, of vLLM's and its other parts."""
        return CanvasSampler(base, **parts)

    def report_traffic(self) -> dict[str, int]:
        """What this rank has sent to the other tower's, by the names of ``split.link.Traffic``; nothing here."""
        return {}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """vLLM has set up caches, for its memory measurement or to stay: graphs of passes over earlier ones go."""
        self.graphs = None
        super().initialize_kv_cache(kv_cache_config, block_tables)

    def capture_inner_cudagraphs(
        self,
        input_buffers: Any,
        block_tables: BlockTables,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Capture denoise passes; vLLM asks after its own captures, and once before to measure the memory."""
        assert self.model.denoiser is not None
        if planning := find_uncapturable(attn_groups):
            logger.warning_once(
                "Denoise passes run without CUDA graphs: %s cannot be captured, --attention-backend %s can",
                ", ".join(planning),
                " or ".join(CAPTURABLE_BACKENDS),
            )
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
        self.graphs.capture()

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """No full CUDA graphs: they are chosen by shape alone, and a canvas can have the shape of a decode step."""
        return AttentionCGSupport.NEVER, type(self).__name__
