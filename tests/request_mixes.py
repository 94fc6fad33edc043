"""Random mixes of requests, drawn from a seed: who asks for what, who comes when, who goes early.

``play`` runs a mix through an engine, request by request as they arrive, and measures how long each waited between two
of its own steps. The same code makes the small runs of ``make test`` and the long ones of ``make mixes``.
"""

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.harness.engine import Engine
from vllm_twotower import diffusion_params
from vllm_twotower.core import Mode
from vllm_twotower.runtime.policy import MAX_CONTEXT_STEPS, StepPolicy

VOCAB = 512
CANVAS = 16
LONGEST_PROMPT = 300
"""Two KV blocks and a bit."""


@dataclass(frozen=True)
class MixedRequest:
    prompt: list[int]
    settings: dict[str, Any]
    """Keyword arguments of ``diffusion_params``."""
    arrives: int
    """Engine step before which it is added."""
    leaves: int | None
    """Engine step before which it is aborted, if it is still there."""

    @property
    def mode(self) -> Mode:
        return Mode(self.settings["mode"])

    @property
    def writes_as_ar(self) -> bool:
        """Whether the tokens are the context tower's own."""
        return self.mode in (Mode.AR, Mode.SELF_SPECULATION)

    def params(self) -> Any:
        return diffusion_params(**self.settings, detokenize=False)


@dataclass(frozen=True)
class Played:
    tokens: list[list[int]]
    """What each request got; of one that left, as much as it had."""
    left: list[bool]
    """Whether it was aborted before it ended."""
    longest_wait: int
    """Engine steps between two steps of one request, at most."""
    longest_queue: int
    """Engine steps from a request's arrival to its first step, at most."""
    num_steps: int


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw_mix(seed: int, size: int | None = None) -> list[MixedRequest]:
    """Requests in the order of their arrival; the same for the same seed."""
    rng = random.Random(seed)
    shared = [rng.randrange(4, VOCAB) for _ in range(LONGEST_PROMPT)]
    one_by_one = rng.choice([0.0, 0.15, 0.5])  # such rows take every context step, and leave the quorum no say
    mix = []
    for _ in range(size or rng.randint(3, 12)):
        others = [Mode.MOCK_AR, Mode.AR, Mode.SELF_SPECULATION]
        mode = rng.choice(others) if rng.random() < one_by_one else Mode.MASK_DIFFUSION
        arrives = rng.choice([0, 0, rng.randint(0, 40)])
        leaves = arrives + rng.randint(1, 12) if rng.random() < 0.15 else None
        mix.append(MixedRequest(_prompt(rng, shared, mode), _settings(rng, mode), arrives, leaves))
    return sorted(mix, key=lambda r: r.arrives)


def _prompt(rng: random.Random, shared: list[int], mode: Mode) -> list[int]:
    length = rng.choice(
        [
            rng.randint(1, 40),
            rng.randint(1, LONGEST_PROMPT),
            rng.choice([1, 15, 16, 17, 112, 113, 127, 128, 129, 255, 256, 257]),
        ]
    )
    length = max(length, 2) if mode is Mode.MOCK_AR else length
    num_shared = rng.choice([0, rng.randint(0, length), length])
    return shared[:num_shared] + [rng.randrange(VOCAB) for _ in range(length - num_shared)]


def _settings(rng: random.Random, mode: Mode) -> dict[str, Any]:
    one_by_one = mode in (Mode.MOCK_AR, Mode.AR)
    is_short = mode is not Mode.MASK_DIFFUSION  # on random weights drafts are wrong
    settings: dict[str, Any] = {
        "mode": mode.value,
        "temperature": rng.choice([0.0, 0.0, 0.3, 1.0, 2.0]),
        "seed": rng.randrange(2**40),
        "max_tokens": rng.randint(1, 10) if is_short else rng.randint(1, 60),
        "ignore_eos": rng.random() < 0.5,
    }
    if not one_by_one:
        drafts = mode is Mode.SELF_SPECULATION
        settings["canvas_length"] = rng.choice([CANVAS] * 4 + [2 if drafts else 1, 5, 8, 15])
        settings["max_steps"] = rng.choice([1, 1, 2, 4] if drafts else [16, 16, 1, 2, 4, 7, 40])
        settings["confidence_threshold"] = rng.choice([0.05, 0.3, 0.5, 0.8, 0.8, 0.95, 1.0])
    some = rng.sample(range(4, VOCAB), 40)
    extras = {
        "stop_token_ids": some[:5],
        "presence_penalty": rng.choice([-1.0, 0.7, 1.9]),
        "frequency_penalty": rng.choice([-0.5, 0.4, 1.5]),
        "repetition_penalty": rng.choice([0.8, 1.2, 2.0]),
        "logit_bias": {token: rng.uniform(-8, 8) for token in some[:10]},
        "allowed_token_ids": some,
        "top_k": rng.choice([1, 5, 50]),
        "top_p": rng.choice([0.3, 0.9]),
        "min_p": rng.choice([0.02, 0.3]),
        "logprobs": 2,
    }
    for name in rng.sample(list(extras), rng.choice([0, 0, 1, 2, 4])):
        settings[name] = extras[name]
    if rng.random() < 0.2:
        settings["min_tokens"] = rng.randint(0, settings["max_tokens"])
    return settings


