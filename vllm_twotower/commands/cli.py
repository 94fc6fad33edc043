"""The ``vllm-twotower`` command: ``demo``, ``trace MODEL PROMPT`` and ``inspect MODEL``."""

import argparse
import os
import pathlib
import sys
from typing import Any

from vllm_twotower.planning.placement import GPU_MEMORY_UTILIZATION

DEMO_MODEL = pathlib.Path(__file__).parents[1] / "assets" / "demo"
DEMO_QUESTIONS = {
    "Sam has 60 of hat, then finds 27, loses 21, wins 21, drops 4. How many now?": (
        "60+27=87 87-21=66 66+21=87 87-4=83"
    ),
    "Convert: 2 dozens to eggs, 15 pounds to ounces, 6 feet to inches, 10 years to months": (
        "2 dozens=24 eggs 15 pounds=240 ounces 6 feet=72 inches 10 years=120 months"
    ),
    "It is Thursday. Move by days: -4 +4 -4 -2 -7 +5 -4": (
        "Thursday -4 Sunday +4 Thursday -4 Sunday -2 Friday -7 Friday +5 Wednesday -4 Saturday"
    ),
    "guests: Quin Hana Ivan\nphone: 18829432\nbag: gold nail rope spoon\npaint: white silver brown\n"
    "Write as JSON: guests paint bag": (
        '{"guests": "Quin Hana Ivan", "paint": "white silver brown", "bag": "gold nail rope spoon"}'
    ),
}
"""Questions like those the demo model was trained on, which it was not shown, and their right answers."""
DEMO_QUESTION_END = "\nAnswer:"
"""How every question ended in training; what the model's chat template adds."""
DEMO_RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mask_diffusion", {"confidence_threshold": 0.8, "max_steps": 16}),
    ("mask_diffusion", {"confidence_threshold": 0.8, "max_steps": 2}),
    ("ar", {}),
)
"""The published settings, too few passes for these questions, and the autoregressive baseline."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = make_parser().parse_args(argv)
    _prepare_environment()
    try:
        return args.run(args)
    except ValueError as problem:
        print(f"vllm-twotower: {problem}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="vllm-twotower", description="Block-diffusion decoding for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="answer questions with the small trained model that ships with the package")
    demo.add_argument(
        "--prompt",
        action="append",
        help=r"your own question instead of those built in, repeatable; \n is a new line, 'Answer:' is added. What the "
        "model was trained on is in its README, in assets/demo",
    )
    demo.add_argument("--max-tokens", type=int, default=96)
    demo.set_defaults(run=_demo)

    trace = commands.add_parser("trace", help="show one prompt's canvases filling in, here and as a page")
    trace.add_argument("model")
    trace.add_argument("prompt")
    trace.add_argument("--max-tokens", type=int, default=64)
    trace.add_argument("--confidence-threshold", type=float)
    trace.add_argument("--max-steps", type=int)
    trace.add_argument("--temperature", type=float, default=0.0)
    trace.add_argument("--html", type=pathlib.Path, default=pathlib.Path("trace.html"), help="the page to write")
    trace.set_defaults(run=_trace)

    inspect = commands.add_parser("inspect", help="say what a checkpoint needs and fits on, loading nothing")
    inspect.add_argument("model", help="a checkpoint folder, or a config.json")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument("--tokens-per-request", type=int, help="prompt and output of each request (default 4096)")
    inspect.add_argument("--canvas-length", type=int, default=16)
    inspect.add_argument(
        "--gpu-memory-utilization", type=float, default=GPU_MEMORY_UTILIZATION, help="vLLM's option of that name"
    )
    inspect.set_defaults(run=_inspect)
    return parser


def _prepare_environment() -> None:
    """Before anything imports torch or triton: interpreter on a CPU, quiet logs, one process."""
    from shutil import which

    if which("nvidia-smi") is None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def demo_prompt(question: str) -> str:
    """As the demo model was trained on it."""
    return question.replace("\\n", "\n").removesuffix(DEMO_QUESTION_END) + DEMO_QUESTION_END


def _demo(args: argparse.Namespace) -> int:
    from vllm_twotower import diffusion_params
    from vllm_twotower.commands.live import Run, print_table, start_engine, write_live

    print(f"Starting vLLM with the demo model ({DEMO_MODEL.name}), a few seconds ...", flush=True)
    # in fp32, where every machine writes the same tokens
    llm = start_engine(str(DEMO_MODEL), dtype="float32", kv_cache_memory_bytes=64 << 20)
    questions = args.prompt or list(DEMO_QUESTIONS)
    runs: list[Run] = []
    for mode, settings in DEMO_RUNS:
        title = ", ".join([mode, *(f"{name} {value}" for name, value in settings.items())])
        print(f"\n=== {title}")
        params = diffusion_params(mode=mode, temperature=0.0, max_tokens=args.max_tokens, **settings)
        runs.append(write_live(llm, [demo_prompt(question) for question in questions], params, title))
        if not args.prompt:
            answers = [recording.text.strip() for recording in runs[-1].recordings]
            right = sum(map(str.__eq__, answers, DEMO_QUESTIONS.values()))
            print(f"\n  {right} of {len(answers)} answers are right")
    print()
    print_table(runs)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from vllm_twotower import diffusion_params
    from vllm_twotower.commands.live import print_table, start_engine, write_live
    from vllm_twotower.commands.trace_page import render_page
    from vllm_twotower.config import EngineOptions

    if not args.html.parent.is_dir():
        raise ValueError(f"--html {args.html}: the folder {args.html.parent} does not exist; make it or name another")
    params = diffusion_params(
        confidence_threshold=args.confidence_threshold,
        max_steps=args.max_steps,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )
    llm = start_engine(args.model)
    run = write_live(llm, [args.prompt], params, title="mask_diffusion")
    print_table([run])
    threshold = args.confidence_threshold or EngineOptions().confidence_threshold
    about = (
        f"{pathlib.Path(args.model).name}: {run.num_tokens} tokens in {run.num_denoise_passes} denoise passes and "
        f"{run.num_context_passes} commits, confidence threshold {threshold:g}, temperature {args.temperature:g}"
    )
    decode = llm.get_tokenizer().decode
    page = render_page(run.recordings[0], lambda t: decode([t]), "Canvases denoising", about, threshold)
    args.html.write_text(page, encoding="utf-8")
    print(f"\nThe same as a page that plays it: {args.html}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """Print the report; 1 where shards and ``config.json`` disagree."""
    import json

    from vllm_twotower.planning.inspection import inspect
    from vllm_twotower.planning.inspection_text import describe

    report = inspect(
        args.model,
        tokens_per_request=args.tokens_per_request,
        canvas_length=args.canvas_length,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    print(json.dumps(report, indent=1) if args.json else describe(report))
    return 1 if report["checkpoint"]["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
