"""The ``vllm-twotower`` command: ``demo``, ``trace MODEL PROMPT``, ``inspect MODEL`` and ``quantize MODEL TARGET``."""

import argparse
import os
import pathlib
import sys

from vllm_twotower.core import DEFAULT_CANVAS_LENGTH, DEFAULT_CONFIDENCE_THRESHOLD, Mode
from vllm_twotower.planning.inspection import DEFAULT_TOKENS
from vllm_twotower.planning.placement import GPU_MEMORY_UTILIZATION

DEMO_MODEL = pathlib.Path(__file__).parents[1] / "assets" / "demo"


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

    demo = commands.add_parser(
        "demo", help="watch the small trained model that ships with the package answer, then compare three ways"
    )
    demo.add_argument(
        "--prompt",
        action="append",
        help=r"your own question instead of those built in, repeatable; \n is a new line, 'Answer:' is added. What the "
        "model was trained on is in its README, in assets/demo",
    )
    demo.add_argument("--max-tokens", type=int, default=96)
    demo.set_defaults(run=_demo)

    trace = commands.add_parser(
        "trace", help="show one prompt's canvases filling in, or drafts verified, here and as a page"
    )
    trace.add_argument("model")
    trace.add_argument("prompt")
    trace.add_argument(
        "--mode",
        choices=[Mode.MASK_DIFFUSION.value, Mode.SELF_SPECULATION.value],
        default=Mode.MASK_DIFFUSION.value,
        help="self_speculation shows drafts: what the context tower kept, what it struck out, and its own tokens",
    )
    trace.add_argument("--max-tokens", type=int, default=64)
    trace.add_argument("--confidence-threshold", type=float)
    trace.add_argument("--max-steps", type=int)
    trace.add_argument("--temperature", type=float, default=0.0)
    trace.add_argument("--html", type=pathlib.Path, default=pathlib.Path("trace.html"), help="the page to write")
    trace.set_defaults(run=_trace)

    inspect = commands.add_parser("inspect", help="say what a checkpoint needs and fits on, loading nothing")
    inspect.add_argument("model", help="a checkpoint folder, or a config.json")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument(
        "--tokens-per-request", type=int, help=f"prompt and output of each request (default {DEFAULT_TOKENS})"
    )
    inspect.add_argument("--canvas-length", type=int, default=DEFAULT_CANVAS_LENGTH)
    inspect.add_argument(
        "--gpu-memory-utilization", type=float, default=GPU_MEMORY_UTILIZATION, help="vLLM's option of that name"
    )
    inspect.set_defaults(run=_inspect)

    quantize = commands.add_parser(
        "quantize", help="write a checkpoint again in half the bytes, shard by shard, so that it starts faster"
    )
    quantize.add_argument("model", type=pathlib.Path, help="the folder of a BF16 checkpoint")
    quantize.add_argument("target", type=pathlib.Path, help="the folder to write, which must not exist or be empty")
    quantize.add_argument("--scheme", choices=["fp8", "int8"], default="fp8", help="int8 also runs on a CPU")
    quantize.set_defaults(run=_quantize)
    return parser


def _prepare_environment() -> None:
    """Before anything imports torch or triton: interpreter on a CPU, quiet logs, one process."""
    from shutil import which

    if which("nvidia-smi") is None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _demo(args: argparse.Namespace) -> int:
    from vllm_twotower.commands.demo import show_demo

    show_demo(DEMO_MODEL, args.prompt, args.max_tokens)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from vllm_twotower import diffusion_params
    from vllm_twotower.commands.live import start_engine, write_live
    from vllm_twotower.commands.trace_page import render_page

    if not args.html.parent.is_dir():
        raise ValueError(f"--html {args.html}: the folder {args.html.parent} does not exist; make it or name another")
    params = diffusion_params(
        mode=args.mode,
        confidence_threshold=args.confidence_threshold,
        max_steps=args.max_steps,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )
    llm = start_engine(args.model)
    run = write_live(llm, [args.prompt], params, title=args.mode)
    threshold = args.confidence_threshold or DEFAULT_CONFIDENCE_THRESHOLD
    speculates = args.mode == Mode.SELF_SPECULATION
    about = (
        f"{pathlib.Path(args.model).name}: {run.num_tokens} tokens in {run.num_denoise_passes} denoise passes and "
        f"{run.num_context_passes} {'verifications and steps without a draft' if speculates else 'commits'}, "
        f"confidence threshold {threshold:g}, temperature {args.temperature:g}"
    )
    print(about)
    title = "Drafts verified" if speculates else "Canvases denoising"
    decode = llm.get_tokenizer().decode
    page = render_page(run.recordings[0], lambda t: decode([t]), title, about, threshold)
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


def _quantize(args: argparse.Namespace) -> int:
    from vllm_twotower.commands.quantize import quantize_checkpoint

    written = quantize_checkpoint(args.model, args.target, args.scheme)
    print(
        f"{args.target}: {written.num_matrices:,} matrices in {args.scheme}, {written.bytes_after / 1e9:.2f} GB of "
        f"{written.bytes_before / 1e9:.2f}\nServe it without --quantization: vllm serve {args.target} --diffusion"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
