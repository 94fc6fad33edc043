"""The sampler of a two-tower engine: vLLM's own for AR rows, a report of finished canvases for denoise rows.

What it tells the runner, per row:

| row | ``num_sampled`` | ``num_rejected`` |
| --- | --- | --- |
| AR | vLLM's | vLLM's |
| denoised, context step | 0: the prompt or the commit emits nothing | 0 |
| denoised, denoise step | the canvas's width if finished, else 0 | the width: nothing was computed |
| drafted, denoise step | 0 | the width |
| drafted, context step | the accepted drafts and the token after them | the other drafts |
| broken: NaN logits | 0: the scheduler ends the request with an error | as above |

A mock-AR row is a finished canvas of width 1. Both counts of a denoise row are its scheduled width, never S: the
runner's token table ends at ``max_model_len``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_twotower import compat
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.runtime.acceptance import accept_drafts, find_hints
from vllm_twotower.runtime.canvas_table import CanvasTable
from vllm_twotower.runtime.host_copies import async_tensor_h2d, copy_together
from vllm_twotower.runtime.proposals import ProposalSampler
from vllm_twotower.runtime.stats import DiffusionStats
from vllm_twotower.runtime.step import Step, VerifyRows
from vllm_twotower.runtime.trace import CanvasTrace


class CanvasSampler:
    """Wraps vLLM's sampler; everything but the call is its.

    Args:
        base: vLLM's.
        find_step: the step that a batch is.
        canvases: where unfinished canvases are kept.
        proposals: has the log-probabilities of what is revealed.
        stats: counts steps.
        find_trace: who records, if anybody does now.

    """

    def __init__(
        self,
        base: Sampler,
        *,
        find_step: Callable[[InputBatch], Step],
        canvases: CanvasTable,
        proposals: ProposalSampler,
        stats: DiffusionStats,
        find_trace: Callable[[], CanvasTrace | None],
    ) -> None:
        self.base = base
        self.find_step = find_step
        self.canvases = canvases
        self.proposals = proposals
        self.stats = stats
        self.find_trace = find_trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Take over a request's sampling parameters."""
        self.base.add_request(req_idx, sampling_params)
        self.proposals.add_request(req_idx, sampling_params)

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Sample or report one step."""
        step = self.find_step(input_batch)
        if step.kind is StepKind.DENOISE:
            return self._report_canvases(step)
        return self._sample_context_step(step, logits, input_batch)

    def _sample_context_step(self, step: Step, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        is_denoised = [options is not None and not options.is_sampled for options in step.options]
        if step.is_real:
            self._count_context_step(step, is_denoised)
        if all(is_denoised):
            zeros_R = torch.zeros(batch.num_reqs, dtype=torch.int32, device=logits.device)
            tokens_R1 = torch.zeros(batch.num_reqs, 1, dtype=torch.int64, device=logits.device)
            return SamplerOutput(tokens_R1, None, None, zeros_R, zeros_R.clone())
        output = self.sample_ar_rows(step, logits, batch)
        if output.num_nans is None:
            # whether, not how many: a maximum hands a NaN on, and needs no second tensor of the logits' size
            output.num_nans = logits.amax(dim=-1).isnan().to(torch.int32)
        if step.verify is not None:
            output = self._verify_drafts(step, step.verify, output, logits, batch)
        if (trace := self.find_trace()) is not None and step.is_real:
            trace.record_verifications(step, output)
        if any(is_denoised):
            is_denoised_R = async_tensor_h2d(is_denoised, output.num_sampled.device)
            output.num_sampled = output.num_sampled.masked_fill(is_denoised_R, 0)
        return output

    def _verify_drafts(
        self, step: Step, verify: VerifyRows, chosen: SamplerOutput, logits: torch.Tensor, batch: InputBatch
    ) -> SamplerOutput:
        output = accept_drafts(chosen, verify, batch)
        num_sampled = output.num_sampled[verify.row_F]
        self.canvases.keep_hints(step, self.find_hints(logits, output, verify, batch), num_sampled)
        self.stats.count_verification([step.widths[row] - 1 for row in verify.rows], num_sampled - 1)
        return output

    def sample_ar_rows(self, step: Step, logits: torch.Tensor, batch: InputBatch) -> SamplerOutput:
        """vLLM's own sampling."""
        return self.base(logits, batch)

    def find_hints(
        self, logits: torch.Tensor, accepted: SamplerOutput, verify: VerifyRows, batch: InputBatch
    ) -> torch.Tensor:
        """For the next drafts of verifying rows, see ``acceptance.find_hints``."""
        return find_hints(logits, accepted, verify, batch, self.canvases.mask_token_id)

    def _count_context_step(self, step: Step, is_denoised: list[bool]) -> None:
        num_commits = 0
        if any(is_denoised):
            prompt_len_np = self.base.req_states.prompt_len.np[step.slots_np]
            num_commits = int(np.count_nonzero(np.array(is_denoised) & (step.computed_np >= prompt_len_np)))
        self.stats.count_context_step(len(step.req_ids), num_commits)

    def _report_canvases(self, step: Step) -> SamplerOutput:
        outcome = step.outcome
        assert outcome is not None, "the model ran the step's passes"
        self.canvases.scatter(step, outcome)
        rows_of_step = zip(step.widths, step.modes, outcome.finished, strict=True)
        emitted = [width if done and mode is not Mode.SELF_SPECULATION else 0 for width, mode, done in rows_of_step]
        self.stats.count_denoise_step(step, outcome, emitted)
        # the emitted tokens are what the next context step computes, like an extension of the prompt
        prefill_len = self.base.req_states.prefill_len
        prefill_len.np[step.slots_np] += np.array(emitted, dtype=prefill_len.np.dtype)
        # safe between steps only because scheduling is synchronous: the buffer is double, not more
        prefill_len.copy_to_uva()
        canvas_passes = [
            # a draft all of hints has run none
            0 if not done or mode is Mode.MOCK_AR else max(1, passes)
            for passes, done, mode in zip(outcome.pass_index, outcome.finished, step.modes, strict=True)
        ]
        report = compat.pack_pass_report(outcome.num_passes, canvas_passes, outcome.broken)
        device = outcome.token_RS.device
        num_sampled_R, num_rejected_R, report_R = copy_together(
            device, emitted, step.widths, report or [], dtype=np.int32
        )
        return SamplerOutput(
            outcome.token_RS,
            self.take_logprobs(step, emitted),
            report_R if report is not None else None,
            num_sampled_R,
            num_rejected_R,
        )

    def take_logprobs(self, step: Step, emitted: list[int]) -> LogprobsTensors | None:
        """Log-probabilities of what a step emits, so many tokens a row."""
        return self.proposals.logprobs.take(step.slots, emitted)
