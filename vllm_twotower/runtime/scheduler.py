"""The block-commit scheduler: vLLM's scheduler, one kind of step at a time.

Per request, alternately: a context step computes the tokens that are not computed yet (a prompt chunk, or the canvas
just emitted: the commit), a denoise step works on the next canvas in lookahead slots. ``schedule`` chooses the kind,
lets vLLM's own ``schedule`` pass over the running requests of the other kind, and copies no upstream logic.

Invariants, each pinned in ``tests/test_scheduler_steps.py``: a step holds rows of one kind; a denoise step holds whole
canvases, the least recently served first; denoising computes nothing (``num_computed_tokens`` is as before); nothing
noisy is ever hashed.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_twotower import compat
from vllm_twotower.config import CONFIG_KEY, EngineOptions, RequestOptions
from vllm_twotower.core import MASK_TOKEN_ID, Mode, StepKind
from vllm_twotower.runtime.draft_policy import DraftPolicy, StepClass, StepTimer
from vllm_twotower.runtime.policy import RunnableRows, StepPolicy
from vllm_twotower.runtime.stat_loggers import StepCounts
from vllm_twotower.runtime.step import ScheduledStep

logger = logging.getLogger("vllm.twotower")


@dataclass(kw_only=True)
class RunningRequests:
    """Those that run, by what is next for them."""

    canvases: list[Request] = field(default_factory=list)
    """A denoise step."""
    commits: list[Request] = field(default_factory=list)
    """A context step that ends a canvas: its commit, or a draft's verification."""
    others: list[Request] = field(default_factory=list)
    """A context step for a prompt or an AR row."""


