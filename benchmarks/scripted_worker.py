"""The real scheduler without a model: a worker that plays passes per canvas, or tokens a round, from a script, on a
clock of its own.

``BlockCommitScheduler`` runs as in an engine: vLLM's queues, KV blocks, budgets, preemption. What a step returns and
how long it takes is made up here.
"""

import collections
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

os.environ.setdefault("TRITON_INTERPRET", "1")  # before vLLM imports triton, on a machine without a GPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


from benchmarks.roofline_parts.self_speculation import ContextRows, RoundPrices
from vllm_twotower.core import Mode, StepKind
from vllm_twotower.planning.forward_cost import ar_step, context_step
from vllm_twotower.planning.throughput import StepTimes
from vllm_twotower.planning.tower_sizes import Tower
from vllm_twotower.runtime.draft_policy import DraftPolicy, StepTimer

TOKEN = 7
BLOCK_TOKENS = 256
NUM_BLOCKS = 40_000
STEP_BUDGET = 8192


def make_scheduler(model: str, batch: int, options: dict):
    """The engine's own scheduler class over a cache that never fills.

    Args:
        model: any two-tower checkpoint folder; only its config is read.
        batch: places for running requests.
        options: engine options.

    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_twotower.runtime.scheduler import BlockCommitScheduler

    args = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=batch,
        max_num_batched_tokens=STEP_BUDGET,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 24,
        additional_config={"diffusion": options},
    )
    config = args.create_engine_config()
    config.scheduler_config.max_num_seqs = batch  # the start-up rule lowers what looks like vLLM's own default
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    return BlockCommitScheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK_TOKENS)


def client_of(req_id: str) -> int:
    """Which client sent a request."""
    return int(req_id.split("-")[0])


@dataclass
class Tally:
    """What has happened so far."""

    now_s: float = 0.0
    tokens: int = 0
    canvases: int = 0
    passes: int = 0
    """Of rows, not of steps."""
    commits: int = 0
    prompt_tokens: int = 0
    first_tokens_s: list[float] = field(default_factory=list)
    """Time to first token of each request that has one."""
    waits_s: list[float] = field(default_factory=list)
    """How long each row of each step had not been in one."""
    steps: int = 0

    def copy(self) -> "Tally":
        return Tally(**{**vars(self), "first_tokens_s": [], "waits_s": []})


class ScriptedRun:
    """Clients that each send one request after the other, a scheduler, and steps that take as long as they are priced.

    Args:
        scheduler: from ``make_scheduler``.
        times: prices of steps, and passes per canvas.
        batch: clients.
        prompt_tokens, output_tokens: of each request.
        mode: how they are decoded.
        seed: of the passes per canvas.

    """

    def __init__(
        self,
        scheduler,
        times: StepTimes,
        batch: int,
        prompt_tokens: int,
        output_tokens: int,
        mode: Mode = Mode.MASK_DIFFUSION,
        seed: int = 0,
    ) -> None:
        self.scheduler, self.times, self.seed, self.mode = scheduler, times, seed, mode
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.tally = Tally()
        self.passes_left: dict[str, int] = {}
        self.arrived_s: dict[str, float] = {}
        self._counts: dict[int, Iterator[int]] = {}
        self._last_seen_s: dict[str, float] = {}
        self._ids = itertools.count()
        for client in range(batch):
            self._counts[client] = times.workload.passes.draw_counts(client, seed)
            # clients do not start in step with each other: the first outputs differ in length
            first = output_tokens - times.workload.canvas_length * (client * (output_tokens // 16) // batch)
            self._send(client, max(16, first))

    def run_until(self, num_tokens: int) -> None:
        """Step until so many tokens have come out."""
        while self.tally.tokens < num_tokens:
            self.step()

    def step(self) -> None:
        """One engine step: schedule, price, report."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler, tally = self.scheduler, self.tally
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        assert scheduled, "an empty step would never end"
        for req_id in scheduled:
            tally.waits_s.append(tally.now_s - self._last_seen_s[req_id])
        denoising = scheduler.last_step.kind is StepKind.DENOISE
        tally.now_s += self._seconds(scheduled, denoising)
        tally.steps += 1
        sampled = [self._row(req_id, width, denoising) for req_id, width in scheduled.items()]
        result = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={req_id: index for index, req_id in enumerate(scheduled)},
            sampled_token_ids=sampled,
            num_nans_in_logits=self._report_drafts(scheduled, denoising),
        )
        for req_id in scheduled:
            self._last_seen_s[req_id] = tally.now_s
        scheduler.update_from_output(output, result)
        for req_id in scheduled:
            if req_id not in scheduler.requests:  # finished; its client sends the next
                self._send(client_of(req_id), self.output_tokens)

    def _report_drafts(self, scheduled: dict[str, int], denoising: bool) -> dict[str, int] | None:
        """What the sampler reports of drafts that a denoise step has finished."""
        return None

    def _seconds(self, scheduled: dict[str, int], denoising: bool) -> float:
        rows, tokens, length = len(scheduled), sum(scheduled.values()), self.times.workload.context_length
        if denoising:
            return self.times.denoise_s(rows)
        shape = ar_step(rows, length) if self.mode is Mode.AR and tokens == rows else context_step(rows, tokens, length)
        return self.times.machine.seconds(self.times.towers[Tower.CONTEXT], shape)

    def _row(self, req_id: str, width: int, denoising: bool) -> list[int]:
        """The tokens that a row of a step reports."""
        request, tally = self.scheduler.requests[req_id], self.tally
        computed = request.num_computed_tokens
        if denoising:
            tally.passes += 1
            self.passes_left[req_id] -= 1
            if self.passes_left[req_id]:
                return []
            tally.canvases += 1
            return self._emit(req_id, width)
        if computed <= request.num_prompt_tokens:
            tally.prompt_tokens += width
        elif self.mode is Mode.MASK_DIFFUSION:
            tally.commits += 1
        if computed < request.num_tokens:
            return []  # a chunk of a prompt
        if self.mode is Mode.AR:
            return self._emit(req_id, 1)
        self.passes_left[req_id] = next(self._counts[client_of(req_id)])
        return []

    def _emit(self, req_id: str, num_tokens: int) -> list[int]:
        if req_id in self.arrived_s:
            self.tally.first_tokens_s.append(self.tally.now_s - self.arrived_s.pop(req_id))
        self.tally.tokens += num_tokens
        return [TOKEN] * num_tokens

    def _send(self, client: int, output_tokens: int) -> None:
        from vllm.v1.request import Request

        from vllm_twotower import diffusion_params

        req_id = f"{client}-{next(self._ids)}"
        params = diffusion_params(mode=self.mode, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        self.arrived_s[req_id] = self._last_seen_s[req_id] = self.tally.now_s
        self.scheduler.add_request(Request(req_id, [TOKEN] * self.prompt_tokens, params, None))


class DraftingRun(ScriptedRun):
    """Requests in self-speculation whose rounds bring what a script says; the scheduler reads this run's clock.

    Args:
        scheduler: from ``make_scheduler``.
        prices: of steps.
        rounds: for every client, how many tokens it has got so far -> how many a round would bring it there.
        prompt_tokens, output_tokens: of each request.
        policy: who drafts; None for ``ar`` requests.

    """

    def __init__(
        self,
        scheduler,
        prices: RoundPrices,
        rounds: Sequence[Callable[[int], int]],
        prompt_tokens: int,
        output_tokens: int,
        policy: DraftPolicy | None,
    ) -> None:
        self.prices, self.rounds = prices, rounds
        self.drafted: set[str] = set()
        self.tokens_of_client: collections.Counter[int] = collections.Counter()
        if policy is not None:
            scheduler.draft_policy = policy
            scheduler.step_timer = StepTimer(policy.costs, clock=lambda: self.tally.now_s)
        mode = Mode.AR if policy is None else Mode.SELF_SPECULATION
        super().__init__(scheduler, prices.times, len(rounds), prompt_tokens, output_tokens, mode)

    def _report_drafts(self, scheduled: dict[str, int], denoising: bool) -> dict[str, int] | None:
        from vllm_twotower import compat

        if not denoising:
            return None
        one_pass = [1] * len(scheduled)  # a draft of one pass is finished in its first step
        packed = compat.pack_pass_report(one_pass, one_pass, [False] * len(scheduled))
        assert packed is not None
        return dict(zip(scheduled, packed, strict=True))

    def _seconds(self, scheduled: dict[str, int], denoising: bool) -> float:
        if denoising:
            return self.prices.draft_s(len(scheduled))
        verified = sum(req_id in self.drafted for req_id in scheduled)
        requests = self.scheduler.requests
        prompts = [r for r in scheduled if requests[r].num_output_tokens == 0]
        return self.prices.context_s(
            ContextRows(
                verified=verified,
                plain=len(scheduled) - verified - len(prompts),
                prompts=len(prompts),
                prompt_tokens=sum(scheduled[req_id] for req_id in prompts),
            )
        )

    def _row(self, req_id: str, width: int, denoising: bool) -> list[int]:
        request = self.scheduler.requests[req_id]
        if denoising:
            self.drafted.add(req_id)
            return []
        if req_id in self.drafted:
            self.drafted.remove(req_id)
            client = client_of(req_id)
            return self._emit(req_id, min(width, self.rounds[client](self.tokens_of_client[client])))
        if request.num_output_tokens == 0:
            self.tally.prompt_tokens += width
        return self._emit(req_id, 1) if request.num_computed_tokens >= request.num_tokens else []

    def _emit(self, req_id: str, num_tokens: int) -> list[int]:
        request = self.scheduler.requests[req_id]
        kept = min(num_tokens, request.max_tokens - request.num_output_tokens)  # vLLM drops what is past the end
        self.tokens_of_client[client_of(req_id)] += kept
        super()._emit(req_id, kept)
        return [TOKEN] * num_tokens
