"""Self-speculation on one screen: the denoiser drafts, the context tower verifies, the output is AR's token for token.

AR's choice at a position is a function of the tokens before it: the likeliest, or the one that the request's own noise
for (seed, position) picks. So a draft is kept exactly as far as AR would have chosen the same, whatever drafted it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from vllm_twotower.decoding.noise_level import noise_level
from vllm_twotower.oracle.reference import MaskDiffusion, choose_token, positions_to_reveal, propose

AR_PASS = 0
"""The pass whose noise AR chooses with; drafts are drawn with the same, for then they are the same more often."""

Kept = TypeVar("Kept")


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation(MaskDiffusion):
    """Settings of one request; temperature, seed and rules are AR's, and drafts follow them."""

    max_steps: int = 1
    hint_threshold: float = math.inf
    """What is left of a rejected draft goes into the next canvas where AR chose the same token with a probability above
    this, although it saw a wrong one further left. Infinite: nothing does."""

    def choose_reveals(
        self, proposals: dict[int, tuple[int, float]], confidences: Sequence[float], step: int
    ) -> Sequence[int]:
        """Positions that a pass reveals; ``confidences`` are those of all drafts so far, by position."""
        return positions_to_reveal(proposals, step, self)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One draft and its verification."""

    canvas: tuple[int, ...]
    """The known token and the drafts."""
    num_passes: int
    num_accepted: int
    """Drafts that AR chose too. AR's next token comes on top of them."""


@dataclass(frozen=True, kw_only=True)
class SpeculationResult:
    """What ``generate_self_speculation`` wrote; the first token needs no round, the prompt's forward gave it."""

    token_ids: tuple[int, ...]
    """Up to and with the end of sequence, at most ``max_tokens``."""
    rounds: tuple[Round, ...]
    """One verification each."""

    @property
    def num_denoise_passes(self) -> int:
        """Of all drafts."""
        return sum(one.num_passes for one in self.rounds)

    @property
    def tokens_per_forward(self) -> float:
        """Of either tower, the prompt's own forward left out."""
        return len(self.token_ids) / (self.num_denoise_passes + len(self.rounds))


def generate_self_speculation(
    prompt: Sequence[int],
    max_tokens: int,
    first_V: torch.Tensor,
    denoise: Callable[[Sequence[int], float], torch.Tensor],
    verify: Callable[[Sequence[int]], tuple[torch.Tensor, Kept]],
    keep: Callable[[Kept, int], None],
    settings: SelfSpeculation,
) -> SpeculationResult:
    """Generate AR's tokens, several per forward. The newest token is known but never in the context yet.

    Args:
        prompt: tokens the context already holds; at least 1.
        max_tokens: tokens wanted.
        first_V: logits of the context tower after the prompt, float32 [V].
        denoise: (canvas tokens, t) -> logits of the token at each position, float32 [S, V]; one denoise pass.
        verify: canvas tokens -> logits of the context tower after each, float32 [S, V], and what ``keep`` needs.
        keep: (of ``verify``, number of tokens) -> None; extends the context by the canvas's first tokens.
        settings: the request's settings.

    """

    def choose(logits_V: torch.Tensor, left: Sequence[int]) -> int:
        processed_V = settings.rules.process(logits_V.float(), prompt, left)
        return choose_token(processed_V, len(prompt) + len(left), AR_PASS, settings)

    tokens, rounds = [choose(first_V, [])], []
    hints: dict[int, tuple[int, float]] = {}
    while len(tokens) < max_tokens and tokens[-1] != settings.eos_token_id:
        canvas, num_passes = _draft_canvas(prompt, tokens, hints, denoise, settings)
        logits_SV, kept = verify(canvas)
        chosen = [choose(logits_SV[i], tokens + canvas[1 : i + 1]) for i in range(len(canvas))]
        is_right = [draft == token for draft, token in zip(canvas[1:], chosen, strict=False)]
        num_accepted = [*is_right, False].index(False)
        keep(kept, num_accepted + 1)
        rounds.append(Round(canvas=tuple(canvas), num_passes=num_passes, num_accepted=num_accepted))
        hints = _find_hints(canvas, chosen, num_accepted, logits_SV, settings)
        for token in chosen[: num_accepted + 1]:
            if len(tokens) < max_tokens and tokens[-1] != settings.eos_token_id:
                tokens.append(token)
    return SpeculationResult(token_ids=tuple(tokens), rounds=tuple(rounds))


def _draft_canvas(
    prompt: Sequence[int],
    tokens: Sequence[int],
    hints: Mapping[int, tuple[int, float]],
    denoise: Callable[[Sequence[int], float], torch.Tensor],
    settings: SelfSpeculation,
) -> tuple[list[int], int]:
    """The newest token and drafts for what follows it, and the passes they took: mask diffusion's reveals."""
    guesses = {0: (tokens[-1], 1.0), **hints}
    canvas = [guesses[i][0] if i in guesses else settings.mask_token_id for i in range(settings.canvas_length)]
    for step in range(settings.max_steps):
        masked = [i for i in range(1, len(canvas)) if canvas[i] == settings.mask_token_id]
        if not masked:
            return canvas, step
        logits_SV = denoise(canvas, noise_level(len(masked), len(canvas))).float()
        left = [*tokens[:-1], *canvas]
        start = len(tokens) - 1
        proposals = {i: propose(logits_SV[i], prompt, left[: start + i], AR_PASS, settings) for i in masked}
        guesses |= proposals
        for i in settings.choose_reveals(proposals, [guesses[i][1] for i in range(1, len(canvas))], step):
            canvas[i] = proposals[i][0]
    return canvas, settings.max_steps


def _find_hints(
    canvas: Sequence[int],
    chosen: Sequence[int],
    num_accepted: int,
    logits_SV: torch.Tensor,
    settings: SelfSpeculation,
) -> dict[int, tuple[int, float]]:
    """Of the drafts behind a rejected one, those worth keeping: position in the next canvas -> token, probability."""
    hints = {}
    for i in range(num_accepted + 2, len(canvas)):
        probability = float(logits_SV[i - 1].float().softmax(dim=-1)[canvas[i]])
        if canvas[i] == chosen[i - 1] and probability > settings.hint_threshold:
            hints[i - num_accepted - 1] = (canvas[i], probability)
    return hints
