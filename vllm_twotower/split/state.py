"""A worker's step with the towers on different ranks: what a context forward has written crosses to the denoiser's."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_twotower.core import Mode, StepKind
from vllm_twotower.runtime.model_state import TwoTowerModelState
from vllm_twotower.runtime.step import Step
from vllm_twotower.split.denoise_loop import SplitDenoiseLoop
from vllm_twotower.split.link import ContextHandover, TowerLink
from vllm_twotower.split.sampler import SplitCanvasSampler


class SplitModelState(TwoTowerModelState):
    """The model state of one rank of either tower."""

    def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.link = TowerLink(model.placement, model.model.layers, self.model_config.dtype, device)
        self.make_loop = functools.partial(SplitDenoiseLoop, link=self.link)
        self.make_sampler = functools.partial(SplitCanvasSampler, link=self.link)

    def find_seeds(self, step: Step, batch: InputBatch) -> tuple[Sequence[int], np.ndarray] | None:
        """As the base class's; of a context step those states that it leaves for denoise steps, which cross."""
        if step.kind is StepKind.CONTEXT:
            return _find_rows_to_denoise_next(step, batch)
        return super().find_seeds(step, batch)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """As the base class's; in a context step what has to cross after the forward."""
        inputs = super().prepare_inputs(input_batch, req_states)
        step = self.step_of(input_batch)
        if step.kind is StepKind.CONTEXT and step.places is not None:
            num_tokens = int(input_batch.num_scheduled_tokens[: input_batch.num_reqs].sum())
            inputs["handover"] = ContextHandover(
                link=self.link, num_tokens=num_tokens, mamba_slots=step.places.mamba_slots
            )
        return inputs


def _find_rows_to_denoise_next(step: Step, batch: InputBatch) -> tuple[list[int], np.ndarray]:
    """Rows from whose states denoise steps will start after this context step, and their computed tokens by then.

    A chunk of a prompt that is not the last leaves nothing to read.
    """
    computed_np = step.computed_np + batch.num_scheduled_tokens[: batch.num_reqs]
    rows = [
        row
        for row, options in enumerate(step.options)
        if options is not None
        and options.mode is not Mode.AR
        and computed_np[row] >= batch.prefill_len_np[row] - options.context_lag
    ]
    return rows, computed_np[rows]
