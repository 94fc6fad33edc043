"""The server's own counters, held against what clients received."""

import re
import time
from collections.abc import Sequence

from benchmarks.soak_client import Outcome
from benchmarks.soak_requests import ONE_TOKEN_A_STEP
from tests.harness.server import read_metrics

COUNTERS = {
    "generation_tokens": "vllm:generation_tokens_total",
    "stopped": 'vllm:request_success_total{.*finished_reason="stop".*}',
    "length": 'vllm:request_success_total{.*finished_reason="length".*}',
    "aborted": 'vllm:request_success_total{.*finished_reason="abort".*}',
    "errors": 'vllm:request_success_total{.*finished_reason="error".*}',
    "preemptions": "vllm:num_preemptions_total",
    "canvases": "vllm:twotower_canvases_total",
    "denoise_passes": "vllm:twotower_denoise_passes_total",
    "context_passes": "vllm:twotower_context_passes_total",
    "committed_tokens": "vllm:twotower_committed_tokens_total",
    "canvases_with_passes": "vllm:twotower_passes_per_canvas_count",
    "passes_of_canvases": "vllm:twotower_passes_per_canvas_sum",
}
HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
SETTLE_SECONDS = 30


def metric(text: str, pattern: str) -> float:
    """The value of the one line that begins so."""
    name, _, labels = pattern.partition("{")
    where = rf"^{re.escape(name)}\{{{labels.removesuffix('}')}.*\}} (\S+)$"
    return float(re.search(where, text, re.MULTILINE)[1])


def read_counters(url: str) -> dict[str, float]:
    """After a second, in which the last step's counts arrive."""
    time.sleep(1)
    text = read_metrics(url)
    return {name: metric(text, pattern) for name, pattern in COUNTERS.items()}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was counted in between."""
    return {name: value - before[name] for name, value in after.items()}


def held(url: str) -> list[str]:
    """What the server still holds half a minute after its last request, if anything."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        text = read_metrics(url)
        found = {name: metric(text, f"vllm:{name}") for name in HELD}
        if not any(found.values()):
            return []
        if time.monotonic() > deadline:
            return [f"{name} is {value} after the last request" for name, value in found.items() if value]
        time.sleep(0.5)


def between(name: str, low: float, value: float, high: float) -> list[str]:
    """A problem unless low <= value <= high."""
    return [] if low <= value <= high else [f"the server counted {value:.0f} {name}, not {low:.0f} to {high:.0f}"]


def check_under_load(counted: dict[str, float], answered: Sequence[Outcome], left: Sequence[Outcome]) -> list[str]:
    """Requests that were left in the middle were decoded to somewhere between nothing and their end."""
    tokens, choices = received(answered)
    # and what stop strings cut off after it had been counted
    tokens_left = sum(o.request.body["max_tokens"] for o in left) + 16 * choices
    in_canvases = sum(o.num_tokens for o in answered if o.request.mode == "mask_diffusion")
    return [
        *between("generation tokens", tokens, counted["generation_tokens"], tokens + tokens_left),
        *between("finished requests", choices, counted["stopped"] + counted["length"], choices + len(left)),
        *between("aborted requests", 0, counted["aborted"], len(left)),
        *between("errors", 0, counted["errors"], 0),
        *between("committed tokens", in_canvases, counted["committed_tokens"], float("inf")),
        *check_canvases(counted),
    ]


def check_exact(counted: dict[str, float], answered: Sequence[Outcome]) -> list[str]:
    """Nobody left: everything that was counted was received."""
    tokens, choices = received(answered)
    denoised = [o for o in answered if o.request.mode == "mask_diffusion"]
    fewest = sum(-(-o.num_tokens // o.request.canvas_length) for o in denoised)
    most = fewest + sum(o.request.body["n"] for o in denoised)
    # a stop string is found in the front end, after the whole canvas has been counted, or all that was accepted of one
    stopped = [o.request for o in answered if o.request.body.get("stop")]
    cut = sum(r.canvas_length * r.body["n"] for r in stopped if r.mode not in ONE_TOKEN_A_STEP)
    return [
        *between("generation tokens", tokens, counted["generation_tokens"], tokens + cut),
        *between("finished requests", choices, counted["stopped"] + counted["length"], choices),
        *between("aborted requests and errors", 0, counted["aborted"] + counted["errors"], 0),
        *between("canvases", fewest, counted["canvases"], most),
        *check_canvases(counted),
    ]


def received(answered: Sequence[Outcome]) -> tuple[int, int]:
    """Tokens and choices that clients received."""
    return sum(o.num_tokens for o in answered), sum(o.request.body["n"] for o in answered)


def check_canvases(counted: dict[str, float]) -> list[str]:
    """What the counters of canvases say of each other."""
    canvases = counted["canvases"]
    return [
        *between("canvases in the histogram", canvases, counted["canvases_with_passes"], canvases),
        *between("passes in the histogram", canvases, counted["passes_of_canvases"], counted["denoise_passes"]),
        *between("committed tokens", canvases, counted["committed_tokens"], 16 * canvases),
    ]
