"""``vllm-twotower quantize``: what it writes, and that the engine computes with it what the format says."""

import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.harness.engine import start_engine
from vllm_twotower import diffusion_params
from vllm_twotower.commands.cli import DEMO_MODEL, main
from vllm_twotower.commands.quantize import quantize_checkpoint
from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.models.tensor_shapes import MATRIX_END
from vllm_twotower.oracle import plain_towers
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower, TowerShape
from vllm_twotower.planning.inspection import inspect

LARGEST = {"int8": 127, "fp8": 448}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Quantised copies by source and scheme, each made once."""
    made = {}

    def find(source, scheme):
        if (source, scheme) not in made:
            made[source, scheme] = tmp_path_factory.mktemp("quantised") / scheme
            quantize_checkpoint(source, made[source, scheme], scheme, report=lambda _: None)
        return made[source, scheme]

    return find


def in_shards(source, folder, num_shards=3):
    """A copy in several shards, in which a matrix's neighbours are in other files."""
    tensors = load_file(source / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for part in range(num_shards):
        file = f"model-{part + 1:05}-of-{num_shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[part::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[part::num_shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_what_is_written(tmp_path, tiny_moe, scheme, capsys):
    source, target = in_shards(tiny_moe.path, tmp_path), tmp_path / "quantised"
    (source / "tokenizer.json").write_text("{}")
    (source / "consolidated.00.pth").write_bytes(b"weights once more")
    assert main(["quantize", str(source), str(target), "--scheme", scheme]) == 0
    assert f"176 matrices in {scheme}" in capsys.readouterr().out
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "consolidated.00.pth").exists()
    assert inspect(str(target))["checkpoint"]["agrees"]

    before = load_file(tiny_moe.path / "model.safetensors")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    after = {}
    for file in sorted(target.glob("*.safetensors")):
        content = load_file(file)
        assert {n for n, f in index["weight_map"].items() if f == file.name} == content.keys()
        after |= content
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    for name, tensor in before.items():
        if not name.endswith(MATRIX_END):
            assert torch.equal(after[name], tensor), name
            continue
        scale = after[f"{name}_scale"]
        assert scale.shape == (len(tensor), 1)
        error = (after[name].float() * scale - tensor).abs()
        # half a step: of int8 the scale itself, of fp8 a share of the number, or below its normal ones a fixed one
        bound = scale / 2 if scheme == "int8" else (tensor.abs() * 2**-4).maximum(scale * 2**-10)
        assert bool((error <= bound * 1.01).all()), name


