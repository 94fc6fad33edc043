"""New weights in a running engine (vLLM's ``reload_weights``, which training loops and sleep mode use)."""

import functools
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.harness.engine import start_engine
from tests.test_placement import run_job
from vllm_twotower import diffusion_params
from vllm_twotower.commands.cli import DEMO_MODEL

PROMPTS = [[5, 6, 7, 8, 9], list(range(10, 40))]
MODES = ("ar", "mask_diffusion", "self_speculation", "mock_ar")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The demo model with other weights of every kind in both towers."""
    folder = tmp_path_factory.mktemp("other")
    for file in DEMO_MODEL.iterdir():
        shutil.copy(file, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor * (0.9 if tensor.ndim > 1 else 1.02) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(e):
    params = functools.partial(diffusion_params, temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    return {mode: e.tokens(PROMPTS, params(mode=mode)) for mode in MODES}


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_reloaded_weights_are_the_ones_that_decode(other_model, enforce_eager):
    """The same file again changes nothing; another's weights write what an engine of their own writes; and back."""
    settings = {"enforce_eager": enforce_eager, "enable_prefix_caching": False}
    with start_engine(other_model, **settings) as e:
        others = write(e)
    with start_engine(DEMO_MODEL, **settings) as e:
        first = write(e)
        e.llm.collective_rpc("reload_weights")
        assert write(e) == first
        e.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
        assert write(e) == others != first
        e.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(DEMO_MODEL)})
        assert write(e) == first


@pytest.mark.parametrize("placement", ["split", pytest.param("colocated", marks=pytest.mark.slow)])
def test_weights_reloaded_on_two_ranks(other_model, placement):
    """An engine that started with other weights answers as the demo model does: right."""
    job = {"diffusion": {"tower_placement": placement}, "questions_per_family": 1, "engine": {}}
    answer = run_job("demo", temperature=0.0, start_with=str(other_model), **job)
    assert answer["answers"]["self_speculation"] == answer["answers"]["ar"]
    assert answer["num_right"] == 2 * len(answer["answers"]["ar"]) == 22
