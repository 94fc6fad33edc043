"""A server with split towers under random load, and clients that leave: every answer as if alone, nothing kept."""

import concurrent.futures
import json
import pathlib
import random
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.harness.server import read_metrics, vllm_server
from vllm_twotower.commands.cli import DEMO_MODEL

OPTIONS = ["--diffusion", '{"passes_per_step": 16, "tower_placement": "split"}', "--tensor-parallel-size", "2"]
OPTIONS += ["--served-model-name", "demo"]
OPTIONS += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]
OPTIONS += ["--num-gpu-blocks-override", "20"]  # so few that requests are preempted and the warm-up touches all of them
MOST_TOKENS = 64
"""Of a step: on a CPU every number of tokens that a step has for the first time leaves 1 to 2 MiB of oneDNN's compiled
products behind, so the warm-up has them all."""
OPTIONS += ["--max-num-batched-tokens", str(MOST_TOKENS)]
NUM_CLIENTS = 12
"""More than the engine has places: some requests leave the queue."""
MOST_GROWTH_MIB, MOST_GROWTH_MIB_ALONE = 40, 1
"""Of each worker's memory: in all after a warm-up of the same kind, and in the last round of one request after the
other. Of its files' pages the system keeps what it likes: they do not count."""
MOST_ROUNDS_ALONE = 4
"""How often the requests are sent one after the other until one round adds next to nothing. When a draft pays is
measured, so on a busy machine a verification may ask for a number of logits that no step had before, at 1 to 10 MiB
once; what is leaked is leaked by every round."""
TEXTS = [random.Random(name).choices(range(3, 1024), k=200) for name in ("one", "two")]


@dataclass(frozen=True)
class Visit:
    """A request, and when its client leaves."""

    body: dict[str, Any]
    leaves_after: int | None
    """Chunks that the client reads before it closes the connection; None: it stays."""
    patience: float
    """Seconds that it waits for the first chunk if it reads none."""


def draw(rng: random.Random) -> Visit:
    mode = rng.choices(("mask_diffusion", "self_speculation", "ar", "mock_ar"), (6, 3, 1, 1))[0]
    leaves_after = rng.choice((0, 1, 2)) if rng.random() < 0.3 else None
    most = 48 if mode in ("mask_diffusion", "self_speculation") else 6
    xargs = {"diffusion_mode": mode}
    if mode == "mask_diffusion":
        xargs |= {
            "diffusion_max_steps": rng.choice((1, 2, 8)),
            "diffusion_confidence_threshold": rng.choice((0.3, 1.0)),
        }
    body = {
        "model": "demo",
        "prompt": rng.choice(TEXTS)[: rng.randint(2, 200)],
        "max_tokens": rng.randint(1, most) if leaves_after is None else 100,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": xargs,
        **rng.choice(({"temperature": 0.0}, {"temperature": 0.9, "seed": rng.randrange(1000)})),
        **rng.choice(({}, {"logprobs": 1})),
    }
    return Visit(body, leaves_after, rng.uniform(0.05, 2.0))


def tokens(url: str, visit: Visit) -> list[int]:
    """All tokens of a visit, or those that came before its client left."""
    read: list[int] = []
    timeout = httpx.Timeout(180, read=visit.patience if visit.leaves_after == 0 else 180)
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=visit.body, timeout=timeout) as answer:
            assert answer.status_code == 200, answer.read()
            num_chunks = 0
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    read += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                    num_chunks += 1
                if num_chunks == visit.leaves_after:
                    break
    except httpx.ReadTimeout:
        if visit.leaves_after != 0:
            raise
    return read


def warm_up(url: str, visits: list[Visit]) -> None:
    for length in range(1, MOST_TOKENS + 1):
        body = {"model": "demo", "prompt": TEXTS[0][:length], "max_tokens": 1, "vllm_xargs": {"diffusion_mode": "ar"}}
        httpx.post(f"{url}/v1/completions", json=body, timeout=180).raise_for_status()
    together(url, visits)


def together(url: str, visits: list[Visit]) -> list[list[int]]:
    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return list(pool.map(lambda visit: tokens(url, visit), visits))


def alone(url: str, visits: list[Visit]) -> list[list[int]]:
    """One at a time; a salt of its own keeps each from reading what others left in the prefix cache."""
    return [tokens(url, Visit({**v.body, "cache_salt": str(uuid.uuid4())}, None, 0)) for v in visits]


def metrics(url: str) -> dict[str, float]:
    found = re.findall(r"^vllm:(\w+)\{[^}]*\} (\S+)$", read_metrics(url), re.MULTILINE)
    return {name: float(value) for name, value in found}


def memory_mib(log: pathlib.Path) -> list[float]:
    """Of the context rank, then of the denoiser rank."""
    pids = [re.search(rf"\(VllmWorker-{rank} pid=(\d+)\)", log.read_text())[1] for rank in (0, 1)]
    status = [pathlib.Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return [int(re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024 for text in status]


def grew_by(before: list[float], after: list[float]) -> float:
    """MiB by which that worker grew that grew most, between two readings of ``memory_mib``."""
    return max(b - a for a, b in zip(before, after, strict=True))


@pytest.mark.usefixtures("two_cpu_workers")
@pytest.mark.parametrize("num_requests", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_random_requests_and_clients_that_leave(num_requests, tmp_path):
    log, rng = tmp_path / "log", random.Random(num_requests)
    visits = [draw(rng) for _ in range(num_requests)]
    stayed = [i for i, visit in enumerate(visits) if visit.leaves_after is None]
    assert 0.5 * num_requests < len(stayed) < num_requests
    with vllm_server(DEMO_MODEL, *OPTIONS, log=log) as url:
        warm_up(url, [draw(rng) for _ in range(max(8, num_requests // 4))])
        warm, started = memory_mib(log), time.monotonic()
        answers = together(url, visits)
        seconds = time.monotonic() - started
        after_load = metrics(url)
        memory, rounds = [memory_mib(log)], []
        for _ in range(MOST_ROUNDS_ALONE):
            rounds.append(alone(url, [visits[i] for i in stayed]))
            memory.append(memory_mib(log))
            if grew_by(*memory[-2:]) < MOST_GROWTH_MIB_ALONE:
                break
        idle = metrics(url)
    print(f"{num_requests} requests, {len(stayed)} of them to the end, in {seconds:.0f} s; MiB {[warm, *memory]}")
    hits, preemptions = after_load["prefix_cache_hits_total"], after_load["num_preemptions_total"]
    print(f"{hits:.0f} tokens hit the prefix cache, {preemptions:.0f} preemptions")
    expected = [answers[i] for i in stayed]
    assert rounds == [expected] * len(rounds)
    assert [len(t) for t in expected] == [visits[i].body["max_tokens"] for i in stayed]
    assert hits > 0
    assert preemptions > 0 or num_requests < 200
    held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert {name: idle[name] for name in held} == dict.fromkeys(held, 0)
    assert max(grew_by(warm, after) for after in memory) < MOST_GROWTH_MIB
    assert grew_by(*memory[-2:]) < MOST_GROWTH_MIB_ALONE
