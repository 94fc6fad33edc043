"""What every mode keeps of AR's quality, and at what speed, on the demo model's held-out questions.

    make quality

Everything in the first table goes through the real vLLM engine, with the end of sequence honoured; the ablations go
through the plain-torch reference, which the engine equals token for token. Writes ``quality.json``, ``quality.md`` and
``quality.png`` into ``benchmarks/results``.
"""

import argparse
import itertools
import json
import os
import pathlib
import time

from benchmarks.paths import RESULTS

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TRITON_INTERPRET", "1")

GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
STEPS = (4, 8, 16)


def evaluate(model: pathlib.Path, per_family: int, gammas=GAMMAS, steps=STEPS, prose: int = 60) -> dict:
    """Every setting through one engine."""
    from benchmarks.quality_parts.engine_runs import ask, bits_per_byte, started
    from benchmarks.quality_parts.questions import FAMILIES, held_out, held_out_prose

    items = held_out(per_family)
    with started(model) as llm:
        report = {"questions": len(items), "families": len(FAMILIES), "ar": ask(llm, items, "ar").row()}
        _say("ar", report["ar"])
        report["self_speculation"] = ask(llm, items, "self_speculation").row()
        _say("self-speculation", report["self_speculation"])
        report["bits_per_byte"] = round(bits_per_byte(llm, held_out_prose(prose)), 4) if prose else None
        report["mask_diffusion"] = []
        for max_steps, gamma in itertools.product(steps, gammas):
            outcome = ask(llm, items, "mask_diffusion", confidence_threshold=gamma, max_steps=max_steps)
            row = {"gamma": gamma, "max_steps": max_steps, **outcome.row()}
            _say(f"gamma {gamma} T {max_steps}", row)
            report["mask_diffusion"].append(row)
    return report


def ablate(model: pathlib.Path, per_family: int) -> list[dict]:
    """Every ablation through the plain reference."""
    from benchmarks.quality_parts.ablations import CASES, PlainRun
    from benchmarks.quality_parts.questions import held_out

    run, rows = PlainRun(model), []
    for name in CASES:
        rows.append({"name": name, **run.ask(held_out(per_family), name).row()})
        _say(name, rows[-1])
    return rows


def _say(title: str, row: dict) -> None:
    print(f"{title}: {row['exact']['overall']:.3f} exact, {row['tokens_per_forward']:.2f} tokens/forward", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from vllm_twotower.commands.cli import DEMO_MODEL

    parser.add_argument("--model", type=pathlib.Path, default=DEMO_MODEL)
    parser.add_argument("--per-family", type=int, default=16, help="questions of each family")
    parser.add_argument("--ablation-per-family", type=int, default=4, help="the same for the ablations; 0 for none")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    started = time.perf_counter()
    report = evaluate(args.model, args.per_family)
    report["ablation_questions"] = args.ablation_per_family * report["families"]
    report["ablations"] = ablate(args.model, args.ablation_per_family) if args.ablation_per_family else []
    report["seconds"] = round(time.perf_counter() - started)
    from benchmarks.quality_parts.report import markdown, picture

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "quality.md").write_text(markdown(report))
    picture(report, args.out / "quality.png")
    print(markdown(report))


if __name__ == "__main__":
    main()
