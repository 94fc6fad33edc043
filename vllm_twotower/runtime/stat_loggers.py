"""Diffusion counters on vLLM's own ``/metrics`` and in its periodic log line.

The way of a count: the worker's sampler reports passes per row (``compat.pack_pass_report``), the scheduler sums them
per step and attaches them to vLLM's ``SchedulerStats``, the front end's loggers pick them up here. Only engines of our
architecture with diffusion on are extended.
"""

import dataclasses
import types
from collections.abc import Iterable
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from vllm_twotower import compat
from vllm_twotower.config import EngineOptions
from vllm_twotower.core import MAX_CANVAS_LENGTH

logger = init_logger("vllm.twotower")

COUNTERS = {
    "canvases": "Canvases finished.",
    "denoise_passes": "Denoise passes, counted once per canvas they ran for.",
    "context_passes": "Context-tower forwards, counted once per request they ran for: prompt chunks, commits, AR steps "
    "and verifications.",
    "committed_tokens": "Tokens of finished canvases, before trimming at a stop.",
}
PASSES_PER_CANVAS = "passes_per_canvas"


@dataclasses.dataclass
class StepCounts:
    """What the steps since the last report did."""

    canvases: int = 0
    denoise_passes: int = 0
    context_passes: int = 0
    committed_tokens: int = 0
    passes_per_canvas: list[int] = dataclasses.field(default_factory=list)
    canvas_tokens: int = 0
    """Committed tokens without mock-AR's."""
    canvas_positions: int = 0
    """Positions of finished canvases, once per pass and once for the commit, as vLLM counts its own diffusion."""
    speculation: SpecDecodingStats | None = None
    """Travels in its own field of vLLM's statistics, where vLLM's log line finds it."""

    def add(self, other: "StepCounts") -> None:
        """Add another's counts to these."""
        for field in dataclasses.fields(self):
            if field.name == "speculation":
                continue
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def add_canvas(self, num_passes: int, num_tokens: int) -> None:
        """Count one finished canvas."""
        self.canvases += 1
        self.passes_per_canvas.append(num_passes)
        self.canvas_tokens += num_tokens
        self.canvas_positions += (num_passes + 1) * num_tokens

    def count_as_vllm(self) -> SpecDecodingStats:
        """Finished canvases as vLLM reports its own diffusion models: denoising steps with commits in the place of
        drafts, canvas positions in that of draft tokens, committed tokens in that of accepted ones.
        """
        return SpecDecodingStats(
            num_spec_tokens=0,
            num_drafts=sum(self.passes_per_canvas) + self.canvases,
            num_draft_tokens=self.canvas_positions,
            num_accepted_tokens=self.canvas_tokens,
        )

    def attach(self, stats: Any) -> None:
        """Put the counts into a ``SchedulerStats``."""
        compat.attach_counts(stats, dataclasses.asdict(self))

    @classmethod
    def take_from(cls, stats: Any) -> "tuple[Any, StepCounts | None]":
        """The stats as upstream's loggers expect them, and the counts if there are any."""
        stats, counts = compat.take_counts(stats)
        return stats, None if counts is None else cls(**{**counts, "speculation": stats.spec_decoding_stats})


class DiffusionProm:
    """The Prometheus metrics of one front end, labelled as vLLM's are."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Iterable[int]) -> None:
        model_name = vllm_config.model_config.served_model_name
        labels = ["model_name", "engine"]
        counters = {n: Counter(f"vllm:twotower_{n}", text, labels) for n, text in COUNTERS.items()}
        passes = Histogram(
            f"vllm:twotower_{PASSES_PER_CANVAS}",
            "Histogram of denoise passes per finished canvas.",
            labels,
            buckets=[1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 24, MAX_CANVAS_LENGTH],
        )
        self._counters = {
            index: {n: c.labels(model_name, str(index)) for n, c in counters.items()} for index in engine_indexes
        }
        self._passes = {index: passes.labels(model_name, str(index)) for index in engine_indexes}
        # vLLM's own counters of speculation, which it makes only where its own speculation is on
        options = EngineOptions.read(vllm_config)
        assert options is not None, "there are no counters with diffusion off"
        widest: Any = types.SimpleNamespace(num_speculative_tokens=options.canvas_length - 1)
        by_engine: dict[int, list[object]] = {index: [model_name, str(index)] for index in engine_indexes}
        self._speculation = SpecDecodingProm(widest, labels, by_engine)
        # what `vllm bench serve` reads of a diffusion server
        self._vllms_diffusion = SpecDecodingProm(None, labels, by_engine, is_diffusion=True)

    def observe(self, counts: StepCounts, engine_index: int) -> None:
        """Add one report."""
        for name, counter in self._counters[engine_index].items():
            counter.inc(getattr(counts, name))
        for passes in counts.passes_per_canvas:
            self._passes[engine_index].observe(passes)
        self._vllms_diffusion.observe(counts.count_as_vllm(), engine_index)
        if counts.speculation is not None:
            self._speculation.observe(counts.speculation, engine_index)


class DiffusionLogging:
    """The log line of one engine."""

    def __init__(self) -> None:
        self._since_last = StepCounts()

    def observe(self, counts: StepCounts, engine_index: int = 0) -> None:
        """Add one report."""
        self._since_last.add(counts)

    def log(self) -> None:
        """Log what happened since the last line; nothing if nothing did."""
        counts, self._since_last = self._since_last, StepCounts()
        if not counts.denoise_passes:
            return
        logger.info(
            "Diffusion metrics: Mean passes per canvas: %.2f, Tokens per denoise pass: %.2f, Committed: %d tokens, "
            "Canvases: %d, Denoise passes: %d, Context passes: %d",
            sum(counts.passes_per_canvas) / max(1, counts.canvases),
            counts.committed_tokens / counts.denoise_passes,
            counts.committed_tokens,
            counts.canvases,
            counts.denoise_passes,
            counts.context_passes,
        )
