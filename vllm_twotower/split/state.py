"""A worker's step with the towers on different ranks: what a context forward has written crosses to the denoiser's."""

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_twotower.core import StepKind
from vllm_twotower.runtime.denoise_loop import DenoiseLoop
from vllm_twotower.runtime.model_state import TwoTowerModelState
from vllm_twotower.runtime.step import Step
from vllm_twotower.runtime.verification import replay_states
from vllm_twotower.split.denoise_loop import SplitDenoiseLoop
from vllm_twotower.split.link import ContextHandover, TowerLink
from vllm_twotower.split.model import SplitTwoTowerForCausalLM
from vllm_twotower.split.sampler import SplitCanvasSampler


@dataclasses.dataclass(kw_only=True)
class SplitStep(Step):
    """One engine step of a worker; ``kept`` holds rows too whose states the denoiser's ranks advance by themselves."""

    handover: ContextHandover | None = None
    """Of a context step, what has to cross after its forward."""


class SplitModelState(TwoTowerModelState):
    """The model state of one rank of either tower."""

    model: SplitTwoTowerForCausalLM
    step_type: ClassVar[type[Step]] = SplitStep

    def __init__(
        self, vllm_config: VllmConfig, model: SplitTwoTowerForCausalLM, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.link = TowerLink(model.placement, model.model.layers, self.model_config.dtype, device)
        self._mirrored: set[int] = set()  # request slots whose Mamba states the denoiser's ranks have

    def make_loop(self, **parts: Any) -> DenoiseLoop:
        """As the base class's, with the link; the context tower's ranks wait there for the others."""
        if self.model.denoiser is not None:
            self.log_kernels(self.model.denoiser)
        return SplitDenoiseLoop(denoiser=self.model.denoiser, link=self.link, **parts)

    def make_sampler(self, base: Sampler, **parts: Any) -> SplitCanvasSampler:
        """As the base class's, with the link."""
        return SplitCanvasSampler(base, link=self.link, **parts)

    def report_traffic(self) -> dict[str, int]:
        """What this rank has sent to the other tower's, by the names of ``Traffic``."""
        return dataclasses.asdict(self.link.traffic)

    def capture_inner_cudagraphs(self, *args: Any, **kwargs: Any) -> None:
        """As the base class's, on the ranks that run passes."""
        if self.model.holds_denoiser:
            super().capture_inner_cudagraphs(*args, **kwargs)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """As the base class's; the denoiser's ranks have no states of it yet."""
        super().add_request(req_index, new_req_data)
        self._mirrored.discard(req_index)

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        *args: Any,
    ) -> None:
        """As the base class's; of rows whose states the denoiser's ranks have, the layers' inputs are kept."""
        super().preprocess_state(input_batch, block_tables, kv_cache_config, *args)
        step = self.find_step(input_batch)
        if step.kind is StepKind.CONTEXT:
            verifying = step.verify.rows if step.verify is not None else []
            mirrored = [row for row, slot in enumerate(step.slots) if slot in self._mirrored]
            if rows := [row for row in mirrored if row not in verifying]:
                step.kept.append(self.place_kept_rows(rows, step, input_batch, block_tables, kv_cache_config))

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the base class's; in a context step also where what has to cross lies."""
        step = self.find_step(input_batch)
        assert isinstance(step, SplitStep)
        if step.kind is StepKind.CONTEXT:
            to_denoise = _find_rows_to_denoise_next(step, input_batch)
            rows = [row for row in to_denoise if step.slots[row] not in self._mirrored]
            step.handover = ContextHandover(
                num_tokens=sum(step.widths),
                mamba_slots=self.find_mamba_slots(rows, step.ends_np[rows], block_tables, kv_cache_config),
                kept_rows=step.kept,
            )
            self._mirrored.update(step.slots[row] for row in rows)
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, *args, **kwargs
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """As the base class's; in a context step what has to cross after the forward, and the way."""
        inputs = super().prepare_inputs(input_batch, req_states)
        step = self.find_step(input_batch)
        assert isinstance(step, SplitStep)
        if step.handover is not None:
            do = self.link.hand_over if self.model.holds_context else self.link.take_over
            inputs["cross"] = functools.partial(do, step.handover)
        return inputs

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """As the base class's; the denoiser's ranks advance what the context tower's have advanced."""
        step = self.last_step
        if step is not None and self.model.holds_denoiser:
            for rows in step.kept:
                if rows is not step.verify:
                    replay_states(self.model.model.layers, rows, rows.width_F)
        super().postprocess_state(*args, **kwargs)


def _find_rows_to_denoise_next(step: Step, batch: InputBatch) -> list[int]:
    """Rows from whose states denoise steps may start after this context step.

    A chunk of a prompt that is not the last leaves nothing to read.
    """
    rows = zip(step.options, step.ends_np.tolist(), batch.prefill_len_np[: batch.num_reqs].tolist(), strict=True)
    return [row for row, (one, end, length) in enumerate(rows) if one is not None and one.is_denoisable(end, length)]
