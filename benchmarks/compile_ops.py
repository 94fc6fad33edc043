"""Compile every kernel at the real model's shapes, for GPUs that are not there, and tabulate what each needs.

    python -m benchmarks.compile_ops                     # sm_80, sm_90, sm_100 -> benchmarks/results/kernels.md
    python -m benchmarks.compile_ops --arch 90 --check   # compile only, fail on a spill; what a test runs
    python -m benchmarks.compile_ops --arch 90 --odd     # the same at sizes the real model does not have

What is compiled is what the ops launch: each op runs over tensors without memory (torch's meta device) and its launches
are noted down. Registers and spills are those of the ptxas that Triton brings, run over the PTX that Triton emits.
Nothing runs, so nothing here says how fast a kernel is.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

if os.environ.pop("TRITON_INTERPRET", "0") == "1":  # Triton reads it when it is imported, and then compiles nothing
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.compile_ops", *sys.argv[1:]])

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks import odd_shapes
from benchmarks.launches import Launch, recorded_launches
from benchmarks.op_cases import CASES
from benchmarks.paths import RESULTS

TABLE = RESULTS / "kernels.md"
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    registers: int
    """Per thread."""
    shared_bytes: int
    """Per program."""
    spilled_bytes: int
    """Per thread: spill stores and loads."""


def source(launch: Launch) -> ASTSource:
    """The kernel with the types and the specialisation that Triton's launcher would choose for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            constants[name] = value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = ALIGNED
    signature.update(dict.fromkeys(constants, "constexpr"))
    ordered = {name: signature[name] for name in launch.kernel.arg_names}
    return ASTSource(fn=launch.kernel, signature=ordered, constexprs=constants, attrs=attributes)


def resources(launch: Launch, architecture: int) -> Resources:
    """Compile one launch for an architecture, given as 90 for sm_90."""
    return measure(source(launch), {"num_warps": launch.num_warps, "enable_fp_fusion": False}, architecture)


def measure(made: ASTSource, options: dict[str, Any], architecture: int) -> Resources:
    """Compile a kernel with these options, and ask ptxas what it needs."""
    compiled = triton.compile(made, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={gpu}", str(path)]
        command += [] if options.get("enable_fp_fusion", True) else ["--fmad=false"]
        said = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    return Resources(registers, compiled.metadata.shared, stores + loads)


def launches() -> list[tuple[str, Launch]]:
    """What every op launches at the real model's shapes, with the case's name."""
    found = []
    for case in CASES:
        with recorded_launches() as recorded:
            case.run_kernel("meta")
        found += [(case.name, launch) for launch in recorded]
    return found


def odd_launches() -> list[tuple[str, Launch]]:
    """What the ops launch at odd sizes, each kind of specialisation once."""
    with recorded_launches() as recorded:
        odd_shapes.run_all()
    kinds = {}
    for launch in recorded:
        made = source(launch)
        kind = (launch.kernel.__name__, str(made.signature), str(made.constants), str(made.attrs), launch.num_warps)
        kinds[kind] = ("odd", launch)
    return list(kinds.values())


def table(architectures: tuple[int, ...], found: list[tuple[str, Launch]]) -> list[str]:
    """The rows, one per launch."""
    heads = [f"sm_{a} regs / shared B / spilled B" for a in architectures]
    lines = ["| op | kernel | programs | warps | " + " | ".join(heads) + " |"]
    lines.append("| --- | --- | --- | --- |" + " --- |" * len(heads))
    for name, launch in found:
        used = [resources(launch, a) for a in architectures]
        cells = [f"{u.registers} / {u.shared_bytes} / {u.spilled_bytes}" for u in used]
        programs = " x ".join(str(n) for n in launch.grid)
        kernel = launch.kernel.__name__
        lines.append(f"| {name} | `{kernel}` | {programs} | {launch.num_warps} | " + " | ".join(cells) + " |")
        if any(u.spilled_bytes for u in used):
            print(f"spills: {name} {kernel} {used}", file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="90 for sm_90")
    parser.add_argument("--check", action="store_true", help="print the table, write nothing, exit 1 on a spill")
    parser.add_argument("--odd", action="store_true", help="odd sizes instead of the real model's; as --check")
    args = parser.parse_args()
    lines = table(tuple(args.arch), odd_launches() if args.odd else launches())
    print("\n".join(lines))
    if args.check or args.odd:
        sys.exit(any(not cell.strip().endswith("/ 0") for line in lines[2:] for cell in line.split("|")[5:-1]))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join([*HEADER, *lines, ""]))


HEADER = [
    "# What the kernels need",
    "",
    f"`python -m benchmarks.compile_ops`, Triton {triton.__version__}, no GPU present: compiled, never run. Shapes are",
    "those of the 30B model: 64 requests of 16 tokens, bf16 activations, fp32 states. Registers are per thread, shared",
    "memory per program, spilled bytes (stores and loads) per thread, as ptxas -v says.",
    "",
]

if __name__ == "__main__":
    main()
