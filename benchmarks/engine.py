"""Mask diffusion beside AR in one engine, after the parity tests: ``make bench``.

Prints a table and writes ``benchmarks/results/engine-<machine>.json`` with everything needed to repeat it. On a CPU the
host work of interpreted kernels dominates, so the ratio says how many engine steps were saved and nothing about a GPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from machine import environment
from markdown_table import table

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARITY = ["tests/test_reference_goldens.py", "tests/test_engine_goldens.py"]


def require_parity() -> None:
    """No green test, no number."""
    command = [sys.executable, "-m", "pytest", "-q", *PARITY]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit("the parity tests are red: no figures")


def measure(llm, mode: str, batch: int, max_tokens: int) -> dict:
    from vllm_twotower import diffusion_params, diffusion_stats
    from vllm_twotower.cli import DEMO_QUESTIONS, demo_prompt

    questions = [demo_prompt(question) for question in DEMO_QUESTIONS]
    prompts = [questions[i % len(questions)] for i in range(batch)]
    params = diffusion_params(mode=mode, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)  # warm-up: caches and first-use costs
    diffusion_stats(llm, reset=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    stats = diffusion_stats(llm)
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {
        "mode": mode,
        "batch": batch,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "engine_steps": stats["denoise_steps"] + stats["context_steps"],
        "tokens_per_forward": round(tokens / (stats["denoise_passes"] + stats["context_passes"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    require_parity()

    from vllm import LLM

    from vllm_twotower.cli import DEMO_MODEL

    llm = LLM(
        model=str(DEMO_MODEL),
        additional_config={"diffusion": True},
        max_model_len=256,
        max_num_seqs=max(args.batches),
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=128 << 20,
    )
    rows = [measure(llm, mode, batch, args.max_tokens) for batch in args.batches for mode in ("ar", "mask_diffusion")]
    print("\n".join(table(rows)))
    out = ROOT / "benchmarks" / "results" / f"engine-{'gpu' if environment()['gpu'] else 'cpu'}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "arguments": vars(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
