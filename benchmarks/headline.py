"""The headline comparison: mask diffusion (gamma 0.8, canvas 16) against vLLM's own AR decoding of the context tower.

    python -m benchmarks.headline --model FOLDER_OR_HUB_NAME             # two GPUs: ar, colocated, split, TP 2
    python -m benchmarks.headline --model ... --tensor-parallel-size 1   # one GPU that holds both towers: no split
    python -m benchmarks.headline --demo                                 # small numbers, demo model, any CPU

`colocated`, both towers on both GPUs, is the default placement: with `split`, the published one, half of the GPUs wait
in every step, and by our count (docs/roofline.md) it runs at 0.9 to 1.0 times AR at batch 64 where `colocated` runs at
1.7.

Each arm is `vllm serve` with the same options but for --diffusion, measured by `vllm bench serve`: the same prompts in
the same order, greedy, outputs of one length, at each of --concurrency. The report holds these commands. Writes
benchmarks/results/headline-<gpu or cpu>.json and .md.

What a figure depends on most is how many tokens a pass reveals, which is a matter of model and text: the table prints
passes per canvas beside it. NO GPU HAS RUN THIS; on a CPU it shows that the comparison works, not what it would give.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import tempfile
from typing import Any

from benchmarks.machine import described, environment
from benchmarks.markdown_table import table
from benchmarks.paths import DEMO, RESULTS, ROOT
from tests.harness.server import VLLM, read_metrics, vllm_server

DIFFUSION = {"canvas_length": 16, "max_steps": 16, "confidence_threshold": 0.8}
ARMS: dict[str, list[str]] = {
    "ar": [],
    "colocated": ["--diffusion", json.dumps({**DIFFUSION, "tower_placement": "colocated"})],
    "split": ["--diffusion", json.dumps({**DIFFUSION, "tower_placement": "split"})],
}
TOPICS = (
    "the printing press",
    "photosynthesis",
    "a merge sort",
    "the tides",
    "compound interest",
    "the French Revolution",
    "vaccines",
    "a suspension bridge",
)
FORMS = (
    "An encyclopedia article about {}:\n\n",
    "Question: Explain {} in simple words.\nAnswer:",
    "A step-by-step guide to {}:\n1.",
    "The following is a lecture about {}.\n\nToday we will",
)
COUNTERS = ("canvases", "denoise_passes", "committed_tokens")
COLUMNS = ("arm", "concurrency", "requests", "output tok/s", "of AR", "TTFT p50 ms", "passes per canvas")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """One prompt a line of --prompts (JSON: {"prompt": ...}), or plain ones of our own."""
    if args.prompts is None:
        return [form.format(topic) for form in FORMS for topic in TOPICS]
    return [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines() if line.strip()]


def serve_options(args: argparse.Namespace, arm: str) -> list[str]:
    common = ["--served-model-name", "model", "--tensor-parallel-size", str(args.tensor_parallel_size)]
    common += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", str(max(args.concurrency))]
    return [*common, "--no-enable-prefix-caching", *shlex.split(args.serve_options), *ARMS[arm]]


def client_command(args: argparse.Namespace, data: pathlib.Path, concurrency: int, result: pathlib.Path) -> list[str]:
    requests = args.rounds * concurrency
    command = [str(VLLM), "bench", "serve", "--model", "model", "--tokenizer", args.model, "--dataset-name", "sharegpt"]
    command += ["--dataset-path", str(data), "--sharegpt-output-len", str(args.output_tokens), "--disable-shuffle"]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--ignore-eos"]
    command += ["--temperature", "0", "--num-warmups", str(min(concurrency, args.warmups))]
    return [*command, "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]


def counters(url: str) -> dict[str, float]:
    """Our counters on /metrics; none where diffusion is off."""
    lines = read_metrics(url).splitlines()
    found = {}
    for name in COUNTERS:
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:twotower_{name}_total{{")]
        if values:
            found[name] = sum(values)
    return found


def measure(args: argparse.Namespace, arm: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every concurrency on one server."""
    rows, data = [], folder / "prompts.json"
    conversations = [[{"from": "human", "value": p}, {"from": "gpt", "value": p}] for p in prompts_of(args)]
    data.write_text(json.dumps([{"conversations": c} for c in conversations]))
    log = folder / f"{arm}.log"
    try:
        with vllm_server(
            args.model, *serve_options(args, arm), log=log, cwd=ROOT, start_seconds=args.start_seconds
        ) as url:
            for concurrency in args.concurrency:
                rows.append(measure_one(args, arm, concurrency, data, url))
                print("| " + " | ".join(str(rows[-1][c]) for c in COLUMNS if c in rows[-1]) + " |", flush=True)
    except OSError as problem:
        raise SystemExit(f"{arm}: {problem}; the end of its server's log:\n{log.read_text()[-4000:]}") from problem
    return rows


