"""The whole algorithm on one screen: one prompt, one canvas at a time, the model passed in as callables.

This is the oracle. The engine's batched, paged, step-wise decoding must produce these tokens with this many passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_twotower.core import DEFAULT_CANVAS_LENGTH, DEFAULT_CONFIDENCE_THRESHOLD, DEFAULT_MAX_STEPS, MASK_TOKEN_ID
from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.decoding.noise_level import noise_level
from vllm_twotower.oracle.logits_rules import LogitsRules


@dataclass(frozen=True)
class CanvasSnapshot:
    """One canvas as it stood before one denoise pass."""

    tokens: tuple[int, ...]
    """Canvas tokens, the mask id where undecided."""
    noise_level: float
    """Masked fraction of the canvas: t in [0, 1]."""


@dataclass(frozen=True)
class DecodingResult:
    """What a decoding loop produced for one prompt."""

    token_ids: tuple[int, ...]
    """Generated tokens, whole canvases, not trimmed at an end-of-sequence token."""
    num_denoise_passes: int
    """Denoiser forwards used (the reference's ``_last_nfe``)."""
    canvases: tuple[tuple[CanvasSnapshot, ...], ...] = ()
    """For each canvas, its snapshot before each pass."""


@dataclass(frozen=True, kw_only=True)
class MaskDiffusion:
    """Mask-diffusion settings of one request; names and meaning as in ``diffusion_params``."""

    canvas_length: int = DEFAULT_CANVAS_LENGTH
    max_steps: int = DEFAULT_MAX_STEPS
    confidence_threshold: float = DEFAULT_CONFIDENCE_THRESHOLD
    temperature: float = 0.0
    seed: int = 0
    mask_token_id: int = MASK_TOKEN_ID
    eos_token_id: int | None = None
    """A canvas that contains it is the last."""
    rules: LogitsRules = field(default_factory=LogitsRules)


def generate_mask_diffusion(
    prompt: Sequence[int],
    max_tokens: int,
    denoise: Callable[[Sequence[int], float], torch.Tensor],
    commit: Callable[[Sequence[int]], object],
    settings: MaskDiffusion,
) -> DecodingResult:
    """Generate whole canvases until ``max_tokens`` are there (reference: ``generate_mask_diffusion``).

    Args:
        prompt: tokens the context already holds; at least 1.
        max_tokens: tokens wanted; the last canvas is denoised whole, so more can come back.
        denoise: (canvas tokens, t) -> logits, float32 [S, V]; one denoise pass.
        commit: canvas tokens -> None; extends the context.
        settings: the request's settings.

    """
    tokens: list[int] = []
    canvases: list[tuple[CanvasSnapshot, ...]] = []
    while len(tokens) < max_tokens:
        canvas = [settings.mask_token_id] * settings.canvas_length
        snapshots: list[CanvasSnapshot] = []
        for step in range(settings.max_steps):
            masked = [i for i, token in enumerate(canvas) if token == settings.mask_token_id]
            if not masked:
                break
            level = noise_level(len(masked), len(canvas))
            snapshots.append(CanvasSnapshot(tuple(canvas), level))
            logits = denoise(canvas, level).float()
            proposals = {i: propose(logits[i], prompt, tokens + canvas[:i], step, settings) for i in masked}
            for i in positions_to_reveal(proposals, step, settings):
                canvas[i] = proposals[i][0]
        commit(canvas)
        tokens += canvas
        canvases.append(tuple(snapshots))
        if settings.eos_token_id in canvas:
            break
    return DecodingResult(tuple(tokens), sum(len(c) for c in canvases), tuple(canvases))


def propose(
    logits_V: torch.Tensor, prompt: Sequence[int], left: Sequence[int], pass_index: int, settings: MaskDiffusion
) -> tuple[int, float]:
    """The proposed token and its untempered probability, the mask id excluded; ``left`` is what was generated."""
    logits_V = settings.rules.process(logits_V, prompt, left)
    logits_V[settings.mask_token_id] = float("-inf")
    token = choose_token(logits_V, len(prompt) + len(left), pass_index, settings)
    return token, float(logits_V.softmax(dim=-1)[token])


def choose_token(logits_V: torch.Tensor, position: int, pass_index: int, settings: MaskDiffusion) -> int:
    """The likeliest token or, with a temperature, the one that the request's noise at this position and pass picks."""
    if settings.temperature == 0:
        return int(logits_V.argmax())
    seed, at, pass_at = torch.tensor([[settings.seed], [position], [pass_index]], device=logits_V.device)
    shaped_V = settings.rules.shape(logits_V / settings.temperature)
    return int((shaped_V + gumbel_noise(seed, at, pass_at, logits_V.shape[0])[0]).argmax())


def positions_to_reveal(proposals: dict[int, tuple[int, float]], step: int, settings: MaskDiffusion) -> list[int]:
    """The k surest positions, ties to the lowest; k = max(#(confidence > threshold), 1, ceil(masked / passes left))."""
    num_sure = sum(confidence > settings.confidence_threshold for _, confidence in proposals.values())
    num_due = -(-len(proposals) // (settings.max_steps - step))
    surest_first = sorted(proposals, key=lambda i: (-proposals[i][1], i))
    return surest_first[: max(num_sure, num_due, 1)]


def generate_greedy(
    first: torch.Tensor, step: Callable[[int], torch.Tensor], max_tokens: int, mask_token_id: int | None = None
) -> DecodingResult:
    """One token at a time, greedily: ``ar`` and ``mock_ar`` (reference: ``generate_ar``, ``generate_mock_ar``).

    Here ``mock_ar`` never writes the mask id. NVIDIA's ``generate_mock_ar`` is a plain argmax and can; what it then
    writes is no text.

    Args:
        first: float [V], logits of the first new token.
        step: new token -> logits [V] of the token after it.
        max_tokens: tokens to generate.
        mask_token_id: never chosen, for ``mock_ar``; None for ``ar``, whose tower knows no mask.

    """
    logits = first
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        if tokens:
            logits = step(tokens[-1])
        if mask_token_id is not None:
            logits = logits.index_fill(0, torch.tensor(mask_token_id, device=logits.device), float("-inf"))
        tokens.append(int(logits.argmax()))
    return DecodingResult(tuple(tokens), 0)
