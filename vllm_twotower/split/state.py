"""A worker's step with the towers on different ranks: what a context forward has written crosses to the denoiser's."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_twotower.core import Mode, StepKind
from vllm_twotower.runtime.model_state import TwoTowerModelState
from vllm_twotower.runtime.step import Step
from vllm_twotower.runtime.verification import replay_states
from vllm_twotower.split.denoise_loop import SplitDenoiseLoop
from vllm_twotower.split.link import ContextHandover, TowerLink
from vllm_twotower.split.sampler import SplitCanvasSampler


class SplitModelState(TwoTowerModelState):
    """The model state of one rank of either tower."""

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.link = TowerLink(model.placement, model.model.layers, self.model_config.dtype, device)
        self.make_loop = functools.partial(SplitDenoiseLoop, link=self.link)
        self._mirrored: set[int] = set()  # request slots whose Mamba states the denoiser's ranks have
        self.make_sampler = functools.partial(SplitCanvasSampler, link=self.link)

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
        step = self.step_of(input_batch)
        if step.kind is StepKind.CONTEXT:
            verifying = step.verify.rows if step.verify is not None else []
            mirrored = [row for row, slot in enumerate(step.slots) if slot in self._mirrored]
            if rows := [row for row in mirrored if row not in verifying]:
                step.carried = self.place_kept_rows(rows, step, input_batch, block_tables, kv_cache_config)

    def find_seeds(self, step: Step, batch: InputBatch) -> tuple[Sequence[int], np.ndarray] | None:
        """As the base class's; of a context step those states that cross whole."""
        if step.kind is StepKind.CONTEXT:
            computed_np = step.computed_np + batch.num_scheduled_tokens[: batch.num_reqs]
            rows = [r for r in _find_rows_to_denoise_next(step, batch) if step.slots[r] not in self._mirrored]
            return rows, computed_np[rows]
        return super().find_seeds(step, batch)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """As the base class's; in a context step what has to cross after the forward."""
        inputs = super().prepare_inputs(input_batch, req_states)
        step = self.step_of(input_batch)
        if step.kind is StepKind.CONTEXT and step.places is not None:
            inputs["handover"] = ContextHandover(
                link=self.link,
                num_tokens=sum(step.widths),
                mamba_slots=step.places.mamba_slots,
                kept_rows=list(filter(None, (step.verify, step.carried))),
            )
            self._mirrored.update(step.slots[row] for row in _find_rows_to_denoise_next(step, input_batch))
        return inputs

    def postprocess_state(self, *args: Any, **kwargs: Any) -> None:
        """As the base class's; the denoiser's ranks advance what the context tower's have advanced."""
        step = self.last_step
        if step is not None and step.carried is not None and not self.model.holds_context:
            replay_states(self.model.model.layers, step.carried, step.carried.width_V)
        super().postprocess_state(*args, **kwargs)


def _find_rows_to_denoise_next(step: Step, batch: InputBatch) -> list[int]:
    """Rows from whose states denoise steps may start after this context step.

    A chunk of a prompt that is not the last leaves nothing to read.
    """
    computed_np = step.computed_np + batch.num_scheduled_tokens[: batch.num_reqs]
    return [
        row
        for row, options in enumerate(step.options)
        if options is not None
        and options.mode is not Mode.AR
        and computed_np[row] >= batch.prefill_len_np[row] - options.context_lag
    ]
