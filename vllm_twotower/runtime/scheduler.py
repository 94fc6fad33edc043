"""The block-commit scheduler: vLLM's scheduler, one kind of step at a time.

Per request, alternately: a context step computes the tokens that are not computed yet (a prompt chunk, or the canvas
just emitted: the commit), a denoise step works on the next canvas in lookahead slots. ``schedule`` chooses the kind,
lets vLLM's own ``schedule`` pass over the running requests of the other kind, and copies no upstream logic.

Invariants, each pinned in ``tests/test_scheduler_steps.py``: a step holds rows of one kind; a denoise step holds whole
canvases, the least recently served first; denoising computes nothing (``num_computed_tokens`` is as before); nothing
noisy is ever hashed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_twotower import compat
from vllm_twotower.config import EngineOptions, RequestOptions
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.runtime.draft_policy import AlwaysDraft, DraftPolicy, StepClass, StepTimer
from vllm_twotower.runtime.policy import RunnableRows, StepPolicy
from vllm_twotower.runtime.stat_loggers import StepCounts

logger = init_logger("vllm.twotower")


NOT_A_TOKEN = -1
"""Stands for the tokens of a canvas, of which upstream only counts how many there are."""


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """What the scheduler last scheduled."""

    kind: StepKind
    req_ids: frozenset[str]
    """The requests with tokens in the step."""
    verified: Mapping[str, int] = field(default_factory=dict)
    """Of a context step, requests whose draft it verifies, and the draft's tokens, the known one included."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """What there is to know of a request beside vLLM's own record."""

    options: RequestOptions
    last_denoised: int = 0
    """Number of the denoise step that last held its canvas."""
    drafted: int = 0
    """Tokens, the known one included, of a draft that waits for its verification; 0 if none does."""
    drafts_next: bool | None = None
    """Whether its next round is a draft or an AR step; None: not decided, or no round is next."""
    restarted_at: int = 0
    """Tokens that it starts again with after a preemption."""


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
        options = EngineOptions.read(self.vllm_config)
        assert options is not None, "the config hook sets this scheduler with diffusion on only"
        compat.keep_largest_cache_estimate()
        self.options = options
        self.step_policy = StepPolicy(options.commit_quorum)
        self.last_step = ScheduledStep(kind=StepKind.CONTEXT, req_ids=frozenset())
        """For whoever watches; ``schedule`` replaces it."""
        # A canvas may end exactly at max_model_len: upstream must not keep a slot free for a token sampled after it.
        self.num_sampled_tokens_per_step = 0
        self._progress: dict[str, Progress] = {}
        self._denoising: frozenset[str] = frozenset()  # while a step is scheduled, its canvases
        self._num_denoise_steps = 0
        self.draft_policy = AlwaysDraft() if options.draft_policy == "always" else DraftPolicy()
        self.step_timer = StepTimer(self.draft_policy.costs)
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
        scheduled = output.num_scheduled_tokens
        verified = self._start_verifications(scheduled) if kind is StepKind.CONTEXT else {}
        self.last_step = ScheduledStep(kind=kind, req_ids=frozenset(scheduled), verified=verified)
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
        return RunnableRows(
            commits=len(rows.commits),
            canvases=len(rows.canvases),
            context_only=len(rows.others),
            admissible=self._may_admit() and not self._queue_is_stuck,
        )

    def _may_admit(self) -> bool:
        return bool(self.waiting or self.kv_holding_waiting) and len(self.running) < self.max_num_active_reqs

    def _is_commit(self, request: Request) -> bool:
        """Whether a context step ends a canvas: one that is finished is all there is to compute (no prompt, and not all
        of a preempted request), or a draft waits for its verification."""
        progress = self._progress_of(request)
        if progress.drafted:
            return True
        options = progress.options
        is_canvas = request.num_output_tokens > 0 and _count_left(request) <= options.canvas_length
        return options.mode is Mode.MASK_DIFFUSION and is_canvas

    def _is_prompt(self, request: Request) -> bool:
        """Whether more is left to compute than a request's newest token: a prompt, or all of a preempted request."""
        return _count_left(request) > 1 + self._options_of(request).prefill_lag

    def _is_denoisable(self, request: Request) -> bool:
        progress = self._progress_of(request)
        options = progress.options
        if options.mode is Mode.SELF_SPECULATION:
            return progress.drafts_next is True
        return options.is_denoisable(request.num_computed_tokens, request.num_tokens)

    def _can_draft(self, request: Request) -> bool:
        """Whether a request in self-speculation stands where a draft or an AR step is next."""
        progress = self._progress_of(request)
        return (
            progress.options.mode is Mode.SELF_SPECULATION
            and progress.options.is_denoisable(request.num_computed_tokens, request.num_tokens)
            and request.num_tokens > max(request.num_prompt_tokens, progress.restarted_at)
            and not progress.drafted
            and not request.use_structured_output
            and self._canvas_width(request) > 1
        )

    def _decide_who_drafts(self) -> None:
        """Ask the policy about those who have come to where a draft is possible since it was last asked."""
        if self.draft_policy.rest_one_step() or not compat.can_report_passes():  # nobody would say when a draft is done
            return
        undecided = [r for r in self.running if self._progress_of(r).drafts_next is None and self._can_draft(r)]
        if not undecided:
            return
        ids = [r.request_id for r in undecided]
        steps = max(-(-self._options_of(r).max_steps // self.options.passes_per_step) for r in undecided)
        chosen = self.draft_policy.choose(ids, steps, len(self.running) - len(ids))
        for req_id in ids:
            self._progress[req_id].drafts_next = req_id in chosen

    def _time_step(self) -> None:
        """Time the step for the draft policy, if it holds nothing but drafts, or decoding rows."""
        requests = [self.requests[req_id] for req_id in self.last_step.req_ids]
        if not requests or not all(self._options_of(r).is_sampled for r in requests):
            return
        if self.last_step.kind is StepKind.DENOISE:
            self.step_timer.begin(StepClass.DRAFT, len(requests))
        elif not any(r.is_prefill_chunk or r.num_output_tokens == 0 for r in requests):
            num_verified = len(self.last_step.verified)
            kind = StepClass.VERIFY if num_verified else StepClass.DECODE
            self.step_timer.begin(kind, len(requests), num_verified)

    def _start_verifications(self, scheduled: Mapping[str, int]) -> dict[str, int]:
        """Those of a context step's requests whose draft it verifies; all of them are asked anew before their next
        round."""
        verified = {}
        for req_id, num_tokens in scheduled.items():
            progress = self._progress[req_id]
            if progress.drafted:
                verified[req_id] = num_tokens
            progress.drafted, progress.drafts_next = 0, None
        if scheduled and not verified:
            self.draft_policy.record_decode_step()
        return verified

    def _progress_of(self, request: Request) -> Progress:
        progress = self._progress.get(request.request_id)
        if progress is None:
            extra_args = request.sampling_params.extra_args if request.sampling_params else None
            progress = Progress(options=RequestOptions.from_extra_args(extra_args, self.options))
            self._progress[request.request_id] = progress
        return progress

    def _options_of(self, request: Request) -> RequestOptions:
        return self._progress_of(request).options

    def _schedule_context(self, rows: RunningRequests, args: Any, kwargs: Any) -> SchedulerOutput:
        """Commits, prompts and AR rows. Commits that the budget does not hold take turns, the longest finished first;
        where they left nothing for somebody else, they step aside once."""
        self._denoising = frozenset()
        commits = rows.commits
        prompts = [r for r in rows.others if self._is_prompt(r)]
        taken = [] if self._commits_step_aside else [r for r, _ in self._take_turns(commits, self._count_tokens)]
        hidden = [*rows.canvases, *(r for r in commits if r not in taken)]
        for request in taken:
            # as for a canvas: upstream allocates slots for draft tokens, and these stay in the worker
            request.spec_token_ids = [NOT_A_TOKEN] * (self._progress_of(request).drafted - 1)
        output = self._schedule_without(hidden, self.max_num_active_reqs, args, kwargs)
        output.scheduled_spec_decode_tokens.clear()
        nobody_came = not output.scheduled_new_reqs and not output.scheduled_cached_reqs.resumed_req_ids
        self._commits_step_aside = self._commits_took_all(output, commits, hidden, nobody_came)
        if prompts or not nobody_came:
            self.draft_policy.look_again()
        wrote_a_prompt = any(r.request_id in output.num_scheduled_tokens for r in prompts)
        self._queue_is_stuck |= nobody_came and not wrote_a_prompt and not self._commits_step_aside
        return output

    def _take_turns(
        self, requests: Iterable[Request], count_tokens: Callable[[Request], int]
    ) -> list[tuple[Request, int]]:
        """Those that a step's budget holds, and their tokens, the longest without a denoise step first."""
        budget, taken = self._budget(), []
        for request in sorted(requests, key=lambda r: self._progress_of(r).last_denoised):
            num_tokens = count_tokens(request)
            if num_tokens <= budget:
                budget -= num_tokens
                taken.append((request, num_tokens))
        return taken

    def _count_tokens(self, commit: Request) -> int:
        return self._progress_of(commit).drafted or _count_left(commit)

    def _commits_took_all(
        self, output: SchedulerOutput, commits: list[Request], hidden: list[Request], nobody_came: bool
    ) -> bool:
        """Whether commits used up a context step's budget, and a prompt, an AR row or the queue got nothing."""
        scheduled = output.num_scheduled_tokens
        if output.total_num_scheduled_tokens < self._budget() or not any(r.request_id in scheduled for r in commits):
            return False
        served = scheduled.keys() | {r.request_id for r in hidden}
        return (nobody_came and self._may_admit()) or any(r.request_id not in served for r in self.running)

    def _budget(self) -> int:
        """Tokens of one step."""
        return min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)

    def _schedule_denoise(self, canvases: list[Request], args: Any, kwargs: Any) -> SchedulerOutput:
        """Whole canvases only, as many as the budget holds, the least recently served first; nobody is admitted."""
        self._num_denoise_steps += 1
        rows = self._take_turns(canvases, self._canvas_width)
        for request, width in rows:
            progress = self._progress_of(request)
            # upstream allocates KV slots for draft tokens: what of the canvas lies past the end of the request
            request.spec_token_ids = [NOT_A_TOKEN] * (width - progress.options.context_lag)
            progress.last_denoised = self._num_denoise_steps
        self._denoising = frozenset(request.request_id for request, _ in rows)
        hidden = [r for r in self.running if r.request_id not in self._denoising]
        with compat.without_caching_blocks(self.kv_cache_manager):
            output = self._schedule_without(hidden, 0, args, kwargs)
        # the canvas lives in the worker: no drafts are sent, none are rejected
        output.scheduled_spec_decode_tokens.clear()
        return output

    def _canvas_width(self, request: Request) -> int:
        block_size = self.cache_config.mamba_block_size if self.need_mamba_block_aligned_split else None
        return self._options_of(request).canvas_width(request.num_computed_tokens, self.max_model_len, block_size)

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
        try:
            with compat.passing_over(hidden, self.current_step):
                output = super().schedule(*args, **kwargs)
        finally:
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
        for req_id, width in self.last_step.verified.items():
            request = self.requests.get(req_id)
            num_sampled = len(result.sampled_token_ids[result.req_id_to_index[req_id]])
            if request is not None and num_sampled:  # a broken request has sampled nothing, and ends
                request.num_computed_tokens -= width - num_sampled
                self.draft_policy.record_round(req_id, num_sampled)
                if self._speculation is None:
                    self._speculation = SpecDecodingStats.new(self.options.canvas_length - 1)
                self._speculation.observe_draft(width - 1, num_sampled - 1)

    def _estimate_cached_prompts(self, scheduler_output: SchedulerOutput) -> None:
        """What prompts that this context step ended added to the prefix cache: of canvases, nobody can say later."""
        if self.last_step.kind is StepKind.DENOISE:
            return
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is not None and request.prefill_stats is not None and self._is_denoisable(request):
                request.prefill_stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))

    def _hold_prompt_logprobs(self, result: Any) -> None:
        dicts = compat.find_prompt_logprobs(result)
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
        if self.last_step.kind is StepKind.CONTEXT:
            self._counts.context_passes += len(scheduler_output.num_scheduled_tokens)
            self._end_broken(compat.find_nan_rows(result), result)
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
                progress = self._progress_of(request)
                progress.drafted, progress.drafts_next = scheduler_output.num_scheduled_tokens[req_id], False
                continue
            self._counts.add_canvas(canvas_passes, num_tokens)

    def _end_broken(self, req_ids: list[str], result: Any) -> None:
        """End requests whose logits held a NaN; what was sampled from them is dropped."""
        for req_id in req_ids:
            request = self.requests.get(req_id)
            row = result.req_id_to_index[req_id]
            is_context_row = self.last_step.kind is StepKind.CONTEXT
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
        progress = self._progress_of(request)
        progress.drafted, progress.drafts_next, progress.restarted_at = 0, None, request.num_tokens
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._progress.pop(request.request_id, None)
        self._held_prompt_logprobs.pop(request.request_id, None)
        self.draft_policy.forget(request.request_id)
        self._queue_is_stuck = False
        return super()._free_request(request, *args, **kwargs)


def _count_left(request: Request) -> int:
    """Tokens of a request that the context does not hold."""
    return request.num_tokens - request.num_computed_tokens
