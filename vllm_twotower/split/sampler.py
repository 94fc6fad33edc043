"""Sampling with the towers on different ranks: each tower's ranks know what theirs has decided, and all have to."""

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_twotower.runtime.sampler import CanvasSampler
from vllm_twotower.runtime.step import Step
from vllm_twotower.split.link import TowerLink


class SplitCanvasSampler(CanvasSampler):
    """The canvas sampler of one rank; ``link`` goes to the others."""

    def __init__(self, *args: Any, link: TowerLink, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.link = link

    def sample_ar_rows(self, step: Step, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        """The context tower's tokens, on every rank."""
        if not step.is_real:
            return super().sample_ar_rows(step, logits, batch)
        if self.link.placement.has_context:
            output = super().sample_ar_rows(step, logits, batch)
            samples = torch.stack([output.sampled_token_ids[:, 0], output.num_sampled.to(torch.int64)], dim=1)
            self.link.share_samples(samples, batch.num_reqs)
            return output
        samples = self.link.share_samples(None, batch.num_reqs)
        num_sampled = samples[:, 1].to(torch.int32)
        return SamplerOutput(samples[:, :1], None, None, num_sampled, torch.zeros_like(num_sampled))

    def take_logprobs(self, step: Step, emitted: list[int]) -> LogprobsTensors | None:
        """The denoiser's, on every rank."""
        logprobs = super().take_logprobs(step, emitted)
        if not any(emitted) or not self.proposals.logprobs.wanted(np.array(step.slots)):
            return logprobs
        shared = self.link.share_object(_move(logprobs, torch.device("cpu")))
        return _move(shared, self.link.device)


def _move(logprobs: LogprobsTensors | None, device: torch.device) -> LogprobsTensors | None:
    if logprobs is None:
        return None
    return LogprobsTensors(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in logprobs))
