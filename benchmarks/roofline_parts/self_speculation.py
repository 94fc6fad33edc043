"""Prices of self-speculation's steps, and the tokens a round must bring to be worth them.

A round is a draft (denoise passes) and a context step that verifies it: a commit with the head at every position, whose
Mamba states are only read, and then a replay that advances them over the tokens that were kept. Requests that take AR
steps and prompts share the context step.
"""

from dataclasses import dataclass

from vllm_twotower.planning.forward_cost import Forward
from vllm_twotower.planning.placement import Placement
from vllm_twotower.planning.throughput import StepTimes
from vllm_twotower.planning.tower_sizes import Tower


@dataclass(frozen=True, kw_only=True)
class ContextRows:
    """Who is in a context step."""

    verified: int = 0
    """Requests whose draft is verified, a whole canvas each."""
    plain: int = 0
    """Requests that take an AR step."""
    prompts: int = 0
    """Requests with a chunk of a prompt."""
    prompt_tokens: int = 0
    """Tokens of those chunks together."""


@dataclass(frozen=True, kw_only=True)
class RoundPrices:
    """Seconds of the steps of self-speculation.

    Args:
        times: of the set-up, with passes per canvas as they are in a draft; towers split between devices are not
            priced.

    """

    times: StepTimes

    def __post_init__(self) -> None:
        if self.times.placement is Placement.SPLIT:
            raise ValueError("self-speculation is not priced for split towers: use a colocated set-up")

    def draft_s(self, rows: int) -> float:
        """One denoise pass over the canvases of all rows."""
        return self.times.denoise_s(rows)

    def context_s(self, rows: ContextRows) -> float:
        """One context step; where nobody verifies and nothing is written, an AR step."""
        load, machine, context = self.times.workload, self.times.machine, self.times.towers[Tower.CONTEXT]
        everybody = rows.verified + rows.plain + rows.prompts
        sampled = rows.verified * load.canvas_length + rows.plain
        forward = Forward(
            rows=everybody,
            tokens=sampled + rows.prompt_tokens,
            context_length=load.context_length,
            logit_rows=sampled + rows.prompts,
            states=(rows.verified + 2 * (rows.plain + rows.prompts)) / everybody,
        )
        return machine.seconds(context, forward) + self._replay_s(rows.verified)

    def _replay_s(self, rows: int) -> float:
        """States read and written; the kept inputs written by the forward and read again."""
        load, machine, facts = self.times.workload, self.times.machine, self.times.towers[Tower.CONTEXT].facts
        kept = load.canvas_length * facts.mamba_input_bytes_per_token
        num_bytes = rows * 2 * (facts.mamba_bytes_per_request + kept) / machine.num_gpus
        return num_bytes / (machine.gpu.bandwidth_Bps * machine.assumed.memory_fraction)

    def break_even_tokens(self, rows: int, num_passes: int) -> float:
        """Tokens a round from which drafting for all of a batch beats AR steps."""
        round_s = num_passes * self.draft_s(rows) + self.context_s(ContextRows(verified=rows))
        return round_s / self.context_s(ContextRows(plain=rows))
