"""Timings on the machine this runs on, after the tests that make them worth something.

``python -m benchmarks.run generate`` times whole generations (``generate.py``), ``python -m benchmarks.run cpp`` the
C++ ops (``cpp_ops.py``).

``python -m benchmarks.run ops`` times the ops. On a GPU their tests run natively first, then each kernel is compared
with its reference at the timed shapes; a red test or a difference prints no figure and exits 1. Both forms are timed
there. Elsewhere kernels would run in Triton's interpreter, whose time says nothing, so only references are timed, and
only over cases that a CPU can hold.

Each figure is p20 / p50 / p80 of single calls (on a GPU with a cold L2 cache), and GB/s at p50 of the bytes that any
implementation must move once (``op_cases.py``). Writes ``benchmarks/results/ops-<gpu or cpu>.json``.
"""

# ruff: noqa: E402 - Triton is imported after the environment is what it must be

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
os.environ["TRITON_INTERPRET"] = "0" if ON_GPU else "1"

from benchmarks import generate as generation
from benchmarks.machine import environment
from benchmarks.markdown_table import table
from benchmarks.op_cases import CASES, Case
from benchmarks.paths import RESULTS, ROOT

QUANTILES = (0.2, 0.5, 0.8)
CPU_FLOOR_BYTES = 64 << 20
"""A case that moves more is not timed on a CPU."""
CPU_SECONDS = 2.0


def require_green(tests: list[str]) -> None:
    """No green test, no number."""
    chosen = [] if ON_GPU else ["-m", "not slow"]
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, *chosen], cwd=ROOT, check=False).returncode:
        raise SystemExit("the tests are red: no figures")


def tensors_of(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result if isinstance(result, tuple) else vars(result).values())


def require_same(case: Case, inputs: tuple[Any, ...]) -> None:
    """Kernel and reference agree at the timed shapes, integers exactly."""
    from tests.tolerances import BF16_OP

    # each over its own copy: some ops write in place
    got, expected = (tensors_of(form(*copy.deepcopy(inputs))) for form in (case.kernel, case.reference))
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g.is_floating_point():
            difference = float((g.double() - e.double()).abs().max() / e.double().abs().max())
        else:
            difference = float((g != e).double().mean())
        if not difference < (BF16_OP if g.is_floating_point() else 1e-9):
            raise SystemExit(f"{case.name}: result {index} of the kernel differs from the reference's by {difference}")


def seconds_on_gpu(run: Callable[[], Any]) -> list[float]:
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(run, quantiles=list(QUANTILES))]


def seconds_on_cpu(run: Callable[[], Any]) -> list[float]:
    run()  # first use costs more
    times: list[float] = []
    while sum(times) < CPU_SECONDS or len(times) < 5:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return [float(q) for q in torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double())]


def measure(case: Case) -> list[dict[str, Any]]:
    inputs = case.inputs("cuda" if ON_GPU else "cpu")
    forms = {"reference": case.reference}
    if ON_GPU:
        require_same(case, inputs)
        forms = {"kernel": case.kernel, **forms}
    rows = []
    for form, function in forms.items():
        p20, p50, p80 = (seconds_on_gpu if ON_GPU else seconds_on_cpu)(lambda function=function: function(*inputs))
        rows.append(
            {
                "case": case.name,
                "form": form,
                "p20_us": round(p20 * 1e6, 1),
                "p50_us": round(p50 * 1e6, 1),
                "p80_us": round(p80 * 1e6, 1),
                "floor_bytes": case.floor_bytes,
                "gb_per_s": round(case.floor_bytes / p50 / 1e9, 1),
            }
        )
    return rows


def ops(args: argparse.Namespace) -> None:
    if not args.skip_tests:
        tests = (ROOT / "tests").glob("test_op_*.py")
        require_green(sorted(str(path) for path in tests if path.stem != "test_op_backend"))
    torch.manual_seed(0)
    rows = []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        if not ON_GPU and case.floor_bytes > CPU_FLOOR_BYTES:
            print(f"{case.name}: moves {case.floor_bytes >> 20} MiB, not timed on a CPU", file=sys.stderr)
            continue
        rows += measure(case)
    print("\n".join(table(rows)))
    if args.skip_tests or args.only:
        print("a part, or tests skipped: nothing written", file=sys.stderr)
        return
    out = RESULTS / f"ops-{'gpu' if ON_GPU else 'cpu'}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def generate(args: argparse.Namespace) -> None:
    if not args.skip_tests:
        require_green(generation.PARITY)
    rows = generation.measure(args)
    if not args.skip_tests:
        generation.report(rows, environment(), args)


def cpp(args: argparse.Namespace) -> None:
    from benchmarks import cpp_ops

    if not args.skip_tests:
        require_green(cpp_ops.TESTS)
    rows = cpp_ops.measure()
    lines = table(rows)
    print("\n".join(lines))
    if not args.skip_tests:
        found = environment()
        about = f"Commit {found['commit'][:9]}, torch {found['torch']}, {found['threads']} threads, fastest calls."
        text = "\n".join(["# C++ ops beside their references", "", about, "", *lines]) + "\n"
        (RESULTS / "cpp-ops.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("ops", help="time the ops")
    timing.add_argument("--only", help="cases whose name contains this; writes no file")
    timing.add_argument("--skip-tests", action="store_true", help="for work on this script; writes no file")
    timing.set_defaults(run=ops)
    compiled = commands.add_parser("cpp", help="time the ops in C++ beside their references")
    compiled.add_argument("--skip-tests", action="store_true", help="for work on this script; writes no file")
    compiled.set_defaults(run=cpp)
    generating = commands.add_parser("generate", help="time whole generations, and what they are compared with")
    generation.add_arguments(generating)
    generating.set_defaults(run=generate)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
