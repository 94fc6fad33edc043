"""Differences that fp32 may make: tokens that the plain reference writes too if decisions nearer than ``NEAR`` fall the
other way.

Beside other requests a logit is summed in another order than alone, and its last bits differ. Where two candidates, two
confidences, or a confidence and the threshold are nearer than that, either outcome is right; what follows from it must
still be what the reference writes. So a difference is judged by replaying the request over plain towers, in both ways.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from tests.request_mixes import MixedRequest
from vllm_twotower.core import MASK_TOKEN_ID, Mode
from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.decoding.noise_level import noise_level
from vllm_twotower.oracle.logits_rules import LogitsRules
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower

NEAR = 1e-5
MAX_PASSES = 1000
"""Denoise passes of one replay, over all ways it tries; 64 are a long request's one way."""

EOS = 2


@dataclass(frozen=True)
class Proposal:
    token: int
    confidence: float
    tie: tuple[str, ...] = ()
    """What makes this token as good as the reference's own; empty for that."""


def check_same(
    model: PlainTwoTower, request: MixedRequest, tokens: list[int], alone: list[int], left: bool, where: str
) -> bool:
    """Whether tokens are those of the request alone; where they are not, prints the near-ties that make it legal, or
    fails."""
    alone_so_far = alone[: len(tokens)] if left else alone
    if tokens == alone_so_far:
        return True
    ties = legal_ties(model, request, tokens, alone, left)
    at = next((i for i, pair in enumerate(zip(tokens, alone, strict=False)) if pair[0] != pair[1]), None)
    message = f"{where}, from token {at} on: {tokens} and alone {alone}, {request}"
    assert ties, f"no near-tie explains {message}"
    print(f"legal: {'; '.join(ties)}: {message}", flush=True)
    return False


def legal_ties(
    model: PlainTwoTower, request: MixedRequest, tokens: list[int], alone: list[int], left: bool = False
) -> list[str] | None:
    """The near-ties that make one request's two results both right, or None if one of them is wrong."""
    ties = replay(model, request, tokens, not left)
    if ties is None:
        return None
    ties_alone = replay(model, request, alone)
    return None if ties_alone is None else [*ties, *ties_alone]


def can_replay(request: MixedRequest) -> bool:
    """Sampled AR has vLLM's own noise, so a difference there is never legal."""
    return not request.writes_as_ar or request.settings["temperature"] == 0


def replay(
    model: PlainTwoTower, request: MixedRequest, tokens: Sequence[int], is_whole: bool = True
) -> list[str] | None:
    """The near-ties that must fall the other way for the reference to write these tokens; None if it never does."""
    if not can_replay(request) or (is_whole and not _ends_where_it_must(request, tokens)):
        return None
    with torch.inference_mode():
        if request.mode is Mode.MASK_DIFFUSION:
            cache = ContextCache()
            model.extend_context(torch.tensor([request.prompt]), cache)
            return _CanvasReplay(model, request, tokens).canvas_at(0, cache)
        return _one_by_one(model, request, tokens)


def _ends_where_it_must(request: MixedRequest, tokens: Sequence[int]) -> bool:
    settings = request.settings
    stops = {*settings.get("stop_token_ids", []), *([] if settings["ignore_eos"] else [EOS])}
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), settings["max_tokens"])
    return len(tokens) == end


# ---- one position ----------------------------------------------------------------------------------------------------


def _proposals(logits_V: torch.Tensor, request: MixedRequest, left: list[int], pass_index: int) -> list[Proposal]:
    """What one position may propose, the reference's own choice first."""
    settings = request.settings
    rules = {f.name: settings[f.name] for f in fields(LogitsRules) if f.name in settings}
    rules = LogitsRules(**{**rules, "stop_token_ids": [*settings.get("stop_token_ids", []), EOS]})
    logits_V = rules.process(logits_V, request.prompt, left)
    if not request.writes_as_ar:
        logits_V[MASK_TOKEN_ID] = float("-inf")
    score_V, position = logits_V, len(request.prompt) + len(left)
    if settings["temperature"] > 0:
        at = (torch.tensor([n]) for n in (settings["seed"], position, pass_index))
        score_V = rules.shape(logits_V / settings["temperature"]) + gumbel_noise(*at, len(logits_V))[0]
    probability_V, own = logits_V.softmax(dim=-1), int(score_V.argmax())
    near = [own, *(int(t) for t in (score_V >= score_V[own] - NEAR).nonzero() if t != own)]
    return [
        Proposal(token, float(probability_V[token]), _token_tie(score_V, position, own, token) if token != own else ())
        for token in near
    ]


