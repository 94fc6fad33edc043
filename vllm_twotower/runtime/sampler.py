"""The sampler of a two-tower engine: vLLM's own for AR rows, a report of finished canvases for denoise rows.

What it tells the runner, per row:

| row | ``num_sampled`` | ``num_rejected`` |
| --- | --- | --- |
| AR | vLLM's | vLLM's |
| denoised, context step | 0: the prompt or the commit emits nothing | 0 |
| denoised, denoise step | the canvas's width if finished, else 0 | the width: nothing was computed |
| broken: NaN logits | 0: the scheduler ends the request with an error | as above |

A mock-AR row is a finished canvas of width 1. Both counts of a denoise row are its scheduled width, never S: the
runner's token table ends at ``max_model_len``.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_twotower import compat
from vllm_twotower.core import Mode
from vllm_twotower.runtime.denoise_step import DenoiseOutcome


class CanvasSampler:
    """Wraps vLLM's sampler; everything but the call is its."""

    def __init__(self, base: Any, state: Any) -> None:
        self.base = base
        self.state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Take over a request's sampling parameters."""
        self.base.add_request(req_idx, sampling_params)
        self.state.proposals.add_request(req_idx, sampling_params)

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Sample or report one step."""
        step = self.state.step
        if step is None:
            return self._context_step(logits, input_batch)
        assert step.outcome is not None, "the model ran the step's passes"
        self.state.canvases.scatter(step.rows, step.outcome)
        return self._denoise_step(step.outcome, input_batch)

    def _context_step(self, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        options = [self.state.request_options.get(req_id) for req_id in batch.req_ids]
        is_diffusion = [o is not None and o.mode is not Mode.AR for o in options]
        if any(o is not None for o in options):  # not a dummy batch
            self._count_context_step(batch, is_diffusion)
        if not all(is_diffusion):
            output = self._sample(logits, batch, is_real=any(o is not None for o in options))
            if output.num_nans is None:
                output.num_nans = logits.isnan().sum(dim=-1, dtype=torch.int32)
            if any(is_diffusion):
                emits_nothing_R = torch.tensor(is_diffusion, device=output.num_sampled.device)
                output.num_sampled = output.num_sampled.masked_fill(emits_nothing_R, 0)
            return output
        zeros_R = torch.zeros(batch.num_reqs, dtype=torch.int32, device=logits.device)
        tokens_R1 = torch.zeros(batch.num_reqs, 1, dtype=torch.int64, device=logits.device)
        return SamplerOutput(tokens_R1, None, None, zeros_R, zeros_R.clone())

    def _sample(self, logits: torch.Tensor, batch: InputBatch, is_real: bool) -> SamplerOutput:
        """vLLM's own sampling; with the towers split, the context tower's tokens on every rank."""
        link = self.state.link
        if link is None or not is_real:
            return self.base(logits, batch)
        output, samples = None, None
        if link.placement.has_context:
            output = self.base(logits, batch)
            samples = torch.stack([output.sampled_token_ids[:, 0], output.num_sampled.to(torch.int64)], dim=1)
        samples = link.share_samples(samples, batch.num_reqs)
        if output is None:
            num_sampled = samples[:, 1].to(torch.int32)
            output = SamplerOutput(samples[:, :1], None, None, num_sampled, torch.zeros_like(num_sampled))
        return output

    def _count_context_step(self, batch: InputBatch, is_diffusion: list[bool]) -> None:
        prompt_len = self.base.req_states.prompt_len.np
        num_commits = sum(
            diffusion and int(computed) >= int(prompt_len[slot])
            for diffusion, computed, slot in zip(
                is_diffusion, batch.num_computed_tokens_np, batch.idx_mapping_np, strict=False
            )
        )
        self.state.stats.count_context_step(batch.num_reqs, num_commits)

    def _denoise_step(self, outcome: DenoiseOutcome, batch: InputBatch) -> SamplerOutput:
        num_reqs = batch.num_reqs
        widths = [int(n) for n in batch.num_scheduled_tokens[:num_reqs]]
        modes = [self.state.request_options[req_id].mode for req_id in batch.req_ids]
        self.state.stats.count_denoise_step(outcome, widths, modes.count(Mode.MOCK_AR))
        prefill_len = self.base.req_states.prefill_len
        emitted = []
        done = [finished and not broken for finished, broken in zip(outcome.finished, outcome.broken, strict=True)]
        for slot, width, finished in zip(batch.idx_mapping_np, widths, done, strict=False):
            emitted.append(width if finished else 0)
            if finished:
                # the emitted tokens are what the next context step computes, like an extension of the prompt
                prefill_len.np[slot] += width
                self.state.canvases.finish(int(slot))
        # safe between steps only because scheduling is synchronous: the buffer is double, not more
        prefill_len.copy_to_uva()
        device = outcome.token_RS.device
        slots = [int(slot) for slot in batch.idx_mapping_np[:num_reqs]]
        canvas_passes = [
            passes if finished and mode is Mode.MASK_DIFFUSION else 0
            for passes, finished, mode in zip(outcome.pass_index, done, modes, strict=True)
        ]
        return SamplerOutput(
            outcome.token_RS,
            self._logprobs(slots, emitted),
            compat.pass_report(outcome.num_passes, canvas_passes, outcome.broken, device),
            torch.tensor(emitted, dtype=torch.int32, device=device),
            torch.tensor(widths, dtype=torch.int32, device=device),
        )

    def _logprobs(self, slots: list[int], emitted: list[int]) -> LogprobsTensors | None:
        """Log-probabilities of what a step emits; with the towers split, the denoiser's on every rank."""
        table, link = self.state.proposals.logprobs, self.state.link
        logprobs = table.take(slots, emitted)
        if link is None or not any(emitted) or not table.wanted(np.array(slots)):
            return logprobs
        shared = link.share_object(_moved(logprobs, "cpu"))
        return _moved(shared, link.device)


def _moved(logprobs: LogprobsTensors | None, device: Any) -> LogprobsTensors | None:
    if logprobs is None:
        return None
    return LogprobsTensors(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in logprobs))