# ---- playing ---------------------------------------------------------------------------------------------------------


def set_timing(e: Engine, commit_quorum: float, passes_per_step: int) -> None:
    """What the engine options of these names set at start; between two mixes, when nothing runs."""
    assert not e.llm.llm_engine.has_unfinished_requests()
    e.scheduler.step_policy = StepPolicy(commit_quorum)
    e.runner.model_state.loop.passes_per_step = passes_per_step


def alone(e: Engine, request: MixedRequest) -> list[int]:
    """The request's tokens with the engine to itself, from an empty prefix cache; self-speculation's are AR's."""
    e.llm.reset_prefix_cache()
    mode = {"mode": Mode.AR.value} if request.writes_as_ar else {}
    params = diffusion_params(**{**request.settings, **mode}, detokenize=False)
    return e.tokens([request.prompt], params)[0]


def play(e: Engine, mix: list[MixedRequest], max_steps: int = 800) -> Played:
    """Run a mix; fails if it takes more than ``max_steps`` engine steps."""
    core = e.llm.llm_engine
    tokens: dict[int, list[int]] = {}
    aborted: set[int] = set()
    added = 0
    with _waits(e) as (waits, queued):
        for step in range(max_steps):
            while added < len(mix) and (mix[added].arrives <= step or not core.has_unfinished_requests()):
                core.add_request(str(added), {"prompt_token_ids": mix[added].prompt}, mix[added].params())
                added += 1
            gone = [i for i in range(added) if mix[i].leaves is not None and mix[i].leaves <= step and i not in tokens]
            for index in set(gone) - aborted:
                tokens[index] = _so_far(e, str(index))
                aborted.add(index)
                core.abort_request([str(index)])
            if not core.has_unfinished_requests() and added == len(mix):
                break
            for output in core.step():
                if output.finished:
                    tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        else:
            core.abort_request([str(i) for i in range(added) if i not in tokens])
            raise AssertionError(f"requests {sorted(set(range(len(mix))) - set(tokens))} are not done in {step} steps")
    return Played(
        [tokens[i] for i in range(len(mix))],
        [i in aborted for i in range(len(mix))],
        max(waits.values(), default=0),
        max(queued.values(), default=0),
        step,
    )


def _so_far(e: Engine, request_id: str) -> list[int]:
    return next(list(r.output_token_ids) for i, r in e.scheduler.requests.items() if i.startswith(f"{request_id}-"))


@contextlib.contextmanager
def _waits(e: Engine) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """The longest distance between two steps of each request, in engine steps, 1 for one that is in every step; and
    the distance of its first step from its arrival."""
    schedule, longest, queued, arrived, last, count = e.scheduler.schedule, {}, {}, {}, {}, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        for req_id in e.scheduler.requests:
            arrived.setdefault(req_id, count)
        output = schedule(*args, **kwargs)
        count += 1
        for req_id in output.num_scheduled_tokens:
            queued.setdefault(req_id, count - arrived[req_id])
            longest[req_id] = max(longest.get(req_id, 0), count - last.get(req_id, count))
            last[req_id] = count
        return output

    e.scheduler.schedule = watched
    try:
        yield longest, queued
    finally:
        e.scheduler.schedule = schedule


def longest_wait_allowed(mix: list[MixedRequest], passes_per_step: int) -> int:
    """Engine steps between two steps of one request where every step has room for everybody (runtime/policy.py).

    A prompt or an AR row waits for one denoise step, an unfinished canvas for ``MAX_CONTEXT_STEPS`` context steps, a
    finished one for the slowest canvas beside it: the denoise steps that its passes take. What comes in between, a
    newcomer's prompt for example, is a context step, and that takes finished canvases along.
    """
    passes = [min(r.settings["max_steps"], r.settings["canvas_length"]) for r in mix if "max_steps" in r.settings]
    slowest = math.ceil(max(passes, default=1) / passes_per_step)
    return 1 + max(1, MAX_CONTEXT_STEPS, slowest)


def longest_queue_allowed(mix: list[MixedRequest], prefix_caching: bool) -> int:
    """Engine steps from arrival to the first step, inclusive, where there is room for everybody.

    A newcomer is taken in by the next step, or by the one after a denoise step that ``MAX_CONTEXT_STEPS`` context steps
    have put off. vLLM keeps the queue back while a prefix that its first one shares is written: two context steps, and
    the denoise step that may follow them, for each prompt that comes at the same time or just before.
    """
    turn = MAX_CONTEXT_STEPS + 1
    before = max(sum(0 <= late.arrives - r.arrives <= turn for r in mix) - 1 for late in mix)
    return 2 + turn * before if prefix_caching else 2
