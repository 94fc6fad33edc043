"""How long each half of split towers works and waits, on two CPU processes over gloo.

    python -m benchmarks.placement            # prints a table
    python -m benchmarks.placement --write    # also benchmarks/results/placement.md

Weights are random and every canvas takes six passes: only time is measured, on a model that is wide enough for the
towers to outweigh the host's work (`WIDE`) and on the demo model as it is.
"""

import argparse
import os
import random
import time
from contextlib import AbstractContextManager
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers

from benchmarks.machine import described, environment
from benchmarks.paths import DEMO, RESULTS, ROOT
from benchmarks.rank_clock import LINK, STEPS, TOWER, start_clock, take_clock
from tests.harness.engine import start_llm

RESULT = RESULTS / "placement.md"
WIDE = {"hidden_size": 1024, "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 2048}
WIDE |= {"num_attention_heads": 16, "head_dim": 64, "mamba_num_heads": 32}
MODELS: dict[str, dict[str, int]] = {"demo's sizes": {}, "wide": WIDE}
NUM_PROMPT_TOKENS, NUM_TOKENS, NUM_PASSES = 32, 64, 6
HEAD = """# How long each half of split towers waits

{machine}. Written by `python -m benchmarks.placement --write`: two CPU processes over gloo, a core each, fp32, random
weights, prompts of {prompt} tokens, {tokens} tokens a request, {passes} passes a canvas. Shares of the time from the
first request in to the last token out. *Own tower*: its forwards (the denoiser's with proposals, reveals). *Waits for
the other tower*: in the messages between them. *Host work*: the rest of its steps. *Between steps*: nothing to do until
the engine's process has taken in a step and scheduled the next. *Idle* is waiting and between steps together.

| model | requests | tokens/s | half | own tower | waits for the other tower | host work | between steps | idle |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def start_split(overrides: dict[str, int], most_requests: int) -> AbstractContextManager[Any]:
    return start_llm(
        ROOT / DEMO,
        skip_tokenizer_init=False,
        load_format="dummy",
        hf_overrides=overrides,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=most_requests,
        tensor_parallel_size=2,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=256 << 20,
        additional_config={"diffusion": {"tower_placement": "split"}},
    )


def measure(llm: Any, num_requests: int) -> tuple[float, list[dict[str, float]]]:
    """Tokens per second, and the shares of the context half and of the denoiser half."""
    from vllm_twotower import diffusion_params

    rng = random.Random(num_requests)
    tokens = [[rng.randrange(3, 1024) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(num_requests)]
    prompts = [{"prompt_token_ids": prompt} for prompt in tokens]
    params = diffusion_params(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, confidence_threshold=1.0, max_steps=NUM_PASSES
    )
    llm.generate(prompts[:1], params, use_tqdm=False)
    llm.collective_rpc(take_clock)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return num_requests * NUM_TOKENS / seconds, [shares(clock, seconds) for clock in llm.collective_rpc(take_clock)]


def shares(clock: dict[str, float], seconds: float) -> dict[str, float]:
    host, between = clock[STEPS] - clock[TOWER] - clock[LINK], seconds - clock[STEPS]
    parts = {"own tower": clock[TOWER], "waits": clock[LINK], "host": host, "between": between}
    return {**{name: part / seconds for name, part in parts.items()}, "idle": (clock[LINK] + between) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT.relative_to(ROOT)}")
    args = parser.parse_args()
    lines = []
    for name in args.models:
        with start_split(MODELS[name], max(args.requests)) as llm:
            llm.collective_rpc(start_clock)
            for num_requests in args.requests:
                tokens_per_s, halves = measure(llm, num_requests)
                for half, parts in zip(("context", "denoiser"), halves, strict=True):
                    figures = " | ".join(f"{share:.0%}" for share in parts.values())
                    lines.append(f"| {name} | {num_requests} | {tokens_per_s:.0f} | {half} | {figures} |")
                    print(lines[-1], flush=True)
    text = HEAD.format(machine=described(environment()), prompt=NUM_PROMPT_TOKENS, tokens=NUM_TOKENS, passes=NUM_PASSES)
    text += "\n".join(lines) + "\n"
    print(text)
    if args.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
