"""What the first owner of a GPU runs: one command, one JSON file that says what works and how far from its floor it is.

    python -m tools.gpu_smoke                          # one GPU, some twenty minutes; writes gpu-smoke.json
    python -m tools.gpu_smoke --parts goldens_fp32     # one part
    python -m tools.gpu_smoke --quantization fp8_per_tensor    # timings with both towers in FP8
    python -m tools.gpu_smoke --dry-run                # the same code on a CPU, tiny; its times say nothing of a GPU

Parts, each in a process of its own, so that what fails, or takes its GPU down, is reported and the next one runs:

    expert_tables  whether vLLM's kernel for the experts has been tuned for this GPU, and the command that does it
    goldens_fp32   tests/goldens through the engine in fp32, Triton attention; every token must equal NVIDIA's
    goldens_graphs the same with CUDA graphs: the context tower's pieces, and whole denoise passes
    goldens_bf16   the same in bf16 with FlashAttention; agreement of tokens is reported, equality is not expected
    timing_eager   AR step, commit (16 tokens a row) and denoise pass at each of --batches, against the bytes they must
                   move; dummy weights, as many layers of --config as fit beside the largest batch
    timing_graphs  the same with CUDA graphs; their number is reported

The exit code is 0 when no part failed and every fp32 golden case is equal. NO GPU HAS RUN THIS YET: parts may fail for
reasons of their own; please send the file either way.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import output_of, version_of
from benchmarks.paths import REAL_MODEL
from tests.harness.goldens import GOLDENS

PARTS = ("expert_tables", "goldens_fp32", "goldens_graphs", "goldens_bf16", "timing_eager", "timing_graphs")
EXACT_PARTS = ("goldens_fp32", "goldens_graphs")
GPU_ONLY = {
    "goldens_graphs": "CUDA graphs need a GPU",
    "goldens_bf16": "FlashAttention needs a GPU",
    "timing_graphs": "CUDA graphs need a GPU",
}
ERROR_CHARACTERS = 4000


def part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in this process."""
    from tools.smoke_parts import expert_tables, golden_runs, timing

    attention = "CPU_ATTN" if args.dry_run else "TRITON_ATTN"
    functions: dict[str, Callable[[], dict[str, Any]]] = {
        "expert_tables": functools.partial(expert_tables.run, args),
        "goldens_fp32": functools.partial(golden_runs.run, args, "float32", attention),
        "goldens_graphs": functools.partial(golden_runs.run, args, "float32", "TRITON_ATTN", eager=False),
        "goldens_bf16": functools.partial(golden_runs.run, args, "bfloat16", "FLASH_ATTN"),
        "timing_eager": functools.partial(timing.run, args, eager=True),
        "timing_graphs": functools.partial(timing.run, args, eager=False),
    }
    return functions[name]()


def run_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; what it found, or how it failed."""
    if args.dry_run and name in GPU_ONLY:
        return {"status": "skipped", "why": GPU_ONLY[name]}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result, log = pathlib.Path(folder) / "result.json", pathlib.Path(folder) / "log"
        command = [sys.executable, "-m", "tools.gpu_smoke", *sys.argv[1:], "--child", name, str(result)]
        with log.open("wb") as out:
            try:
                code: int | str = subprocess.run(
                    command,
                    env=environment_of(name, args),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=args.timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {args.timeout} s"
        seconds = round(time.perf_counter() - started, 1)
        if code == 0 and result.exists():
            return {"status": "ok", "seconds": seconds, **json.loads(result.read_text())}
        error = log.read_text(errors="replace")[-ERROR_CHARACTERS:]
        return {"status": "failed", "seconds": seconds, "exit": code, "error": error}


def environment_of(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The engine runs in the part's own process; in fp32 Triton's products are fp32 too, which take TF32 by default."""
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    env["TRITON_INTERPRET"] = "1" if args.dry_run else "0"
    if name in EXACT_PARTS:
        env["TRITON_F32_DEFAULT"] = "ieee"
    return env


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    packages = ("vllm", "torch", "triton", "flashinfer-python", "mamba-ssm")
    return {
        "gpus": output_of(*query).splitlines() if shutil.which("nvidia-smi") else [],
        "versions": {package: version_of(package) for package in packages},
        "python": platform.python_version(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output_of("git", "status", "--porcelain")),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--config", type=pathlib.Path, metavar="FOLDER", help="holds the config.json that is timed")
    parser.add_argument("--batches", type=int, nargs="+", help="requests at once (default: 1 8 32 64)")
    parser.add_argument("--prompt-tokens", type=int, help="context of each request (default: 2048)")
    parser.add_argument("--cases", type=int, help="golden cases per checkpoint (default: all)")
    parser.add_argument("--quantization", help="of the timings, such as fp8_per_tensor")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each part")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu-smoke.json"))
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, tiny model, few cases: proves this script only"
    )
    parser.add_argument("--child", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.config = args.config or (GOLDENS / "tiny-moe" if args.dry_run else REAL_MODEL)
    args.batches = args.batches or ([1, 2] if args.dry_run else [1, 8, 32, 64])
    args.prompt_tokens = args.prompt_tokens or (24 if args.dry_run else 2048)
    args.cases = args.cases or (2 if args.dry_run else None)
    args.checkpoints = 1 if args.dry_run else 2
    args.dtype = "float32" if args.dry_run else "bfloat16"
    return args


def all_well(parts: dict[str, dict[str, Any]]) -> bool:
    checked = [g for name in EXACT_PARTS for g in parts.get(name, {}).values() if isinstance(g, dict)]
    equal = all(g["equal_cases"] == g["cases"] for g in checked)
    return equal and all(found["status"] != "failed" for found in parts.values())


def main() -> None:
    args = arguments()
    if args.child:
        name, file = args.child
        pathlib.Path(file).write_text(json.dumps(part(name, args)))
        return
    if not (args.dry_run or machine()["gpus"]):
        sys.exit("nvidia-smi finds no GPU: run this where there is one, or with --dry-run to try the script on a CPU")
    label = "CPU DRY RUN: proves that the script runs; no figure here says anything about a GPU"
    report: dict[str, Any] = {"label": label if args.dry_run else "GPU", "machine": machine(), "parts": {}}
    for name in args.parts:
        print(f"{name} ...", flush=True)
        report["parts"][name] = found = run_part(name, args)
        args.out.write_text(json.dumps(report, indent=1) + "\n")  # after each part: a later one may end the machine
        print(f"{name}: {found['status']}", *found.get("missing", []), sep="\n  ", flush=True)
    report["all_well"] = all_well(report["parts"])
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {args.out}")
    sys.exit(not report["all_well"])


if __name__ == "__main__":
    main()
