"""A real server under full load for half an hour, with everything that clients do to it at once.

    python -m benchmarks.soak                         # 30 minutes, a new seed
    python -m benchmarks.soak --minutes 3 --seed 7
    python -m benchmarks.soak --write                 # also benchmarks/results/soak.json and soak.md

More clients than the engine has places send random requests (``soak_requests.py``): four modes, many settings, short
and long, streamed and not, some left in the middle, some bad. Fails unless every good request is answered, every bad
one refused, a sample gives the same text when sent alone, the counters add up, nothing is held afterwards, and memory
does not grow.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.machine import described, environment
from benchmarks.paths import DEMO, RESULTS, ROOT
from benchmarks.soak_client import ANSWER_SECONDS, Outcome, ask
from benchmarks.soak_metrics import check_exact, check_under_load, grown, held, read_counters
from benchmarks.soak_requests import draw_request
from tests.harness.server import processes_of, vllm_server

MAX_MODEL_LEN = 512
COMMAND = (
    f"vllm serve {DEMO} --diffusion '{{\"passes_per_step\": 8}}' --served-model-name demo --dtype float32"
    f" --max-model-len {MAX_MODEL_LEN} --max-num-seqs 16 --enforce-eager --num-gpu-blocks-override 28"
)
"""The KV cache is small: some requests are preempted, and the warm-up touches all of it (a page counts as memory from
its first use on)."""
NUM_CLIENTS = 24
MOST_PROBLEMS = 50
"""After these there is no point in going on."""
SAMPLE_SIZE = 40
WARM_UP = 0.25
"""Part of the time after which memory is watched: allocators and caches have grown to their size by then."""
MAX_GROWTH_MIB = 64
"""Of all processes together, from the first tenth after the warm-up to the last tenth."""
SHORTEST_WATCHED = 10 * 60
"""Seconds; in a shorter run caches are still filling at the end, and the growth is reported only."""


@dataclass
class Record:
    """What happened to all of them; filled in by several threads."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_problems: int = 0
    rss_mib: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and the sum over all processes."""

    def of(self, what: str) -> list[Outcome]:
        """``answered``, ``left`` or ``refused`` ones without a problem."""
        return [o for o in self.outcomes if o.request.fate == what and o.problem is None]

    @property
    def problems(self) -> list[str]:
        """One line each."""
        return [f"{o.problem}: {json.dumps(o.request.body)[:300]}" for o in self.outcomes if o.problem is not None]


# ---- the load --------------------------------------------------------------------------------------------------------


def run_client(url: str, seed: str, until: float, record: Record) -> None:
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        while time.monotonic() < until:
            outcome = ask(client, draw_request(rng))
            record.outcomes.append(outcome)
            if outcome.problem is not None:
                record.num_problems += 1
                time.sleep(1)  # a dead server refuses thousands of requests a second
            if record.num_problems > MOST_PROBLEMS:
                return


def fill_caches(url: str) -> None:
    """A prompt of every length, each a step of another size; before memory is watched.

    vLLM's matrix products on a CPU (oneDNN) keep what they compiled for each number of tokens, the newest 128 a layer:
    some 200 MiB once a few hundred sizes have been seen, which would otherwise look like a leak for half an hour.
    """
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        for length in range(1, MAX_MODEL_LEN - 1):
            body = {"model": "demo", "prompt": [5 + (length + i) % 1000 for i in range(length)], "max_tokens": 1}
            client.post("/v1/completions", json={**body, "vllm_xargs": {"diffusion_mode": "ar"}}).raise_for_status()


def watch_memory(processes: list[psutil.Process], record: Record, over: threading.Event) -> None:
    started = time.monotonic()
    while not over.wait(1.0):
        rss_mib = [p.memory_info().rss / 2**20 for p in processes if p.is_running()]
        seconds = time.monotonic() - started
        record.rss_mib.append((seconds, sum(rss_mib)))
        if len(record.rss_mib) % 60 == 0:
            shown = " + ".join(f"{mib:.0f}" for mib in rss_mib)
            print(f"{seconds / 60:.1f} minutes, {len(record.outcomes)} requests, {shown} MiB", flush=True)


def load(url: str, processes: list[psutil.Process], seconds: float, seed: int) -> Record:
    record, over = Record(), threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(processes, record, over))
    watcher.start()
    try:
        until = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [pool.submit(run_client, url, f"{seed}-{i}", until, record) for i in range(NUM_CLIENTS)]
            for client in clients:
                client.result()
    finally:
        over.set()
        watcher.join()
    return record


# ---- checks ----------------------------------------------------------------------------------------------------------


def growth_mib(rss_mib: list[tuple[float, float]]) -> float:
    """From the first tenth after the warm-up to the last tenth."""
    after = [mib for _, mib in rss_mib[int(WARM_UP * len(rss_mib)) :]]
    tenth = max(1, len(after) // 10)
    return statistics.median(after[-tenth:]) - statistics.median(after[:tenth])


def ask_alone(url: str, sample: list[Outcome]) -> tuple[Record, list[str]]:
    """The sample again, one request at a time."""
    record, different = Record(), []
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        for outcome in sample:
            alone = ask(client, outcome.request)
            record.outcomes.append(alone)
            if (alone.texts, alone.num_tokens) != (outcome.texts, outcome.num_tokens):
                body = json.dumps(outcome.request.body)
                different.append(f"alone {alone.texts}, under load {outcome.texts}: {body}")
    return record, different


def soak(url: str, log: pathlib.Path, seconds: float, seed: int) -> dict[str, Any]:
    """Load a running server and check it; ``problems`` of what is returned is empty if all is well."""
    is_watched = seconds >= SHORTEST_WATCHED
    if is_watched:
        fill_caches(url)
    processes, start = processes_of(log), read_counters(url)
    record = load(url, processes, seconds, seed)
    result = {"seed": seed, "minutes": round(seconds / 60, 2), "clients": NUM_CLIENTS, **summary(record, seconds)}
    problems = record.problems
    if dead := [p.pid for p in processes if not p.is_running()]:
        return {**result, "problems": [f"processes {dead} ended", *problems]}
    problems += held(url)
    loaded = read_counters(url)
    result["counted_by_server"] = grown(start, loaded)
    problems += check_under_load(result["counted_by_server"], record.of("answered"), record.of("left"))
    sample = random.Random(seed).sample(record.of("answered"), min(SAMPLE_SIZE, result["answered"]))
    alone, different = ask_alone(url, sample)
    problems += alone.problems + different + held(url)
    problems += check_exact(grown(loaded, read_counters(url)), alone.outcomes)
    growth = result["rss_mib"]["growth"]
    if growth > MAX_GROWTH_MIB and is_watched:
        problems.append(f"memory grew by {growth:.0f} MiB, at most {MAX_GROWTH_MIB}")
    text = log.read_text(errors="replace")
    problems += [f"the log has a {word}" for word in ("Traceback", "ERROR") if word in text]
    return {**result, "same_text_alone": len(sample) - len(different), "problems": problems}


def summary(record: Record, seconds: float) -> dict[str, Any]:
    answered = record.of("answered")
    latencies = sorted(o.seconds for o in answered) or [0.0]
    num_tokens, rss = sum(o.num_tokens for o in answered), [mib for _, mib in record.rss_mib]
    return {
        "requests": len(record.outcomes),
        "answered": len(answered),
        "answered_by_mode": dict(Counter(o.request.mode for o in answered)),
        "streamed": sum(o.request.stream for o in answered),
        "left_by_client": len(record.of("left")),
        "refused": len(record.of("refused")),
        "tokens_received": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 1),
        "latency_seconds": {f"p{p}": round(latencies[len(latencies) * p // 100], 2) for p in (50, 99)},
        "rss_mib": {"first": round(rss[0]), "last": round(rss[-1]), "growth": round(growth_mib(record.rss_mib), 1)},
    }


def as_markdown(result: dict[str, Any]) -> str:
    machine = described(result["machine"])
    modes = ", ".join(f"{number} {mode}" for mode, number in result["answered_by_mode"].items())
    rows = [
        ("minutes, clients, seed", f"{result['minutes']}, {result['clients']}, {result['seed']}"),
        ("requests answered", f"{result['answered']}: {modes}; {result['streamed']} streamed"),
        ("left by the client in the middle", result["left_by_client"]),
        ("bad ones, refused", result["refused"]),
        ("tokens received, per second", f"{result['tokens_received']}, {result['tokens_per_second']}"),
        ("latency", ", ".join(f"{name} {value} s" for name, value in result["latency_seconds"].items())),
        ("preemptions", round(result["counted_by_server"]["preemptions"])),
        ("sent again alone, same text", result["same_text_alone"]),
        ("memory of all processes after the warm-up", f"{result['rss_mib']['growth']:+} MiB"),
        (f"its bound, in runs of {SHORTEST_WATCHED // 60} minutes or more", f"{MAX_GROWTH_MIB} MiB"),
        ("problems", len(result["problems"])),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# Soak\n\n{machine}. Written by `make soak`.\n\n```bash\n{COMMAND}\n```\n\n| | |\n| --- | --- |\n{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/soak.json and soak.md")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log"
        with vllm_server(*shlex.split(COMMAND)[2:], log=log, cwd=ROOT) as url:
            result = {"machine": environment(), **soak(url, log, 60 * args.minutes, args.seed)}
        if result["problems"]:
            print(json.dumps(result, indent=1))
            print(log.read_text(errors="replace")[-5000:])
    if result["problems"]:
        sys.exit("\n".join(result["problems"][:MOST_PROBLEMS]))
    print(as_markdown(result))
    if args.write:
        (RESULTS / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "soak.md").write_text(as_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
