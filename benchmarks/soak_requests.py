"""What the clients of ``soak.py`` send: random good requests that can be repeated, and a few bad ones."""

import random
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SENTENCE = "Convert: 5 feet to inches, 9 days to hours. It is Monday. Ann has 21 of apple, then buys 20. How many now?"
WORDS = SENTENCE.split()
SHARED_PREFIX = "Price list\nmug: 667\ndoor: 715\ntowel: 586\norange: 976\nbrick: 107\nhat: 936\nshell: 913\n" * 2
ONE_TOKEN_A_STEP = ("ar", "mock_ar")


@dataclass(frozen=True)
class Request:
    """One request and how its client treats it."""

    path: str
    body: dict[str, Any]
    stream: bool = False
    leave_after: int | None = None
    """The client closes the connection after so many chunks."""
    refusal: str | None = None
    """What the 400 says if the request is a bad one."""

    @property
    def fate(self) -> str:
        """What becomes of it: ``answered``, ``left`` in the middle by its client, or ``refused``."""
        if self.refusal is not None:
            return "refused"
        return "answered" if self.leave_after is None else "left"

    @property
    def mode(self) -> str:
        """How it is decoded."""
        return self.body["vllm_xargs"]["diffusion_mode"]

    @property
    def canvas_length(self) -> int:
        """Tokens per canvas."""
        return self.body["vllm_xargs"].get("diffusion_canvas_length", 16)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"vllm_xargs": {"diffusion_confidence_threshold": 2}}, "diffusion_confidence_threshold=2"),
    ({"vllm_xargs": {"diffusion_mode": "fast"}}, "diffusion_mode='fast'"),
    ({"vllm_xargs": {"diffusion_canvas_length": 64}}, "diffusion_canvas_length=64"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "diffusion_mode='ar'"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"stop_token_ids": list(range(4, 140)), "min_tokens": 1}, "stop token ids"),
    ({"prompt": [5] * 600}, "512"),
    ({"prompt": [5], "vllm_xargs": {"diffusion_mode": "mock_ar"}}, "send 2 tokens or more"),
]


def draw_request(rng: random.Random) -> Request:
    """Five in six are good and are waited for."""
    fate = rng.random()
    if fate < 0.08:
        change, refusal = rng.choice(BAD)
        return Request(COMPLETIONS, {**draw_good(rng, COMPLETIONS).body, "vllm_xargs": {}, **change}, refusal=refusal)
    if fate < 0.17:
        good = draw_good(rng, COMPLETIONS)
        body = {**good.body, "max_tokens": 80, "ignore_eos": True, "n": 1, "stop": []}
        return Request(COMPLETIONS, body, stream=True, leave_after=rng.randint(0, 2))
    return draw_good(rng)


def draw_good(rng: random.Random, path: str | None = None) -> Request:
    """Greedy or with a seed: alone it is answered with the same tokens."""
    path = path or rng.choice([COMPLETIONS, COMPLETIONS, CHAT])
    mode = rng.choices(["mask_diffusion", "self_speculation", *ONE_TOKEN_A_STEP], [8, 3, 1, 1])[0]
    body: dict[str, Any] = {"model": "demo", **draw_sampling(rng), "vllm_xargs": {"diffusion_mode": mode}}
    body["max_tokens"] = rng.randint(1, 10) if mode in ONE_TOKEN_A_STEP else rng.randint(1, 40)
    if mode not in ONE_TOKEN_A_STEP:
        body["vllm_xargs"] |= draw_settings(rng)
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 60)))
    if rng.random() < 0.3:
        prompt = SHARED_PREFIX + prompt
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
    elif rng.random() < 0.2:
        body["prompt"] = [rng.randint(4, 1535) for _ in range(rng.randint(2, 300))]
    else:
        body["prompt"] = prompt
    if path == COMPLETIONS and rng.random() < 0.2:
        body["logprobs"] = rng.randint(0, 3)
    return Request(path, body, stream=rng.random() < 0.5)


def draw_settings(rng: random.Random) -> dict[str, Any]:
    """Some of the diffusion settings."""
    settings: dict[str, Any] = {}
    if rng.random() < 0.5:
        settings["diffusion_confidence_threshold"] = rng.choice([0.3, 0.6, 0.8, 0.95, 1.0])
    if rng.random() < 0.3:
        settings["diffusion_max_steps"] = rng.randint(1, 16)
    if rng.random() < 0.2:
        settings["diffusion_canvas_length"] = rng.randint(1, 16)
    return settings


def draw_sampling(rng: random.Random) -> dict[str, Any]:
    """vLLM's own sampling parameters."""
    sampling: dict[str, Any] = {"temperature": 0.0, "n": 1, "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.5:
        sampling |= {"temperature": rng.choice([0.5, 0.8, 1.0, 1.2]), "seed": rng.randrange(2**31)}
        sampling["n"] = rng.choice([1, 1, 1, 2])
        sampling |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
    sampling |= rng.choice(
        [
            {},
            {},
            {"presence_penalty": 0.7},
            {"frequency_penalty": 0.5},
            {"repetition_penalty": 1.2},
            {"logit_bias": {"262": -20}},
            {"stop": ["day", "\n"]},
            {"bad_words": ["to"]},
            {"min_tokens": 1},
        ]
    )
    return sampling
