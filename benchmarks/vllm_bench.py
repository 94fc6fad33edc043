"""vLLM's own benchmarks, unchanged, with and without ``--diffusion``: ``make bench-vllm``.

Runs ``vllm bench throughput`` and ``serve`` on the demo model and writes what they print, with the commands, to
``benchmarks/results/vllm-bench.md``. On a CPU the host work of interpreted kernels dominates: these tables show that
the benchmarks work and count right, not what a GPU would do. (``vllm bench latency`` works too, but draws token ids up
to 10,000, more than the demo model has; ``tests/test_flag.py`` runs it on another.)
"""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import tempfile

from benchmarks.machine import described, environment
from benchmarks.paths import DEMO, RESULTS, ROOT
from tests.harness.server import VLLM, vllm_server

RESULT = RESULTS / "vllm-bench.md"
SMALL = "--max-model-len 512 --max-num-seqs 16 --enforce-eager"
THROUGHPUT = (
    f"vllm bench throughput --model {DEMO} {SMALL} --dataset-name random --random-input-len 32"
    " --random-output-len 64 --num-prompts 16"
)
SERVE = f"vllm serve {DEMO} --diffusion --served-model-name demo {SMALL}"
CLIENT = (
    f"vllm bench serve --model demo --tokenizer {DEMO} --dataset-name custom --skip-chat-template"
    " --dataset-path benchmarks/lm_eval/demo_questions.jsonl --custom-output-len 96 --temperature 0 --disable-shuffle"
    " --num-prompts 64 --max-concurrency 8"
)
HEAD = """# vLLM's own benchmarks on the demo model

{machine}. Written by `make bench-vllm`. Interpreted kernels on a CPU: these tables show that the benchmarks work and
count right. In mask diffusion a chunk is a canvas, in self-speculation what a verification keeps: vLLM's client counts
chunks for "Peak output token throughput" and for the latency between tokens (ITL), tokens for everything else. The
acceptance it prints under self-speculation is of the run beside it; how long an answer is depends on the mode (mask
diffusion gets some of them wrong), so compare tokens per second and not seconds.
"""
BODY = """ --extra-body '{{"vllm_xargs": {{"diffusion_mode": "{mode}"}}}}'"""


def run(command: str, more: str = "") -> str:
    """What a command prints to its standard output, log lines left out."""
    words = [str(VLLM), *shlex.split(command + more)[1:]]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900)
    if result.returncode:
        raise SystemExit(f"{command} failed:\n{result.stderr[-3000:]}")
    lines = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith(("INFO", "WARNING"))]
    return "\n".join(line for line in lines if not re.match(r"\(\w+ pid=|\[rank|Namespace\(|Starting|Traffic", line))


def section(title: str, command: str, output: str) -> str:
    return f"## {title}\n\n```bash\n{command}\n```\n\n```text\n{output}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sections = []
    diffusion = f"{THROUGHPUT} --diffusion"
    sections.append(section("Throughput, mask diffusion", diffusion, run(diffusion)))
    sections.append(section("Throughput, AR: the same model without --diffusion", THROUGHPUT, run(THROUGHPUT)))
    with tempfile.TemporaryDirectory() as folder:
        options = shlex.split(SERVE)[3:]
        with vllm_server(DEMO, *options, log=pathlib.Path(folder) / "log", cwd=ROOT) as url:
            for mode in ("mask_diffusion", "self_speculation", "ar"):
                more = BODY.format(mode=mode)
                output = run(CLIENT + more, f" --base-url {url}")
                sections.append(
                    section(f"Serving the demo model's questions, {mode}", f"{SERVE}\n{CLIENT}{more}", output)
                )
    head = HEAD.format(machine=described(environment()))
    RESULT.write_text("\n".join([head, *sections]), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
