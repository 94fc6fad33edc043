"""lm-eval against a real server, in mask diffusion and in AR, on a task of a few lines that needs no download:
``make lm-eval``.

Starts ``vllm serve --diffusion`` with the demo model, runs ``lm_eval --model local-completions`` once in
``mask_diffusion`` and once in ``ar`` with lm-eval's own temperature 0 and seed, and prints both tables. The task is
about the plumbing (generation until a stop string, log-likelihoods through prompt logprobs), not about the model.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from benchmarks.paths import DEMO, ROOT
from tests.harness.server import vllm_server

OPTIONS = ["--diffusion", '{"passes_per_step": 4}', "--served-model-name", "demo", "--dtype", "float32"]
OPTIONS += ["--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]


def evaluate(lm_eval: str, url: str, mode: str, out: pathlib.Path) -> tuple[str, dict]:
    """One run of lm-eval; returns its table and its results by task."""
    command = [lm_eval, "--model", "local-completions", "--include_path", "benchmarks/lm_eval"]
    server = f"model=demo,base_url={url}/v1/completions,tokenizer={DEMO},num_concurrent=4,add_bos_token=True"
    command += ["--model_args", server]
    command += ["--tasks", "demo_questions,demo_last_number", "--output_path", str(out)]
    command += ["--gen_kwargs", json.dumps({"vllm_xargs": {"diffusion_mode": mode}})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    (results,) = out.rglob("results*.json")
    return done.stdout[done.stdout.index("|") :], json.loads(results.read_text())["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", default=shutil.which("lm_eval", path=str(pathlib.Path(sys.executable).parent)))
    args = parser.parse_args()
    if args.lm_eval is None:
        raise SystemExit("lm_eval is not installed beside this Python: use `make lm-eval`, or name it with --lm-eval")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        with vllm_server(DEMO, *OPTIONS, log=out / "log", cwd=ROOT) as url:
            for mode in ("mask_diffusion", "ar"):
                table, results = evaluate(args.lm_eval, url, mode, out / mode)
                assert set(results) == {"demo_questions", "demo_last_number"}
                print(f"{mode}\n\n{table}")


if __name__ == "__main__":
    main()