def _token_tie(score_V: torch.Tensor, position: int, own: int, token: int) -> tuple[str, ...]:
    return (f"position {position}: logits {score_V[own]:.7f} of token {own} and {score_V[token]:.7f} of {token}",)


def _one_by_one(model: PlainTwoTower, request: MixedRequest, tokens: Sequence[int]) -> list[str] | None:
    whole, ties, cache = [*request.prompt, *tokens], [], ContextCache()
    before, num_prompt = whole[: len(request.prompt) - 1], len(request.prompt)
    if before:
        model.extend_context(torch.tensor([before]), cache)
    for index, token in enumerate(tokens):
        last_B1 = torch.tensor([[whole[num_prompt + index - 1]]])
        hidden = model.extend_context(last_B1, cache)
        logits = model.context_logits(hidden) if request.writes_as_ar else model.mock_ar(last_B1, cache)
        proposals = {p.token: p for p in _proposals(logits[0, -1], request, list(tokens[:index]), 0)}
        if token not in proposals:
            return None
        ties += proposals[token].tie
    return ties


# ---- canvases --------------------------------------------------------------------------------------------------------


class _CanvasReplay:
    """A search through what each pass may reveal, along the tokens that came out."""

    def __init__(self, model: PlainTwoTower, request: MixedRequest, tokens: Sequence[int]) -> None:
        self.model, self.request, self.tokens = model, request, list(tokens)
        self.num_passes = 0

    def canvas_at(self, start: int, cache: ContextCache) -> list[str] | None:
        """The ties of the canvas that begins at the ``start``-th token, and of those after it."""
        if start >= len(self.tokens):
            return []
        return self._pass(start, [MASK_TOKEN_ID] * self.request.settings["canvas_length"], 0, cache)

    def _pass(self, start: int, canvas: list[int], step: int, cache: ContextCache) -> list[str] | None:
        masked = [i for i, token in enumerate(canvas) if token == MASK_TOKEN_ID]
        if not masked:
            extended = ContextCache(dict(cache.attention), dict(cache.mamba), dict(cache.previous))
            self.model.extend_context(torch.tensor([canvas]), extended)
            return self.canvas_at(start + len(canvas), extended)
        self.num_passes += 1
        if self.num_passes > MAX_PASSES:
            return None
        level = noise_level(len(masked), len(canvas))
        logits_SV = self.model.denoise(torch.tensor([canvas]), torch.tensor([level]), cache)[0]
        written = self.tokens[:start]
        choices = [_proposals(logits_SV[i], self.request, written + canvas[:i], step) for i in masked]
        for combination in itertools.product(*choices):
            proposals = dict(zip(masked, combination, strict=True))
            for revealed, ties in reveals(proposals, step, self.request.settings):
                if all(self._came_out(start + i, proposals[i].token) for i in revealed):
                    next_canvas = [proposals[i].token if i in revealed else t for i, t in enumerate(canvas)]
                    later = self._pass(start, next_canvas, step + 1, cache)
                    if later is not None:
                        return [*(t for p in combination for t in p.tie), *ties, *later]
        return None

    def _came_out(self, index: int, token: int) -> bool:
        """Nothing is known of what a canvas has behind the request's end."""
        return index >= len(self.tokens) or self.tokens[index] == token


def reveals(proposals: dict[int, Proposal], step: int, settings: dict) -> Iterator[tuple[list[int], list[str]]]:
    """Positions that a pass may reveal, and the near-ties that make it so; the reference's own choice first."""
    confidence, threshold = {i: p.confidence for i, p in proposals.items()}, settings["confidence_threshold"]
    num_due = max(1, -(-len(proposals) // (settings["max_steps"] - step)))
    surest = sorted(proposals, key=lambda i: (-confidence[i], i))

    def count(margin: float) -> int:
        return max(num_due, sum(c > threshold + margin for c in confidence.values()))

    own = count(0)
    for number in dict.fromkeys([own, *range(count(NEAR), count(-NEAR) + 1)]):
        ties = [
            f"canvas position {i}: confidence {confidence[i]:.7f}, threshold {threshold}"
            for i in surest[min(own, number) : max(own, number)]
        ]
        edge = confidence[surest[number - 1]]
        sure = [i for i in surest if confidence[i] > edge + NEAR]
        close = [i for i in surest if abs(confidence[i] - edge) <= NEAR]
        for chosen in itertools.combinations(close, number - len(sure)):
            others = [i for i in close[: len(chosen)] if i not in chosen]
            order = [
                f"canvas positions {i} and {j}: confidences {confidence[i]:.7f} and {confidence[j]:.7f}"
                for i, j in zip(others, [i for i in chosen if i not in close[: len(chosen)]], strict=True)
            ]
            yield [*sure, *chosen], [*ties, *order]
