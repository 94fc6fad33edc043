"""Sampling with the towers on different ranks: each tower's ranks know what theirs has decided, and all have to."""

from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_twotower.runtime.sampler import CanvasSampler
from vllm_twotower.runtime.step import Step, VerifyRows
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
        num_logits = int(batch.cu_num_logits_np[batch.num_reqs])
        shape = (num_logits + batch.num_reqs,)
        if self.link.placement.has_context:
            output = super().sample_ar_rows(step, logits, batch)
            samples = torch.cat([output.sampled_token_ids[:, 0], output.num_sampled.to(torch.int64)])
            self.link.share_samples(samples, shape)
            return output
        token_N, num_sampled_R = self.link.share_samples(None, shape).split([num_logits, batch.num_reqs])
        num_sampled = num_sampled_R.to(torch.int32)
        return SamplerOutput(token_N[:, None], None, None, num_sampled, torch.zeros_like(num_sampled))

    def find_hints(
        self, logits: torch.Tensor, accepted: SamplerOutput, verify: VerifyRows, batch: InputBatch
    ) -> torch.Tensor:
        """Found on the context tower's ranks, on every rank."""
        hint_FS = super().find_hints(logits, accepted, verify, batch) if self.link.placement.has_context else None
        num_rows, num_drafts = verify.draft_FS.shape
        return self.link.share_samples(hint_FS, (num_rows, num_drafts + 1))

    def take_logprobs(self, step: Step, emitted: list[int]) -> LogprobsTensors | None:
        """The denoiser's, on every rank."""
        logprobs = super().take_logprobs(step, emitted)
        if not any(emitted) or not self.proposals.logprobs.is_wanted(step.slots_np):
            return logprobs
        shared = self.link.share_object(_move(logprobs, torch.device("cpu")))
        return _move(shared, self.link.device)


def _move(logprobs: LogprobsTensors | None, device: torch.device) -> LogprobsTensors | None:
    if logprobs is None:
        return None
    return LogprobsTensors(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in logprobs))
