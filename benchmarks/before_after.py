"""This checkout's engine beside that of an earlier commit, in turns: ``python -m benchmarks.before_after COMMIT``.

A shared machine's speed drifts by half within minutes, so runs one after the other compare nothing. Here each checkout
has a process with the demo model in it, one of the two works at a time, and they change after every few questions. Both
must write the same tokens. Mask diffusion, fp32, greedy, four passes a step; the host's time is what is left when the
towers' forwards are taken away. ``serve`` runs on either checkout, so it uses nothing of this repository but
``diffusion_stats`` and the names of the towers. Prints a page for ``results/before-after.md``.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

ROUNDS = 3
SETTINGS = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "enable_prefix_caching": False}
BUILD = "from setuptools import setup; setup()"


def serve(model: str, batch: int) -> None:
    """Answer questions, a list of them as JSON in a line, until the input ends."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no report
    from vllm import LLM

    llm = LLM(
        model,
        disable_log_stats=True,
        max_num_seqs=batch,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"diffusion": {"passes_per_step": 4}},
        **SETTINGS,
    )
    network = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    towers = [0.0]
    for owner, name in ((network.model, "forward"), (network.denoiser, "forward"), (network.denoiser, "logits")):
        time_calls(owner, name, towers)
    print("ready", file=reports, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, json.loads(line), batch, towers)), file=reports, flush=True)


def time_calls(owner: Any, name: str, total: list[float]) -> None:
    """Add the seconds of each call of a method to ``total``."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        total[0] += time.perf_counter() - started
        return result

    setattr(owner, name, call)


def answer(llm: Any, prompts: list[str], batch: int, towers: list[float]) -> dict[str, Any]:
    """So many questions at a time: seconds, seconds of the towers, canvases, and the tokens."""
    from vllm import SamplingParams

    from vllm_twotower import diffusion_stats

    engine, params = llm.llm_engine, SamplingParams(temperature=0.0, max_tokens=64)
    diffusion_stats(llm, reset=True)
    towers[0], waiting, written = 0.0, list(enumerate(prompts)), {}
    started = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        while waiting and len(written) + batch > len(prompts) - len(waiting):
            index, prompt = waiting.pop(0)
            engine.add_request(str(index), prompt, params.clone())
        finished = (output for output in engine.step() if output.finished)
        written.update((int(output.request_id), list(output.outputs[0].token_ids)) for output in finished)
    seconds = time.perf_counter() - started
    canvases = diffusion_stats(llm)["canvases"]
    return {
        "seconds": seconds,
        "towers": towers[0],
        "canvases": canvases,
        "tokens": [written[index] for index in range(len(prompts))],
    }


@contextlib.contextmanager
def check_out(commit: str) -> Iterator[pathlib.Path]:
    """A checkout of a commit for as long as it is needed, with its C++ built and its entry points written down."""
    from benchmarks.paths import ROOT

    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "before"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(folder), commit], cwd=ROOT, check=True)
        try:
            build = [sys.executable, "-c", BUILD, "build_ext", "--inplace", "egg_info"]
            subprocess.run(build, cwd=folder, check=True, capture_output=True)
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


@contextlib.contextmanager
def start(checkout: pathlib.Path, model: pathlib.Path, batch: int) -> Iterator[subprocess.Popen[str]]:
    """The engine of a checkout in a process of its own."""
    command = [sys.executable, "-P", __file__, "--serve", str(model), "--batches", str(batch)]
    settings = {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(checkout)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=checkout, env=environment, **pipes) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"the engine of {checkout} did not start")
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(process: subprocess.Popen[str], prompts: Sequence[str]) -> dict[str, Any]:
    """One turn."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(prompts) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def compare(checkouts: dict[str, pathlib.Path], prompts: list[str], batch: int) -> Iterator[dict[str, Any]]:
    """A row of the table for every checkout."""
    from benchmarks.paths import DEMO, ROOT

    turns = [prompts[i : i + 2 * batch] for i in range(0, len(prompts), 2 * batch)]
    sums: dict[str, Counter[str]] = {name: Counter() for name in checkouts}
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(start(path, ROOT / DEMO, batch)) for name, path in checkouts.items()}
        for round_ in range(ROUNDS + 1):
            for turn, asked in enumerate(turns):
                names = sorted(engines, reverse=bool((round_ + turn) % 2))
                answers = {name: ask(engines[name], asked) for name in names}
                if len({json.dumps(one["tokens"]) for one in answers.values()}) > 1:
                    raise SystemExit(f"they write different tokens to {asked}: no figures")
                for name, one in answers.items() if round_ else ():  # the first round compiles and warms up
                    sums[name].update({**one, "tokens": sum(map(len, one["tokens"]))})
    for name, total in sums.items():
        yield {
            "checkout": name,
            "requests at once": batch,
            "host, ms a canvas": round(1e3 * (total["seconds"] - total["towers"]) / total["canvases"], 2),
            "towers, ms a canvas": round(1e3 * total["towers"] / total["canvases"], 2),
            "tokens/s": round(total["tokens"] / total["seconds"], 1),
            "canvases": total["canvases"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="to compare with")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.batches[0])
        return
    if not args.commit:
        parser.error("name a commit to compare with, for example HEAD~1")
    from benchmarks.generate import questions
    from benchmarks.machine import described, environment
    from benchmarks.markdown_table import table
    from benchmarks.paths import ROOT

    prompts, rows = questions(args.requests), []
    with check_out(args.commit) as before:
        for batch in args.batches:
            rows += compare({"before": before, "now": ROOT}, prompts, batch)
    print("# Before and after\n")
    print(f"Printed by `python -m benchmarks.before_after {' '.join(sys.argv[1:])}`; {described(environment())}.\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
