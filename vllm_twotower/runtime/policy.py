"""The step policy: which tower the next engine step runs.

Every forward over 8 or more canvases reads nearly a whole tower, so forwards have to be shared. Committing each canvas
the moment it is done makes every step pay for both towers; waiting for the slowest canvas wastes the fast ones.
Finished canvases wait until a quorum of the mask-diffusion requests is ready, then are committed together.

Invariants, pinned in ``tests/test_policy.py``: a kind of step with nothing to run is never chosen while the other has
something; prompts and AR rows wait for one denoise step at most, whatever the quorum; unfinished canvases wait for
``MAX_CONTEXT_STEPS`` context steps at most. A finished canvas waits no longer than its slowest neighbour takes, and
every canvas ends within its T passes.
"""

from dataclasses import dataclass

from vllm_twotower.core import StepKind

MAX_CONTEXT_STEPS = 2
"""Context steps in a row that unfinished canvases may wait for."""


@dataclass(frozen=True, kw_only=True)
class RunnableRows:
    """What could run, in requests."""

    commits: int
    """Mask-diffusion requests whose finished canvas waits for its commit."""
    canvases: int
    """Mask-diffusion requests with an unfinished canvas."""
    urgent: int
    """Requests that wait for a context step and not for a quorum: prompts in progress, AR rows."""
    admissible: bool
    """Somebody waits in the queue and there is a free place."""


class StepPolicy:
    """Chooses between a context step and a denoise step; remembers only how long each side has waited.

    Args:
        commit_quorum: fraction of the mask-diffusion requests whose canvases are committed together.

    """

    def __init__(self, commit_quorum: float) -> None:
        self.commit_quorum = commit_quorum
        self._denoise_steps_in_a_row = 0
        self._context_steps_in_a_row = 0

    def choose(self, rows: RunnableRows) -> StepKind:
        """The kind of the next step; nothing is remembered before ``ran`` is told."""
        if not rows.canvases:
            return StepKind.CONTEXT
        if self._context_steps_in_a_row >= MAX_CONTEXT_STEPS:
            return StepKind.DENOISE
        urgent_has_waited = rows.urgent > 0 and self._denoise_steps_in_a_row >= 1
        if rows.admissible or urgent_has_waited or self._quorum_is_ready(rows):
            return StepKind.CONTEXT
        return StepKind.DENOISE

    def ran(self, kind: StepKind) -> None:
        """Tell which kind of step was run."""
        if kind is StepKind.DENOISE:
            self._denoise_steps_in_a_row += 1
            self._context_steps_in_a_row = 0
        else:
            self._context_steps_in_a_row += 1
            self._denoise_steps_in_a_row = 0

    def _quorum_is_ready(self, rows: RunnableRows) -> bool:
        return rows.commits >= max(1, self.commit_quorum * (rows.commits + rows.canvases))