def measure_one(args: argparse.Namespace, arm: str, concurrency: int, data: pathlib.Path, url: str) -> dict[str, Any]:
    """One run of the client."""
    result = data.with_name(f"{arm}-{concurrency}.json")
    before = counters(url)
    command = [*client_command(args, data, concurrency, result), "--base-url", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    after = counters(url)
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    return row(arm, concurrency, json.loads(result.read_text()), counted, args)


def row(
    arm: str, concurrency: int, result: dict, counted: dict[str, float], args: argparse.Namespace
) -> dict[str, Any]:
    requests = args.rounds * concurrency
    if result["completed"] != requests or result["total_output_tokens"] != requests * args.output_tokens:
        found = f"{result['completed']} of {requests} requests, {result['total_output_tokens']} tokens"
        raise SystemExit(f"{arm} at {concurrency}: {found}, not {requests * args.output_tokens}: no figures")
    canvases = counted.get("canvases")
    return {
        "arm": arm,
        "concurrency": concurrency,
        "requests": requests,
        "output tok/s": round(result["output_throughput"], 1),
        "TTFT p50 ms": round(result["median_ttft_ms"], 1),
        "passes per canvas": round(counted["denoise_passes"] / canvases, 2) if canvases else None,
        "counters": counted,
    }


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    ar = {r["concurrency"]: r["output tok/s"] for r in rows if r["arm"] == "ar"}
    for r in rows:
        r["of AR"] = round(r["output tok/s"] / ar[r["concurrency"]], 2) if r["concurrency"] in ar else None
    found = environment()
    commands = {arm: shlex.join(["vllm", "serve", args.model, *serve_options(args, arm)]) for arm in args.arms}
    client = client_command(args, pathlib.Path("PROMPTS.json"), args.concurrency[-1], pathlib.Path("RESULT.json"))
    client_text = shlex.join(["vllm", *client[1:]])
    settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()}
    settings.pop("out")
    content = {"environment": found, "arguments": settings, "serve": commands, "client": client_text, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"headline-{'gpu' if found['gpu'] else 'cpu'}"
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    note = "" if found["gpu"] else "\nON A CPU: shows that the comparison works, says nothing about a GPU.\n"
    lines = table([{column: r[column] for column in COLUMNS} for r in rows])
    head = f"# Mask diffusion against AR\n\n{described(found)}.\nWritten by `python -m benchmarks.headline`.\n{note}\n"
    steps = "".join(f"```bash\n{command}\n```\n\n" for command in (*commands.values(), client_text))
    text = head + "\n".join(lines) + "\n\n" + steps.rstrip() + "\n"
    (args.out / f"{name}.md").write_text(text)
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or hub name")
    parser.add_argument("--tensor-parallel-size", type=int, help="default: 2")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all that this size allows")
    parser.add_argument("--concurrency", type=int, nargs="+", help="default: 1 8 32 64")
    parser.add_argument("--rounds", type=int, help="requests are this many times the concurrency (default: 4)")
    parser.add_argument("--output-tokens", type=int, help="of every request (default: 512)")
    parser.add_argument(
        "--prompts", type=pathlib.Path, help='JSON lines, {"prompt": "..."}; plain ones of our own by default'
    )
    parser.add_argument("--max-model-len", type=int, help="default: 4096")
    parser.add_argument("--warmups", type=int, default=8, help="requests before each measurement")
    parser.add_argument(
        "--serve-options", default="", help='more for every server, as one string: "--quantization fp8_per_tensor"'
    )
    parser.add_argument("--start-seconds", type=float, default=1800, help="a server may take this long to start")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--demo", action="store_true", help="the demo model on a CPU, small numbers, no graphs")
    args = parser.parse_args()
    if not (args.model or args.demo):
        parser.error("--model is missing: name a checkpoint folder, or use --demo")
    small = args.demo
    args.model = args.model or DEMO
    args.tensor_parallel_size = args.tensor_parallel_size or (1 if small else 2)
    args.concurrency = args.concurrency or ([1, 4] if small else [1, 8, 32, 64])
    args.rounds = args.rounds or (1 if small else 4)
    args.output_tokens = args.output_tokens or (32 if small else 512)
    args.max_model_len = args.max_model_len or (512 if small else 4096)
    args.serve_options = (
        f"--dtype float32 --enforce-eager {args.serve_options}".strip() if small else args.serve_options
    )
    args.arms = args.arms or [arm for arm in ARMS if arm != "split" or args.tensor_parallel_size % 2 == 0]
    return args


def main() -> None:
    args = arguments()
    if args.demo:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            rows += measure(args, arm, pathlib.Path(folder))
    report(rows, args)


if __name__ == "__main__":
    main()
