"""What a GPU user gets, rehearsed on made-up GPUs (``tests/rehearsal``), held against what was found before.

`make rehearsal` sets up what it needs and runs all of it. A difference from a file in ``rehearsal/golden`` is a change
of ours or of vLLM's to look at; ``make rehearsal GOLDEN=1`` writes it down.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.rehearsal.passes import PROMPT_TOKENS

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-rehearsal"
GOLDEN = ROOT / "tests" / "rehearsal" / "golden"
WRITES = bool(os.environ.get("GOLDEN"))

ENGINES = [
    ("0.33.0", engine)
    for engine in (
        "h200",
        "b200",
        "b200 --flashinfer",
        "h100 --quantization fp8_per_tensor",
        "h100 --tp 2 --rank 1",
        "h100 --tp 2 --split",
        "h100 --tp 2 --split --rank 1",
        "a100 --tp 2",
        "h200 --flashinfer --attention-backend FLASHINFER",
        "b200 --flashinfer --attention-backend FLASHINFER",
        "b200 --flashinfer --quantization fp8_per_tensor",
        "b200 --stored nvfp4-experts",
        "b200 --flashinfer --stored nvfp4-experts",
    )
]
"""vLLM's version, and what the rehearsal is told."""

PLANNED = [one for one in ENGINES if "FLASHINFER" in one[1]]
"""Those of these whose attention FlashInfer plans."""

CONTEXT_ONLY = ("0.33.0", "h100 --tp 2 --split")
"""The one of these whose rank has no denoiser."""

REFUSED = {
    ("0.33.0", "h100 --start-only"): "memory",
    ("0.33.0", "b200 --flashinfer --attention-backend FLASHINFER --kv-cache-dtype fp8 --start-only"): "no FP8 queries",
    ("0.33.0", "b200 --flashinfer --kv-cache-dtype nvfp4 --start-only"): "not causal",
}
"""Engines that vLLM or this package does not start, and what it says."""

OURS = {
    "denoiser attention": ("_norm_and_modulate", "_gate_add"),
    "denoiser mamba": ("_norm_and_modulate", "_seeded_conv", "_seeded_scan", "_gated_norm", "_gate_add"),
    "denoiser experts": ("_norm_and_modulate", "_gate_add"),
    "outside layers": ("_read_piece", "_join_pieces", "_reveal"),
}
"""Kernels of this package that a denoise pass launches, once each, by part of the model."""

PASSES = {"denoise pass", "mock-AR pass", "draft"}
"""Steps that run the denoiser; on a rank without the context tower the first two."""

READ = "from the device, the host waits: vllm_twotower/runtime/denoise_loop.py:read_outcome"
"""What a denoise step waits for, once, at its end."""

pytestmark = pytest.mark.slow


@functools.cache
def rehearse(version, engine):
    folder = FOLDER / version
    if not (folder / "operators.json").is_file():
        pytest.skip(f"vLLM {version}'s CUDA wheel is not unpacked here: make rehearsal")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-m", "tests.rehearsal", *engine.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(("version", "engine"), [*ENGINES, *REFUSED])
def test_rehearsal_finds_what_it_found(version, engine):
    found = rehearse(version, engine)
    path = GOLDEN / f"{version}-{engine.replace(' --', '-').replace(' ', '-')}.json"
    if WRITES:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8")), f"{path.name}: make rehearsal GOLDEN=1, then read it"


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_denoise_passes_leave_nothing_off_the_device(version, engine):
    steps = rehearse(version, engine)["steps"]
    for name in PASSES & steps.keys():
        step = steps[name]
        assert step["tower"] == "denoise"
        assert step["off the device"] == [], name


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_no_step_waits_to_send_and_only_denoise_steps_read(version, engine):
    for name, step in rehearse(version, engine)["steps"].items():
        waits = {k: n for k, n in step["transfers"].items() if ", the host waits: " in k}
        reads = {READ: 1} if step["tower"] == "denoise" else {}
        assert waits == reads, name


@pytest.mark.parametrize(("version", "engine"), [one for one in ENGINES if one != CONTEXT_ONLY])
def test_denoise_passes_launch_the_kernels(version, engine):
    steps = rehearse(version, engine)["steps"]
    for name in PASSES & steps.keys():
        launches = steps[name]["launches"]
        for part, kernels in OURS.items():
            assert {k: launches[part].get(f"triton {k}") for k in kernels} == dict.fromkeys(kernels, 1), (name, part)
    if "draft" not in steps:
        return
    replayed = steps["verification and replay"]["launches"]
    assert any("triton _replay_state" in part for part in replayed.values()), replayed


@pytest.mark.parametrize(("version", "engine"), REFUSED)
def test_what_cannot_be_is_refused(version, engine):
    assert REFUSED[version, engine] in rehearse(version, engine)["refused"]


PLAN = re.compile(
    r"flashinfer plans on the host \(\w+\): "
    r"causal=(\w+), queries (\[.*?\]), keys (\[.*?\]), pages (\[.*?\]) of (\d+)"
)
"""How FlashInfer's attention is told of a step."""


@pytest.mark.parametrize(("version", "engine"), PLANNED)
def test_canvases_are_planned_to_see_their_context_and_themselves(version, engine):
    """On the host, once for all layers; every query of a row attends to all its keys: the context's and the canvas'."""
    steps = rehearse(version, engine)["steps"]
    for name, width in {"denoise pass": 16, "draft": 16, "mock-AR pass": 1}.items():
        launches = steps[name]["launches"]
        plans = [found for launch in launches["outside layers"] if (found := PLAN.fullmatch(launch))]
        if width == 1 and "h200" in engine:  # Hopper's kernel for rows of one token plans nothing and masks nothing
            assert launches["denoiser attention"]["flashinfer xqa_batch_decode_with_kv_cache 1 tokens a row"] == 1
            continue
        (plan,) = plans
        prompt = PROMPT_TOKENS - (width == 1)  # the last token is mock-AR's canvas
        keys, page = prompt + width, int(plan[5])
        assert plan.groups() == ("False", f"{[width] * 2}", f"{[keys] * 2}", f"{[-(-keys // page)] * 2}", plan[5])
        attended = [n for n in launches["denoiser attention"] if n.startswith("flashinfer paged attention")]
        assert [name.endswith("not causal") for name in attended] == [True]


@pytest.mark.parametrize(("version", "engine"), [("0.33.0", "h200 --rows 8 --compile")])
def test_kernels_compile_as_they_are_launched(version, engine):
    """This package's, for every GPU, without spilling registers."""
    ours = rehearse(version, engine)["kernels"]
    assert ours.keys() >= {kernel for part in OURS.values() for kernel in part} | {"_replay_state", "_shift_window"}
    assert {found[arch] for found in ours.values() for arch in found if arch.startswith("sm_")} == {"compiles"}


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_dtypes_are_as_promised(version, engine):
    found = rehearse(version, engine)
    assert found["start"]["Mamba caches"][1].endswith("float32")
    for step in found["steps"].values():
        routers = {kind for name, kind in step["dtypes"].items() if name.endswith("router logits")}
        assert routers <= {"float32"}
