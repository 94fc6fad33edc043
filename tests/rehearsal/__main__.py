"""Rehearse one engine, and print what was found as JSON.

python -m tests.rehearsal h200 [--tp 2] [--rank 1] [--split] [--quantization fp8_per_tensor] [--rows 8] [--start-only]
"""

import argparse
import json
import os
import pathlib
import re
import sys
from typing import Any

SETTINGS = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is compiled when first used
    "HF_HUB_OFFLINE": "1",
}

os.environ.update(SETTINGS)
os.environ.pop("TRITON_INTERPRET", None)

# ruff: noqa: E402 - torch and vLLM read these when they are imported
from tests.rehearsal import device as devices
from tests.rehearsal import engine, flashinfer_kernels, gpu, operators

FOLDER = pathlib.Path(__file__).resolve().parents[2] / ".venv-rehearsal"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", choices=gpu.GPUS)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--quantization")
    parser.add_argument("--stored", choices=engine.STORED, help="how the checkpoint is quantised")
    parser.add_argument("--attention-backend")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--rows", type=int, default=2, help="requests at once")
    parser.add_argument("--flashinfer", action="store_true", help="as if FlashInfer's compiled kernels were installed")
    parser.add_argument(
        "--compile", action="store_true", help="compile the Triton kernels that are launched, for all GPUs"
    )
    parser.add_argument("--start-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.flashinfer:
        os.environ["VLLM_HAS_FLASHINFER_CUBIN"] = "1"
    else:  # and not because this machine has a compiler
        os.environ["CUDA_HOME"] = os.devnull
    made_up = gpu.GPUS[args.gpu]
    gpu.load_device_guard(FOLDER)
    gpu.make_up_torch_cuda(made_up, args.tp)
    operators.declare_operators(made_up.capability)
    gpu.make_up_platform(made_up, args.tp)
    device = devices.Device()
    devices.note_triton_launches(device)
    devices.read_lists(device)
    devices.look_inside_operators(device)
    devices.keep_materialised_parameters_fake()
    operators.stand_in_for_fa4(device.note_call)
    if args.flashinfer:
        flashinfer_kernels.stand_in_for_flashinfer(device.note_call)
    placement = "split" if args.split else "colocated"
    setup = engine.Setup(
        args.gpu,
        args.tp,
        args.rank,
        placement,
        args.quantization,
        args.attention_backend,
        args.kv_cache_dtype,
        args.stored,
    )
    try:
        found = rehearse(setup, device, 0 if args.start_only else args.rows, args.compile)
    except ValueError as refusal:  # vLLM's way to say that an engine cannot be; anything else is a fault here
        import vllm

        found = {"vllm": vllm.__version__, "engine": setup.title, "refused": shorten(str(refusal))}
    json.dump(found, sys.stdout, indent=1)


def shorten(refusal: str) -> str:
    """The sentence that says why, without pydantic's frame and without vLLM's advice."""
    return re.split(r"\[type=|(?<=[.!]) ", refusal.removeprefix("1 validation error for VllmConfig\n").strip())[
        0
    ].strip()


def rehearse(setup: engine.Setup, device: devices.Device, num_rows: int, compiles: bool) -> dict[str, Any]:
    import triton
    import vllm

    from tests.rehearsal import kernels, passes, report

    config = engine.make_config(setup)
    found: dict[str, Any] = {"vllm": vllm.__version__, "engine": setup.title}
    with engine.start_engine(setup, device, config) as core:
        found["start"] = report.describe_start(core, config)
        if num_rows:
            steps, watch = passes.rehearse(core, device, num_rows)
            found["steps"] = {step.name: report.describe_step(step, watch) for step in steps}
    if num_rows and compiles:
        launches = [launch for step in steps for launch in step.record.launches]
        return {"vllm": vllm.__version__, "triton": triton.__version__, "kernels": kernels.compile_kernels(launches)}
    return found


if __name__ == "__main__":
    main()
