"""The step policy: which tower the next engine step runs.

Every forward over 8 or more canvases reads nearly a whole tower, so forwards have to be shared. Committing each canvas
the moment it is done makes every step pay for both towers; waiting for the slowest canvas wastes the fast ones.
Finished canvases wait until they are a quorum, then are committed together; a context step that a prompt needs takes
them along.

Invariants, pinned in ``tests/test_policy.py``: a kind of step with nothing to run is never chosen while the other has
something; prompts and AR rows wait for one denoise step at most; unfinished canvases wait for ``MAX_CONTEXT_STEPS``
context steps at most. A finished canvas waits no longer than its slowest neighbour takes, and every canvas ends within
its T passes. Where a step's budget does not hold everybody, these are turns and not steps: the scheduler serves
canvases and commits in the order in which they have waited, and lets commits step aside for others.
"""

from dataclasses import dataclass

from vllm_twotower.config import DEFAULT_COMMIT_QUORUM
from vllm_twotower.core import StepKind

MAX_CONTEXT_STEPS = 2
"""Context steps in a row that unfinished canvases may wait for."""


@dataclass(frozen=True, kw_only=True)
class RunnableRows:
    """What could run, in requests."""

    commits: int
    """Mask-diffusion requests whose finished canvas waits for its commit."""
    canvases: int
    """Requests with an unfinished canvas."""
    context_only: int
    """Requests that wait for a context step and for no quorum: prompts in progress, AR rows."""
    admissible: bool
    """Somebody waits in the queue and there is a free place."""


class StepPolicy:
    """Chooses between a context step and a denoise step; remembers how long each side has waited.

    Args:
        commit_quorum: fraction of the mask-diffusion requests whose canvases are committed together: 0 at once, 1 in
            lockstep.

    """

    def __init__(self, commit_quorum: float = DEFAULT_COMMIT_QUORUM) -> None:
        self.commit_quorum = commit_quorum
        self._denoise_steps_in_a_row = 0
        self._context_steps_in_a_row = 0

    def choose_kind(self, rows: RunnableRows) -> StepKind:
        """The kind of the next step; nothing is remembered until ``record_step``."""
        if not rows.canvases:
            return StepKind.CONTEXT
        if self._context_steps_in_a_row >= MAX_CONTEXT_STEPS:
            return StepKind.DENOISE
        others_have_waited = rows.context_only > 0 and self._denoise_steps_in_a_row >= 1
        if rows.admissible or others_have_waited or self._are_commits_due(rows):
            return StepKind.CONTEXT
        return StepKind.DENOISE

    def record_step(self, kind: StepKind) -> None:
        """Take note of the kind of step that was run."""
        if kind is StepKind.DENOISE:
            self._denoise_steps_in_a_row += 1
            self._context_steps_in_a_row = 0
        else:
            self._context_steps_in_a_row += 1
            self._denoise_steps_in_a_row = 0

    def _are_commits_due(self, rows: RunnableRows) -> bool:
        return rows.commits > 0 and rows.commits >= self.commit_quorum * (rows.commits + rows.canvases)
