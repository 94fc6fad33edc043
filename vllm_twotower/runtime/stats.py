"""Counters of one worker; ``diffusion_stats`` reads them, and their meaning is documented there."""

from dataclasses import dataclass, fields

import torch

from vllm_twotower.core import Mode
from vllm_twotower.runtime.step import DenoiseOutcome, Step


@dataclass
class DiffusionStats:
    """What this worker has decoded since the start or the last reset."""

    canvases: int = 0
    denoise_passes: int = 0
    context_passes: int = 0
    commits: int = 0
    committed_tokens: int = 0
    denoise_steps: int = 0
    context_steps: int = 0
    denoise_forwards: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int | torch.Tensor = 0

    def count_denoise_step(self, step: Step, outcome: DenoiseOutcome, emitted: list[int]) -> None:
        """Count one denoise step and the tokens that its rows emit; a mock-AR row is a pass and a token, and no canvas,
        and a draft is passes only."""
        self.denoise_steps += 1
        self.denoise_forwards += outcome.num_forwards
        self.denoise_passes += sum(outcome.num_passes)
        of_rows = zip(emitted, step.modes, strict=True)
        self.canvases += sum(bool(num_tokens) and mode is not Mode.MOCK_AR for num_tokens, mode in of_rows)
        self.committed_tokens += sum(emitted)

    def count_context_step(self, num_rows: int, num_commits: int) -> None:
        """Count one context step over ``num_rows`` requests."""
        self.context_steps += 1
        self.context_passes += num_rows
        self.commits += num_commits

    def count_verification(self, num_draft_tokens_F: list[int], num_accepted_F: torch.Tensor) -> None:
        """Count the drafts of a context step; what was accepted is added up on the device, int64 [F]."""
        self.drafts += len(num_draft_tokens_F)
        self.draft_tokens += sum(num_draft_tokens_F)
        self.accepted_tokens = self.accepted_tokens + num_accepted_F.sum()

    def take(self, reset: bool) -> dict[str, int]:
        """The counters, and zeros from now on if ``reset``."""
        counters = {f.name: int(getattr(self, f.name)) for f in fields(self)}
        if reset:
            self.__init__()  # type: ignore[misc]
        return counters
