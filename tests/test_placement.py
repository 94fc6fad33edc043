"""Worker processes over gloo: towers split, split and sharded, and both sharded over all; NVIDIA's tokens each way."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import httpx
import openai
import pytest
import torch

from benchmarks.paths import REAL_MODEL
from tests.demo_questions import LONG
from tests.harness.server import is_healthy, vllm_server
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.config import EngineOptions
from vllm_twotower.models.tensor_shapes import checkpoint_shapes
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.placement import SplitTraffic
from vllm_twotower.planning.tower_sizes import Tower, TowerSizes
from vllm_twotower.split.model import SplitTwoTowerForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPLIT = {"passes_per_step": 4, "tower_placement": "split"}
COLOCATED = {"passes_per_step": 4}  # tower_placement auto: colocated where the heads divide
SOME = {
    "mask_diffusion": [24, 27, 30, 33, 36, 40],
    "ar": [0, 1],
    "mock_ar": [0, 1],
    "self_speculation": [2, 3, 4, 5, 6],
}


def run_job(name, **job):
    """In a process of its own, the engine in it and each worker in another."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.two_ranks", name, json.dumps(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def run(golden, diffusion, cases, rounds=0, **engine):
    answer = run_job(golden.name, diffusion=diffusion, cases=cases, rounds=rounds, engine=engine)
    name = {"self_speculation": "ar"}
    expected = [getattr(golden, name.get(mode, mode))[i] for mode, indices in cases.items() for i in indices]
    assert expected, "no cases, no test"
    assert answer["tokens"] == [case["output"] for case in expected]
    return answer


def bytes_of(traffic, sent):
    """What a context rank should have sent."""
    kv, states = traffic.kv_bytes_per_token * sent["num_tokens"], traffic.state_bytes_per_row * sent["num_states"]
    return kv + states + traffic.kept_bytes_per_token * sent["num_kept"]


def everything(golden, canvas_length):
    canvas = [i for i, c in enumerate(golden.mask_diffusion) if c["params"]["block_size"] == canvas_length]
    all_ar = range(len(golden.ar))
    mock_ar = range(len(golden.mock_ar))
    return {"mask_diffusion": canvas, "ar": all_ar, "self_speculation": all_ar, "mock_ar": mock_ar}


def test_split_towers_write_the_references_tokens(tiny_moe):
    """With log-probabilities; each rank loads its own tower; what crosses is what the formula says; nothing is kept."""
    cases = {"mask_diffusion": SOME["mask_diffusion"]}
    assert {tiny_moe.mask_diffusion[i]["params"]["block_size"] for i in cases["mask_diffusion"]} == {16}
    answer = run(tiny_moe, {"passes_per_step": 1, "tower_placement": "split"}, cases, rounds=3)
    counts = answer["num_tensors"]
    assert any(a == b for a, b in itertools.pairwise(counts)), f"tensors after each round: {counts}"
    assert answer["num_logprobs"] == [len(tokens) for tokens in answer["tokens"]]

    facts = dataclasses.replace(ModelFacts.from_config(tiny_moe.config), dtype="float32")
    sizes = [TowerSizes.of(facts, tower).num_parameters for tower in (Tower.CONTEXT, Tower.DENOISER)]
    # the denoiser's rank advances Mamba states by itself: it needs a little of the other tower
    shapes = {n: s for n, s in checkpoint_shapes(facts).items() if n.startswith("context_tower.layers.")}
    sizes[1] += sum(math.prod(s) for n, s in shapes.items() if n.endswith((".conv1d.weight", ".conv1d.bias")))
    sizes[1] += sum(math.prod(s) for n, s in shapes.items() if n.endswith((".A_log", ".D", ".dt_bias")))
    assert answer["weight_bytes"] == [4 * size for size in sizes]
    assert answer["num_heads"] == [tiny_moe.config["num_attention_heads"]] * 2, "none of a tower's are on another rank"

    traffic, (to_denoiser, back) = SplitTraffic.of(facts, 16), answer["traffic"]
    stats = answer["stats"]
    committed = sum(len(tokens) - 16 for tokens in answer["tokens"])  # nobody reads a request's last canvas
    assert to_denoiser["num_tokens"] == answer["num_prompt_tokens"] + committed
    assert to_denoiser["num_states"] == len(answer["tokens"])
    assert to_denoiser["num_kept"] == committed
    assert to_denoiser["num_messages"] == stats["context_steps"]
    assert to_denoiser["num_bytes"] == bytes_of(traffic, to_denoiser)
    assert back["num_messages"] == stats["denoise_steps"]
    assert back["num_bytes"] == traffic.bytes_per_denoise_step_back * stats["denoise_passes"]


@pytest.mark.slow
@pytest.mark.parametrize("diffusion", [SPLIT, COLOCATED], ids=["split", "colocated"])
@pytest.mark.parametrize(
    ("name", "canvas_length"), [("tiny_moe", 16), ("tiny_mlp", 8), ("tiny_mlp", 16), ("tiny_mlp", 32)]
)
def test_all_goldens_on_two_ranks(name, canvas_length, diffusion, request):
    golden = request.getfixturevalue(name)
    cases = {mode: list(indices) for mode, indices in everything(golden, canvas_length).items()}
    if canvas_length != 16:
        cases = {"mask_diffusion": cases["mask_diffusion"]}
    run(golden, {**diffusion, "canvas_length": canvas_length}, cases)


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "placement", ["split", pytest.param("colocated", marks=pytest.mark.slow)], ids=["split", "colocated"]
)
def test_drafts_on_two_ranks(placement, temperature):
    """AR's own tokens where drafts are mostly right, and hints cross too."""
    job = {"diffusion": {"tower_placement": placement}, "questions_per_family": 1, "engine": {}}
    answer = run_job("demo", temperature=temperature, **job)
    answers, stats = answer["answers"], answer["stats"]
    assert answers["self_speculation"] == answers["ar"]
    forwards = stats["denoise_passes"] + stats["context_passes"] - len(answers["ar"])
    assert sum(map(len, answers["ar"])) > 2.5 * forwards
    if placement == "split":
        # a request's states cross once in each mode that drafts
        assert answer["traffic"][0]["num_states"] == len(answers["ar"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 50, "max_num_seqs": 16},
        {"num_gpu_blocks_override": 14},
        {"enforce_eager": False},
    ],
    ids=["no prefix caching", "50 tokens a step", "preemption", "compiled and profiled, as users start it"],
)
@pytest.mark.parametrize("diffusion", [SPLIT, COLOCATED], ids=["split", "colocated"])
def test_two_ranks_under_pressure(tiny_moe, diffusion, settings):
    answer = run(tiny_moe, diffusion, SOME, **settings)
    assert (answer["num_preemptions"] > 0) == ("num_gpu_blocks_override" in settings)


