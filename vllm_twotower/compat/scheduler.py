"""Shims of vLLM's scheduler and of what the worker hands back to it."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_twotower.compat.wrapping import wrap

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


@contextlib.contextmanager
def passing_over(requests: "list[Request]", current_step: int) -> Iterator[None]:
    """Running requests are left out of ``Scheduler.schedule`` while inside, in their place and as possible victims.

    Symptom: a step runs one tower, and ``schedule`` takes whoever runs. Upstream's own way of skipping a running
        request was written for pipeline parallelism, and its diffusion scheduler uses it; ``schedule`` counts
        ``current_step`` up before it looks.
    Upstream: vllm.v1.request.Request.next_decode_eligible_step, vllm.v1.core.sched.scheduler.Scheduler.current_step
    Removed when: the scheduler takes a filter.
    Test: tests/test_scheduler_steps.py::test_a_small_budget_takes_turns_with_whole_canvases
    """
    for request in requests:
        request.next_decode_eligible_step = current_step + 2
    try:
        yield
    finally:
        for request in requests:
            request.next_decode_eligible_step = 0


@contextlib.contextmanager
def without_caching_blocks(kv_cache_manager: "KVCacheManager") -> Iterator[None]:
    """KV slots are allocated while inside without hashing any block.

    Symptom: what a denoise step writes is noise until the commit overwrites it. For a canvas upstream hashes nothing,
        it stops at the request's last token; the slot that a mock-AR pass writes is that of the last token, and its
        block would be offered to other requests. ``schedule`` does not pass upstream's own switch for this.
    Upstream: vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots
    Removed when: a subclass of the scheduler decides what is cached.
    Test: tests/test_engine_modes.py::test_mock_ar_leaves_no_noise_in_the_prefix_cache
    """
    manager: Any = kv_cache_manager
    manager.allocate_slots = functools.partial(kv_cache_manager.allocate_slots, delay_cache_blocks=True)
    try:
        yield
    finally:
        del manager.allocate_slots


def end_with_error(scheduler: "Scheduler", req_id: str) -> None:
    """The coming ``Scheduler.update_from_output`` finishes a request with ``finish_reason="error"``, over HTTP a 500.

    Symptom: a request whose logits hold a NaN would go on with whatever is drawn from them. Upstream has a
        collection of requests that it ends so, whatever their grammar.
    Upstream: vllm.v1.core.sched.scheduler.Scheduler.grammar_compile_error_reqs
    Removed when: a sampler can end a request.
    Test: tests/test_broken_checkpoints.py::test_nan_ends_a_request_with_an_error_and_nobody_else
    """
    ending = scheduler.grammar_compile_error_reqs
    if isinstance(ending, set):  # 0.32
        ending.add(req_id)
    else:  # from 0.33 on with what the client is told; None is upstream's own for "nothing in particular"
        ending[req_id] = None


def find_nan_rows(result: "ModelRunnerOutput") -> list[str]:
    """Whom to ``end_with_error``: rows of a context step whose logits held a NaN, as far as somebody counted."""
    return [req_id for req_id, count in (result.num_nans_in_logits or {}).items() if count > 0]


@functools.cache
def keep_largest_cache_estimate() -> None:
    """``PrefillStats.finalize`` may be called when a prompt is computed, and again by upstream at the first token: what
    a request reports as ``num_cache_creation_tokens`` is the larger.

    Symptom: upstream calls it once, at the first token, and asks which of the request's blocks are in the prefix cache.
        A canvas' first token comes steps after its prompt, when the request has given that Mamba state back: the answer
        is 0.
    Upstream: vllm.v1.metrics.stats.PrefillStats.finalize, vllm.v1.request.Request.prefill_stats,
        vllm.v1.core.kv_cache_manager.KVCacheManager.estimate_cached_tokens
    Removed when: upstream asks when a prompt is computed.
    Test: tests/test_cache_pressure.py::test_every_mode_reports_what_a_prompt_found_in_the_cache_and_added_to_it
    """
    from vllm.v1.metrics.stats import PrefillStats

    @wrap(PrefillStats, "finalize")
    def finalize(upstream: Any, self: Any, num_cached_tokens: int) -> None:
        before = self.num_cache_creation_tokens
        upstream(self, num_cached_tokens)
        self.num_cache_creation_tokens = max(before, self.num_cache_creation_tokens)


def is_warmup_request(req_id: str) -> bool:
    """Invented requests are told from real ones by their ids, run as context rows and are counted nowhere.

    Symptom: kernel warm-up (on GPUs in 0.32, everywhere in 0.33) sends invented requests through the real runner and
        decodes them one token at a time, which no mask-diffusion request does. Their ids are the only mark they carry.
    Upstream: vllm.v1.worker.gpu.warmup.warmup_kernels
    Removed when: the warm-up goes through the scheduler.
    Test: tests/test_compat.py::test_vllms_kernel_warm_up_runs_and_leaves_nothing_behind
    """
    return req_id.startswith(("_warmup_", "_v2_mixed_warmup"))


def find_prompt_logprobs(result: "ModelRunnerOutput") -> tuple[dict[str, Any], dict[str, Any]]:
    """The two dicts of a step's prompt logprobs, by request id: our scheduler takes out what is there without a token,
    and puts it back with the request's first. Nothing is patched.

    Symptom: vLLM's scheduler asserts that prompt logprobs arrive together with a token ("EngineCore returns no partial
        prefill outputs"); ours arrive a step earlier.
    Upstream: vllm.v1.outputs.ModelRunnerOutput.prompt_logprobs_dict,
        vllm.v1.outputs.ModelRunnerOutput.prompt_token_id_logprobs_dict
    Removed when: that assertion goes.
    Test: tests/test_compat.py::test_vllms_scheduler_still_refuses_prompt_logprobs_without_tokens
    """
    return result.prompt_logprobs_dict, result.prompt_token_id_logprobs_dict