class BlockCommitScheduler(Scheduler):
    """Schedules context steps and denoise steps over vLLM's queues, caches and budgets."""

    running: list[Request]
    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = EngineOptions.from_additional_config(self.vllm_config.additional_config.get(CONFIG_KEY))
        assert options is not None, "the config hook sets this scheduler with diffusion on only"
        compat.keep_largest_cache_estimate()
        self.options = options
        self.step_policy = StepPolicy(options.commit_quorum)
        self.last_step = ScheduledStep(kind=StepKind.CONTEXT, req_ids=frozenset())
        """For whoever watches; ``schedule`` replaces it."""
        # A canvas may end exactly at max_model_len: upstream must not keep a slot free for a token sampled after it.
        self.num_sampled_tokens_per_step = 0
        self._request_options: dict[str, RequestOptions] = {}
        self._denoising: frozenset[str] = frozenset()  # the canvases of the step that is being scheduled or run
        self._num_denoise_steps = 0
        self._last_denoised: dict[str, int] = {}
        # Tokens, the known one included, of drafts that wait for their verification, and of those that a context step
        # verifies which is being scheduled or run.
        self._drafted: dict[str, int] = {}
        self._verifying: dict[str, int] = {}
        self._prefill_len: dict[str, int] = {}  # tokens that a preempted request starts again with
        self.draft_policy = DraftPolicy()
        self.step_timer = StepTimer(self.draft_policy.costs)
        self._drafts_next: dict[str, bool] = {}  # whether a request's next round is a draft or an AR step
        self._speculation: SpecDecodingStats | None = None
        self._held_prompt_logprobs: dict[str, tuple[Any, Any]] = {}
        self._counts = StepCounts()
        # A context step admitted nobody although there was a free place (no KV blocks, say): until something changes,
        # the queue is no reason for another one. One that wrote a prompt proves nothing: vLLM keeps the queue back
        # while a prefix that its first one shares is being written.
        self._queue_is_stuck = False
        # Commits took all of the last context step's budget, and somebody else got nothing.
        self._commits_step_aside = False

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step of one kind; a context step that finds nothing to do becomes a denoise step in the same
        call."""
        self._decide_who_drafts()
        rows = self._sort_running()
        kind = self.step_policy.choose_kind(self._count_runnable(rows))
        if kind is StepKind.CONTEXT:
            output = self._schedule_context(rows, args, kwargs)
            if rows.canvases and not output.total_num_scheduled_tokens:
                # Nothing was admissible (no KV blocks, a grammar still compiling). Denoise instead of spinning, and let
                # that step carry what the empty one had to tell the workers.
                self.finished_req_ids |= output.finished_req_ids
                self.reset_preempted_req_ids |= output.preempted_req_ids or set()
                kind, rows = StepKind.DENOISE, self._sort_running()
        if kind is StepKind.DENOISE:
            output = self._schedule_denoise(rows.canvases, args, kwargs)
        self.step_policy.record_step(kind)
        self.last_step = ScheduledStep(kind=kind, req_ids=frozenset(output.num_scheduled_tokens))
        self._time_step()
        return output

    def _sort_running(self) -> RunningRequests:
        rows = RunningRequests()
        for request in self.running:
            if self._is_denoisable(request):
                rows.canvases.append(request)
            elif self._is_commit(request):
                rows.commits.append(request)
            else:
                rows.others.append(request)
        return rows

    def _count_runnable(self, rows: RunningRequests) -> RunnableRows:
        somebody_waits = bool(self.waiting or self.kv_holding_waiting) and not self._queue_is_stuck
        return RunnableRows(
            commits=len(rows.commits),
            canvases=len(rows.canvases),
            context_only=len(rows.others),
            admissible=somebody_waits and len(self.running) < self.max_num_active_reqs,
        )

    def _is_commit(self, request: Request) -> bool:
        """Whether a context step ends a canvas: one that is finished is all there is to compute (no prompt, and not all
        of a preempted request), or a draft waits for its verification."""
        if request.request_id in self._drafted:
            return True
        options = self._options_of(request)
        left = request.num_tokens - request.num_computed_tokens
        return options.mode is Mode.MASK_DIFFUSION and request.num_output_tokens > 0 and left <= options.canvas_length

    def _is_prompt(self, request: Request) -> bool:
        """Whether more is left to compute than a request's newest token: a prompt, or all of a preempted request."""
        left = request.num_tokens - request.num_computed_tokens
        return left > 1 + self._options_of(request).prefill_lag

    def _is_denoisable(self, request: Request) -> bool:
        options = self._options_of(request)
        if options.mode is Mode.SELF_SPECULATION:
            return self._drafts_next.get(request.request_id, False)
        return options.is_denoisable(request.num_computed_tokens, request.num_tokens)

    def _can_draft(self, request: Request) -> bool:
        """Whether a request in self-speculation stands where a draft or an AR step is next."""
        options = self._options_of(request)
        return (
            options.mode is Mode.SELF_SPECULATION
            and options.is_denoisable(request.num_computed_tokens, request.num_tokens)
            and request.num_tokens > self._prefill_len.get(request.request_id, request.num_prompt_tokens)
            and request.request_id not in self._drafted
            and not request.use_structured_output
            and self._canvas_width(request) > 1
        )

    def _decide_who_drafts(self) -> None:
        """Ask the policy about those who have come to where a draft is possible since it was last asked."""
        if self.draft_policy.keep_resting() or not compat.can_report_passes():  # nobody would say when a draft is done
            return
        undecided = [r for r in self.running if r.request_id not in self._drafts_next and self._can_draft(r)]
        if not undecided:
            return
        ids = [r.request_id for r in undecided]
        steps = max(-(-self._options_of(r).max_steps // self.options.passes_per_step) for r in undecided)
        chosen = self.draft_policy.choose(ids, steps, len(self.running) - len(ids))
        self._drafts_next.update((req_id, req_id in chosen) for req_id in ids)

    def _time_step(self) -> None:
        """Time the step for the draft policy, if it holds nothing but drafts, or decoding rows."""
        requests = [self.requests[req_id] for req_id in self.last_step.req_ids]
        if not requests or not all(self._options_of(r).is_sampled for r in requests):
            return
        if self.last_step.kind is StepKind.DENOISE:
            self.step_timer.begin(StepClass.DRAFT, len(requests))
        elif not any(r.is_prefill_chunk or r.num_output_tokens == 0 for r in requests):
            kind = StepClass.VERIFY if self._verifying else StepClass.DECODE
            self.step_timer.begin(kind, len(requests), len(self._verifying))

    def _options_of(self, request: Request) -> RequestOptions:
        options = self._request_options.get(request.request_id)
        if options is None:
            extra_args = request.sampling_params.extra_args if request.sampling_params else None
            options = RequestOptions.from_extra_args(extra_args, self.options)
            self._request_options[request.request_id] = options
        return options

    def _schedule_context(self, rows: RunningRequests, args: Any, kwargs: Any) -> SchedulerOutput:
        """Commits, prompts and AR rows. Commits that the budget does not hold take turns, the longest finished first;
        where they left nothing for somebody else, they step aside once."""
        self._denoising = frozenset()
        commits = rows.commits
        prompts = [r for r in rows.others if self._is_prompt(r)]
        hidden = [*rows.canvases, *(commits if self._commits_step_aside else self._late_commits(commits))]
        for request in commits:
            if request not in hidden and request.request_id in self._drafted:
                # as for a canvas: upstream allocates slots for draft tokens, and these stay in the worker
                request.spec_token_ids = [MASK_TOKEN_ID] * (self._drafted[request.request_id] - 1)
        output = self._schedule_without(hidden, self.max_num_active_reqs, args, kwargs)
        scheduled = output.num_scheduled_tokens
        self._verifying = {i: scheduled[i] for i in self._drafted if i in scheduled}
        for req_id in self._verifying:
            del self._drafted[req_id]
        for req_id in scheduled:
            self._drafts_next.pop(req_id, None)
        if scheduled and not self._verifying:
            self.draft_policy.record_decode_step()
        output.scheduled_spec_decode_tokens.clear()
        nobody_came = not output.scheduled_new_reqs and not output.scheduled_cached_reqs.resumed_req_ids
        self._commits_step_aside = self._commits_took_all(output, commits, hidden, nobody_came)
        if prompts or not nobody_came:
            self.draft_policy.look_again()
        wrote_a_prompt = any(r.request_id in output.num_scheduled_tokens for r in prompts)
        self._queue_is_stuck |= nobody_came and not wrote_a_prompt and not self._commits_step_aside
        return output

    def _late_commits(self, commits: list[Request]) -> list[Request]:
        """Those of the commits that this step's budget does not hold."""
        budget, late = self._budget(), []
        for request in sorted(commits, key=lambda r: self._last_denoised.get(r.request_id, 0)):
            left = self._drafted.get(request.request_id) or request.num_tokens - request.num_computed_tokens
            if left > budget:
                late.append(request)
            else:
                budget -= left
        return late

    def _commits_took_all(
        self, output: SchedulerOutput, commits: list[Request], hidden: list[Request], nobody_came: bool
    ) -> bool:
        """Whether commits used up a context step's budget, and a prompt, an AR row or the queue got nothing."""
        scheduled = output.num_scheduled_tokens
        if output.total_num_scheduled_tokens < self._budget() or not any(r.request_id in scheduled for r in commits):
            return False
        served = scheduled.keys() | {r.request_id for r in hidden}
        queue_waits = bool(self.waiting or self.kv_holding_waiting) and len(self.running) < self.max_num_active_reqs
        return (nobody_came and queue_waits) or any(r.request_id not in served for r in self.running)

    def _budget(self) -> int:
        """Tokens of one step."""
        return min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)

    def _schedule_denoise(self, canvases: list[Request], args: Any, kwargs: Any) -> SchedulerOutput:
        """Whole canvases only, as many as the budget holds, the least recently served first; nobody is admitted."""
        self._num_denoise_steps += 1
        self._verifying = {}
        budget = self._budget()
        rows: list[Request] = []
        for request in sorted(canvases, key=lambda r: self._last_denoised.get(r.request_id, 0)):
            width = self._canvas_width(request)
            if width > budget:
                continue
            budget -= width
            rows.append(request)
            # upstream allocates KV slots for draft tokens: what of the canvas lies past the end of the request
            request.spec_token_ids = [MASK_TOKEN_ID] * (width - self._options_of(request).context_lag)
            self._last_denoised[request.request_id] = self._num_denoise_steps
        self._denoising = frozenset(r.request_id for r in rows)
        hidden = [r for r in self.running if r.request_id not in self._denoising]
        with compat.without_caching_blocks(self.kv_cache_manager):
            output = self._schedule_without(hidden, 0, args, kwargs)
        # the canvas lives in the worker: no drafts are sent, none are rejected
        output.scheduled_spec_decode_tokens.clear()
        return output

    def _canvas_width(self, request: Request) -> int:
        options, computed = self._options_of(request), request.num_computed_tokens
        width = options.canvas_width(computed, self.max_model_len)
        if options.mode is Mode.SELF_SPECULATION and self.need_mamba_block_aligned_split:
            # the states after a verified canvas lie in the block where they began
            block_size = self.cache_config.mamba_block_size
            width = min(width, block_size - computed % block_size)
        return width

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Upstream's last word on a chunk: in mock-AR the context stops one token short."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id in self._denoising:
            return num_new_tokens
        lag = self._options_of(request).prefill_lag
        return max(0, min(num_new_tokens, request.num_tokens - lag - num_computed_tokens)) if lag else num_new_tokens

    def add_request(self, request: Request) -> None:
        """Mock-AR does not read the prefix cache: a hit of all tokens but one would leave its context nothing to do."""
        if self._options_of(request).mode is Mode.MOCK_AR:
            request.skip_reading_prefix_cache = True
        self._queue_is_stuck = False
        super().add_request(request)

    def _schedule_without(self, hidden: list[Request], max_active: int, args: Any, kwargs: Any) -> SchedulerOutput:
        """vLLM's own ``schedule`` with some running requests passed over; they keep their place and can be
        preempted."""
        limit, self.max_num_active_reqs = self.max_num_active_reqs, max_active
        with compat.passing_over(hidden, self.current_step):
            output = super().schedule(*args, **kwargs)
        self.max_num_active_reqs = limit
        for request in self.running:
            request.spec_token_ids = []
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for req_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            if req_id in self._denoising:  # a denoise step computes nothing of the context
                self.requests[req_id].num_computed_tokens -= num_tokens

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """As upstream's, except that prompt logprobs wait for the request's first tokens, passes are counted, and NaN
        logits end a request."""
        self.step_timer.end()
        self._count(scheduler_output, model_runner_output)
        self._take_back_rejected(model_runner_output)
        self._hold_prompt_logprobs(model_runner_output)
        self._estimate_cached_prompts(scheduler_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _take_back_rejected(self, result: Any) -> None:
        """Of a verified canvas the context holds the known token and the accepted drafts."""
        for req_id, width in self._verifying.items():
            request = self.requests.get(req_id)
            num_sampled = len(result.sampled_token_ids[result.req_id_to_index[req_id]])
            if request is not None and num_sampled:  # a broken request has sampled nothing, and ends
                request.num_computed_tokens -= width - num_sampled
                self.draft_policy.record_round(req_id, num_sampled)
                if self._speculation is None:
                    self._speculation = SpecDecodingStats.new(self.options.canvas_length - 1)
                self._speculation.observe_draft(width - 1, num_sampled - 1)
        self._verifying = {}

    def _estimate_cached_prompts(self, scheduler_output: SchedulerOutput) -> None:
        """What prompts that this context step ended added to the prefix cache: of canvases, nobody can say later."""
        if self._denoising:
            return
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is not None and request.prefill_stats is not None and self._is_denoisable(request):
                request.prefill_stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))

    def _hold_prompt_logprobs(self, result: Any) -> None:
        dicts = compat.prompt_logprobs_of(result)
        if not any(dicts) and not self._held_prompt_logprobs:
            return
        for req_id in result.req_ids:
            row = result.req_id_to_index[req_id]
            if req_id not in self.requests:  # aborted while the step ran
                continue
            if result.sampled_token_ids and not result.sampled_token_ids[row]:
                if any(req_id in d for d in dicts):
                    self._held_prompt_logprobs[req_id] = tuple(d.pop(req_id, None) for d in dicts)
            elif req_id in self._held_prompt_logprobs:
                for d, held in zip(dicts, self._held_prompt_logprobs.pop(req_id), strict=True):
                    if held is not None:
                        d[req_id] = held

    def _count(self, scheduler_output: SchedulerOutput, result: Any) -> None:
        if not self._denoising:
            self._counts.context_passes += len(scheduler_output.num_scheduled_tokens)
            self._end_broken(compat.nan_rows(result), result)
            return
        passes, broken = compat.take_pass_report(result)
        self._end_broken(broken, result)
        for req_id, (num_passes, canvas_passes) in passes.items():
            num_tokens = len(result.sampled_token_ids[result.req_id_to_index[req_id]])
            self._counts.denoise_passes += num_passes
            self._counts.committed_tokens += num_tokens
            if not canvas_passes:
                continue
            request = self.requests.get(req_id)
            if request is not None and self._options_of(request).mode is Mode.SELF_SPECULATION:
                self._drafted[req_id] = scheduler_output.num_scheduled_tokens[req_id]
                self._drafts_next[req_id] = False
                continue
            self._counts.add_canvas(canvas_passes, num_tokens)

    def _end_broken(self, req_ids: list[str], result: Any) -> None:
        """End requests whose logits held a NaN; what was sampled from them is dropped."""
        for req_id in req_ids:
            request = self.requests.get(req_id)
            row = result.req_id_to_index[req_id]
            is_context_row = not self._denoising
            if request is None or (is_context_row and not self._options_of(request).is_sampled):
                continue
            logger.error(
                "request %s ended with an error: its logits hold NaN, from broken weights, or from sampling parameters "
                "that allow no token",
                req_id,
            )
            result.sampled_token_ids[row] = []
            compat.end_with_error(self, req_id)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's statistics of the step, and ours since the last."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._counts.attach(stats)
            self._counts = StepCounts()
            stats.spec_decoding_stats, self._speculation = self._speculation, None
        return stats

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._drafted.pop(request.request_id, None)
        self._drafts_next.pop(request.request_id, None)
        self._prefill_len[request.request_id] = request.num_tokens
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        tables: tuple[dict[str, Any], ...] = (self._request_options, self._last_denoised, self._held_prompt_logprobs)
        for table in (*tables, self._drafted, self._drafts_next, self._prefill_len):
            table.pop(request.request_id, None)
        self.draft_policy.forget(request.request_id)
        self._queue_is_stuck = False
        return super()._free_request(request, *args, **kwargs)