def test_a_source_that_cannot_be_quantised_is_refused(tmp_path, tiny_moe, folder_of, capsys):
    done = folder_of(tiny_moe.path, "int8")
    lacking = in_shards(tiny_moe.path, tmp_path)
    (lacking / "model-00002-of-00003.safetensors").unlink()
    infinite = tmp_path / "infinite"
    infinite.mkdir()
    tensors = load_file(tiny_moe.path / "model.safetensors")
    tensors["context_tower.layers.0.mixer.in_proj.weight"][3, 5] = float("inf")
    save_file(tensors, infinite / "model.safetensors")
    (infinite / "config.json").write_bytes((tiny_moe.path / "config.json").read_bytes())
    for source, target, message in (
        (done, tmp_path / "new", "has a quantization_config: quantise the BF16 checkpoint"),
        (lacking, tmp_path / "new", "lacks 1 of the files that its index names: model-00002-of-00003.safetensors"),
        (tiny_moe.path, done, "is there already and not an empty folder"),
        (tiny_moe.path / "config.json", tmp_path / "new", "is not a folder"),
        (infinite, tmp_path / "new", "context_tower.layers.0.mixer.in_proj.weight holds NaN or infinite"),
    ):
        assert main(["quantize", str(source), str(target)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "config.json").exists()


# ---- the engine on what was written ----------------------------------------------------------------------------------


class QuantisingInputs:
    """``torch.nn.functional`` whose ``linear`` quantises its inputs token by token, for some weights."""

    def __init__(self, weights, scheme):
        self.weights, self.scheme = {id(weight) for weight in weights}, scheme

    def __getattr__(self, name):
        return getattr(F, name)

    def linear(self, x, weight, bias=None):
        if id(weight) in self.weights:
            scale = (x.abs().amax(-1, keepdim=True) / LARGEST[self.scheme]).clamp_min(1e-9)
            steps = x / scale
            x = (steps.round() if self.scheme == "int8" else steps.to(torch.float8_e4m3fn).float()) * scale
        return F.linear(x, weight, bias)


def plain_towers_of(folder, scheme, monkeypatch):
    """The plain towers on a quantised checkpoint. Experts take their inputs as they are, as the CPU's do."""
    tensors = load_file(folder / "model.safetensors")
    weights = {n: t.float() for n, t in tensors.items() if not n.endswith("_scale")}
    quantised = []
    for name in [n for n in weights if f"{n}_scale" in tensors]:
        weights[name] *= tensors[f"{name}_scale"]
        if ".experts." not in name:
            quantised.append(weights[name])
    assert quantised
    monkeypatch.setattr(plain_towers, "F", QuantisingInputs(quantised, scheme))
    return PlainTwoTower(weights, TowerShape.from_config(json.loads((folder / "config.json").read_text())))


PROMPT = [4 + i * 37 % 500 for i in range(40)]


@torch.inference_mode()
def log_probs_of_towers(towers):
    """Of the context tower after each token of the prompt but the last, and of the denoiser on a canvas of masks."""
    cache = ContextCache()
    hidden_BLD = towers.extend_context(torch.tensor([PROMPT]), cache)
    canvas_BS = torch.full((1, 16), MASK_TOKEN_ID)
    logits_SV = towers.denoise(canvas_BS, torch.ones(1), cache)[0]
    logits_SV[:, MASK_TOKEN_ID] = -float("inf")
    return towers.context_logits(hidden_BLD)[0, :-1].log_softmax(-1), logits_SV.log_softmax(-1)


def log_probs_of_engine(engine):
    """The same of an engine, by what a request can ask for."""
    common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    context = engine.generate([PROMPT], diffusion_params(mode="ar", max_tokens=1, prompt_logprobs=-1, **common))[0]
    canvas = engine.generate([PROMPT], diffusion_params(max_tokens=16, max_steps=1, logprobs=-1, **common))[0]

    def stack(positions):
        rows = torch.full((len(positions), engine.model.config.vocab_size), -float("inf"))
        for row, found in zip(rows, positions, strict=True):
            for token, log_prob in found.items():
                row[token] = log_prob.logprob
        return rows

    return stack(context.prompt_logprobs[1:]), stack(canvas.outputs[0].logprobs)


def divergence(p_NV, q_NV):
    """Of each row's distribution from another, in nats."""
    return (p_NV.exp() * (p_NV - q_NV)).nan_to_num(0.0).sum(-1)


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_both_towers_compute_in_eight_bits_what_the_format_says(tiny_moe, folder_of, monkeypatch, scheme):
    """vLLM's eight-bit layers against the plain towers with numbers rounded as the format rounds them: experts, Mamba,
    attention, shared experts of a random model, in which one wrong scale changes every token."""
    folder = folder_of(tiny_moe.path, scheme)
    with start_engine(folder, max_logprobs=-1) as e:
        found = log_probs_of_engine(e)
        kernels = {type(getattr(m.scheme, "kernel", None) or m.scheme.fp8_linear).__name__ for m in scheme_layers(e)}
    assert len(kernels) == 1
    expected = log_probs_of_towers(plain_towers_of(folder, scheme, monkeypatch))
    for of_engine, of_towers in zip(found, expected, strict=True):
        assert torch.equal(of_engine.argmax(-1), of_towers.argmax(-1))
        # an input that lies between two steps may go either way, and fp8's steps are wide
        bound = 1e-3 if scheme == "int8" else 0.05
        assert float(divergence(of_towers, of_engine).mean()) < bound


def scheme_layers(engine):
    from vllm.model_executor.layers.linear import LinearBase

    return [m for m in engine.model.modules() if isinstance(m, LinearBase) and getattr(m, "scheme", None) is not None]


@pytest.mark.usefixtures("without_amx")
def test_the_demo_model_in_int8_stays_close_to_its_bf16_self(folder_of):
    folder = folder_of(DEMO_MODEL, "int8")
    with start_engine(folder, max_logprobs=-1) as e:
        found = log_probs_of_engine(e)
        assert len(scheme_layers(e)) > 40
    expected = log_probs_of_towers(PlainTwoTower.load(pathlib.Path(DEMO_MODEL)))
    for of_engine, of_towers in zip(found, expected, strict=True):
        assert float(divergence(of_towers, of_engine).max()) < 0.02
        assert float((of_engine.argmax(-1) == of_towers.argmax(-1)).float().mean()) > 0.9
