"""Shims of what the engine counts, on its way from the worker to ``/metrics``."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_twotower.compat.wrapping import wrap
from vllm_twotower.config import is_diffusion_on

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput

PASSES_BITS = 16
COUNTS_KEY = "twotower"


def pack_pass_report(num_passes: list[int], canvas_passes: list[int], broken: list[bool]) -> list[int] | None:
    """Denoise passes of each row, and whether it is broken, travel from sampler to scheduler as one integer per row.

    Symptom: a sampler's output has fixed fields; ``num_nans`` is the only one per row that reaches the scheduler as it
        is, and it is unused in a denoise step.
    Upstream: vllm.v1.worker.gpu.sample.output.SamplerOutput.num_nans,
        vllm.v1.outputs.ModelRunnerOutput.num_nans_in_logits, vllm.envs.VLLM_RAISE_ON_LOGIT_NANS
    Removed when: a model state can attach its own statistics.
    Test: tests/test_metrics.py::test_prometheus_and_the_log_line_agree_with_diffusion_stats

    Args:
        num_passes: passes of this step, per row.
        canvas_passes: passes of the whole canvas for a row whose canvas is finished, else 0.
        broken: whether the row's logits held a NaN.

    Returns:
        One of 32 bits per row, negative for a broken row. Where vLLM was told to raise on any NaN count, 1 for a broken
        row, None if there is none.

    """
    if not can_report_passes():
        return list(map(int, broken)) if any(broken) else None
    rows = zip(num_passes, canvas_passes, broken, strict=True)
    return [(done << PASSES_BITS | now) * (-1 if bad else 1) for now, done, bad in rows]


def can_report_passes() -> bool:
    """Whether ``pack_pass_report`` has room for passes: not where vLLM was told to raise on any NaN count."""
    import vllm.envs as envs

    return not envs.VLLM_RAISE_ON_LOGIT_NANS


def take_pass_report(result: "ModelRunnerOutput") -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Undo ``pack_pass_report``.

    Returns:
        Request id -> (passes of this step, of the finished canvas), and the ids of broken rows.

    """
    packed, result.num_nans_in_logits = result.num_nans_in_logits or {}, None
    mask = (1 << PASSES_BITS) - 1
    passes = {req_id: (abs(value) & mask, abs(value) >> PASSES_BITS) for req_id, value in packed.items()}
    return passes, [req_id for req_id, value in packed.items() if value < 0]


def attach_counts(stats: Any, counts: dict[str, Any]) -> None:
    """What the scheduler has counted travels to the front end in a ``SchedulerStats``.

    Symptom: its fields are fixed, and this is the one dict among them that no feature we allow makes use of.
    Upstream: vllm.v1.metrics.stats.SchedulerStats.ec_connector_stats
    Removed when: a scheduler can attach its own statistics.
    Test: tests/test_metrics.py::test_prometheus_and_the_log_line_agree_with_diffusion_stats
    """
    stats.ec_connector_stats = {COUNTS_KEY: counts}


def take_counts(stats: Any) -> tuple[Any, dict[str, Any] | None]:
    """Undo ``attach_counts``: a ``SchedulerStats``, or None, as vLLM's loggers expect it, and the counts if any."""
    counts = (stats.ec_connector_stats or {}).get(COUNTS_KEY) if stats is not None else None
    return (stats, None) if counts is None else (dataclasses.replace(stats, ec_connector_stats=None), counts)


@functools.cache
def extend_stat_loggers(
    architecture: str,
    make_prometheus: Callable[[Any, list[int]], Any],
    make_logging: Callable[[], Any],
    take_step_counts: Callable[[Any], tuple[Any, Any]],
) -> None:
    """vLLM's Prometheus and log-line loggers report our counters for engines of our architecture with diffusion on.

    Symptom: ``vllm.stat_logger_plugins`` would do it without patching, but a logger registered there is built for every
        model, and turns statistics on where the user turned them off.
    Upstream: vllm.v1.metrics.loggers.PrometheusStatLogger.record,
        vllm.v1.metrics.loggers.PrometheusStatLogger.engine_indexes,
        vllm.v1.metrics.loggers.LoggingStatLogger.record, vllm.v1.metrics.loggers.LoggingStatLogger.log
    Removed when: an architecture can bring its own stat logger.
    Test: tests/test_metrics.py::test_prometheus_and_the_log_line_agree_with_diffusion_stats

    Args:
        architecture: ours.
        make_prometheus: (vLLM's configuration, indexes of engines) -> what has ``observe(counts, engine_index)``.
        make_logging: () -> the same, with ``log()``.
        take_step_counts: ``SchedulerStats`` or None -> the same without what we attached, and that.

    """
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

    ours: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # vLLM's logger -> what was made for it

    def extend(logger_class: Any, make: Callable[[Any], Any]) -> None:
        @wrap(logger_class, "__init__")
        def initialize(upstream: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            upstream(self, vllm_config, *args, **kwargs)
            if vllm_config.model_config.architecture == architecture and is_diffusion_on(vllm_config):
                ours[self] = make(self)
                count_latency_per_token()

        @wrap(logger_class, "record")
        def record(
            upstream: Any, self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any
        ) -> None:
            scheduler_stats, counts = take_step_counts(scheduler_stats)
            if counts is not None and self in ours:
                ours[self].observe(counts, engine_idx)
            upstream(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)

    extend(
        PrometheusStatLogger,
        lambda self: make_prometheus(self.vllm_config, self.engine_indexes),
    )
    extend(LoggingStatLogger, lambda self: make_logging())

    @wrap(LoggingStatLogger, "log")
    def log(upstream: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        if self in ours:
            ours[self].log()


@functools.cache
def count_latency_per_token() -> None:
    """``vllm:inter_token_latency_seconds`` has a value for every token of a request but the first, from now on and for
    all engines of the process.

    Symptom: vLLM observes the time between two outputs, and calls it that between two tokens. Ours hold a canvas, or
        what a verification kept. Now a token's is its share of that time, and 0 where it came with the first; so
        the mean is that of vLLM's time per output token.
    Upstream: vllm.v1.metrics.stats.IterationStats.update_from_output,
        vllm.v1.metrics.stats.IterationStats.inter_token_latencies_iter
    Removed when: vLLM counts so for its own speculation.
    Test: tests/test_server.py::test_vllms_metrics_say_what_a_client_got
    """
    from vllm.v1.metrics.stats import IterationStats

    @wrap(IterationStats, "update_from_output")
    def update_from_output(upstream: Any, self: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        latencies: list[float] = self.inter_token_latencies_iter
        before, num_tokens = len(latencies), len(output.new_token_ids)
        upstream(self, output, *args, **kwargs)
        if latencies[before:]:
            latencies[before:] = [latencies[before] / num_tokens] * num_tokens if num_tokens else []
        else:
            latencies += [0.0] * (num_tokens - 1)