@pytest.mark.slow
def test_two_ranks_per_tower(tiny_moe):
    """Each pair's messages carry half of the key-value heads and half of the Mamba heads."""
    first, second, *denoisers = run(tiny_moe, SPLIT, SOME, tensor_parallel_size=4)["traffic"]
    facts = dataclasses.replace(ModelFacts.from_config(tiny_moe.config), dtype="float32")
    traffic = SplitTraffic.of(facts, 16)
    assert 2 * second["num_bytes"] == bytes_of(traffic, second) > 0
    assert all(first[n] == second[n] > 0 for n in ("num_tokens", "num_states", "num_kept"))
    assert [sent["num_bytes"] > 0 for sent in denoisers] == [True, False], "canvases come from the first denoiser rank"


@pytest.mark.parametrize(
    ("placement", "size", "split"),
    [
        ("auto", 1, False),
        ("auto", 2, False),
        ("auto", 8, False),
        ("auto", 16, True),  # the released model has 8 Mamba groups
        ("colocated", 4, False),
        ("split", 2, True),
        ("split", 4, True),
    ],
)
def test_what_auto_means(placement, size, split):
    config = json.loads((REAL_MODEL / "config.json").read_text())
    assert EngineOptions(tower_placement=placement).is_split(size, types.SimpleNamespace(**config)) is split


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpu_workers")
@pytest.mark.parametrize("victim", [0, 1], ids=["context rank", "denoiser rank"])
def test_a_killed_worker_ends_the_server_and_no_client_hangs(tmp_path, victim):
    log = tmp_path / "log"
    options = ["--diffusion", '{"tower_placement": "split"}', "--tensor-parallel-size", "2"]
    options += ["--served-model-name", "demo", "--dtype", "float32"]
    options += ["--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]
    with vllm_server(DEMO_MODEL, *options, log=log) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        endless = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(model="demo", prompt=LONG, **endless)
        assert next(iter(stream)).choices[0].text
        os.kill(int(re.search(rf"\(VllmWorker-{victim} pid=(\d+)\)", log.read_text())[1]), signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        assert time.monotonic() - killed < 30
        while is_healthy(url):
            assert time.monotonic() - killed < 30
            time.sleep(0.3)
    assert re.search(r"died|dead|EngineDeadError", log.read_text())


def test_a_denoiser_ranks_logits_are_memory_of_their_own():
    """vLLM's kernels (grammar, temperature, draws) write rows through strides they assume."""
    vocab_size, hidden = 40, torch.zeros(3, 1)
    rank = types.SimpleNamespace(holds_context=False, config=types.SimpleNamespace(vocab_size=vocab_size))
    logits = SplitTwoTowerForCausalLM.compute_logits(rank, hidden)
    assert logits.shape == (3, vocab_size)
    assert logits.stride() == (vocab_size, 1)
    assert logits.untyped_storage().nbytes() == 3 * vocab_size * logits.element_size()
    assert logits.untyped_storage().data_ptr() != hidden.untyped_storage().data_ptr()
