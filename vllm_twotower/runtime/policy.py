"""The step policy: which tower the next engine step runs.

Every forward over 8 or more canvases reads nearly a whole tower, so forwards have to be shared. Committing each canvas
the moment it is done makes every step pay for both towers; waiting for the slowest canvas wastes the fast ones.
Finished canvases wait for each other (``commit_timing.py``), then are committed together; a context step that a prompt
needs takes them along.

Invariants, pinned in ``tests/test_policy.py``: a kind of step with nothing to run is never chosen while the other has
something; prompts and AR rows wait for one denoise step at most, whatever the timing; unfinished canvases wait for
``MAX_CONTEXT_STEPS`` context steps at most. A finished canvas waits no longer than its slowest neighbour takes, and
every canvas ends within its T passes. Where a step's budget does not hold everybody, these are turns and not steps: the
scheduler serves canvases and commits in the order in which they have waited, and lets commits step aside for others.
"""

from dataclasses import dataclass

from vllm_twotower.config import DEFAULT_COMMIT_QUORUM
from vllm_twotower.core import StepKind
from vllm_twotower.runtime.commit_timing import CommitTiming, MarginalValue, Quorum
from vllm_twotower.runtime.step_costs import StepCosts

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
    """Chooses between a context step and a denoise step; remembers how long each side has waited.

    Args:
        commit_quorum: fraction of the mask-diffusion requests whose canvases are committed together; ``auto`` to commit
            when waiting stops paying.
        costs: what steps cost, for that rule; by default every step the same.

    """

    def __init__(self, commit_quorum: float | str = DEFAULT_COMMIT_QUORUM, costs: StepCosts | None = None) -> None:
        self.costs = costs or StepCosts.flat()
        self.timing: CommitTiming = (
            MarginalValue(self.costs) if isinstance(commit_quorum, str) else Quorum(commit_quorum)
        )
        self._denoise_steps_in_a_row = 0
        self._context_steps_in_a_row = 0

    def choose(self, rows: RunnableRows) -> StepKind:
        """The kind of the next step; what it does is remembered when ``ran`` is told."""
        if not rows.canvases:
            return StepKind.CONTEXT
        if self._context_steps_in_a_row >= MAX_CONTEXT_STEPS:
            return StepKind.DENOISE
        urgent_has_waited = rows.urgent > 0 and self._denoise_steps_in_a_row >= 1
        if rows.admissible or urgent_has_waited or self._commits_are_due(rows):
            return StepKind.CONTEXT
        return StepKind.DENOISE

    def ran(self, kind: StepKind, rows: RunnableRows | None = None) -> None:
        """Tell which kind of step was run, and over what."""
        if kind is StepKind.DENOISE:
            self._denoise_steps_in_a_row += 1
            self._context_steps_in_a_row = 0
            if rows is not None and rows.canvases:
                self.timing.denoised(rows.canvases, rows.commits)
        else:
            self._context_steps_in_a_row += 1
            self._denoise_steps_in_a_row = 0
            self.timing.committed()

    def _commits_are_due(self, rows: RunnableRows) -> bool:
        return rows.commits > 0 and self.timing.is_due(rows.commits, rows.canvases)
