"""Checkpoints: every tensor of the real model has a place, and a checkpoint that does not match is an error that names
tensors."""

import json
import os
import shutil
from types import SimpleNamespace

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.demo_questions import SHORT
from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from tests.harness.server import vllm_server
from vllm_twotower import diffusion_params
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.models.entry import NemotronHTwoTowerForCausalLM
from vllm_twotower.models.tensor_shapes import checkpoint_shapes
from vllm_twotower.models.weights import check_weights
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.tower_sizes import Tower, TowerSizes

REAL_CONFIG = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "intermediate_size": 1856,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "chunk_size": 128,
    "mamba_ssm_cache_dtype": "float32",
}
"""Nemotron-3-Nano-30B-A3B's values, which the two-tower config repeats: ``docs/model.md#sizes``."""


def test_the_real_checkpoint_has_12544_tensors_of_the_published_shapes():
    shapes = checkpoint_shapes(SimpleNamespace(**REAL_CONFIG))
    assert len(shapes) == 12_544
    assert sum(torch.Size(s).numel() for s in shapes.values()) == pytest.approx(63.19e9, rel=1e-3)
    published = {  # docs/model.md#sizes
        "context_tower.embeddings.weight": (131072, 2688),
        "denoiser_tower.norm_f.weight": (2688,),
        "context_tower.layers.0.mixer.in_proj.weight": (10304, 2688),
        "context_tower.layers.0.mixer.conv1d.weight": (6144, 1, 4),
        "denoiser_tower.layers.0.mixer.A_log": (64,),
        "denoiser_tower.layers.0.mixer.norm.weight": (4096,),
        "context_tower.layers.5.mixer.q_proj.weight": (4096, 2688),
        "context_tower.layers.5.mixer.k_proj.weight": (256, 2688),
        "denoiser_tower.layers.5.mixer.o_proj.weight": (2688, 4096),
        "context_tower.layers.1.mixer.gate.weight": (128, 2688),
        "context_tower.layers.1.mixer.experts.127.up_proj.weight": (1856, 2688),
        "context_tower.layers.1.mixer.shared_experts.down_proj.weight": (2688, 3712),
        "context_lm_head.weight": (131072, 2688),
        "lm_head.weight": (131072, 2688),
        "t_embedder.mlp.0.weight": (2688, 256),
        "t_block.1.weight": (8064, 2688),
        "scale_shift_tables.51": (3, 2688),
    }
    assert {name: shapes[name] for name in published} == published


def real_engine_config(folder, **more):
    """Of the real model, from its config alone."""
    (folder / "config.json").write_text(json.dumps(REAL_CONFIG))
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=4096,
        additional_config={"diffusion": True},
        kv_cache_memory_bytes=1 << 30,
        **more,
    )
    return args.create_engine_config()


def test_every_tensor_of_the_real_checkpoint_reaches_a_parameter(tmp_path, single_process_group):
    """The real module tree on the meta device: nothing is allocated, every weight loader runs with the real shapes."""
    config = real_engine_config(tmp_path)
    with set_current_vllm_config(config), single_process_group(config), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = NemotronHTwoTowerForCausalLM(vllm_config=config)
            shapes = checkpoint_shapes(config.model_config.hf_config)
            loaded = model.load_weights((name, torch.empty(shape)) for name, shape in shapes.items())
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(p.device.type == "meta" for p in model.parameters())
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters - loaded == set()
    assert sum(p.numel() for p in model.parameters()) == sum(torch.Size(s).numel() for s in shapes.values())
    facts = ModelFacts.from_config(REAL_CONFIG)
    held = {Tower.CONTEXT: 0, Tower.DENOISER: 0}
    for name, parameter in model.named_parameters():
        held[Tower.DENOISER if name.startswith("denoiser.") else Tower.CONTEXT] += parameter.nbytes
    assert held == {tower: TowerSizes.of(facts, tower).resident_bytes() for tower in Tower}, "what inspect prints"


# ---- checkpoints that do not match -----------------------------------------------------------------------------------


@pytest.fixture
def copy_of(tmp_path, tiny_mlp):
    """Write a copy of a golden checkpoint with its tensors or config changed."""

    def make(change_tensors=None, change_config=None):
        tensors, config = load_file(tiny_mlp.path / "model.safetensors"), dict(tiny_mlp.config)
        if change_tensors:
            change_tensors(tensors)
        if change_config:
            change_config(config)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


NAME = "denoiser_tower.layers.3.mixer.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop(NAME), f"1 missing: {NAME}", id="one removed"),
        pytest.param(lambda t: t.update(extra=torch.zeros(2)), "1 not part of the model: extra", id="one added"),
        pytest.param(
            lambda t: t.update({NAME: torch.zeros(7, 64)}),
            rf"{NAME} has shape \[7, 64\].*\[128, 64\]",
            id="wrong shape",
        ),
    ],
)
def test_a_checkpoint_that_does_not_match_is_an_error_naming_the_tensor(copy_of, change, message):
    with pytest.raises(ValueError, match=message), start_engine(copy_of(change)):
        pass


def test_without_diffusion_the_denoiser_may_be_absent(copy_of, tiny_mlp):
    def context_only(tensors):
        for name in [n for n in tensors if not n.startswith("context_")]:
            del tensors[name]

    with start_engine(copy_of(context_only), diffusion=None) as e:
        case = tiny_mlp.ar[3]
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
        assert e.tokens([case["prompt"]], params) == [case["output"][:4]]


def test_what_is_missing_is_listed_but_not_for_pages(tiny_moe):
    with pytest.raises(ValueError, match=r"and \d+ more$"):
        list(check_weights([], SimpleNamespace(**tiny_moe.config), with_denoiser=True))


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, 1e30], None], ids=["bare Infinity", "1e30", "absent"])
def test_the_released_configs_oddities_are_read(copy_of, tiny_mlp, limit):
    def change(config):
        config["auto_map"] = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
        config.pop("time_step_limit")
        if limit is not None:
            config["time_step_limit"] = limit

    path = copy_of(change_config=change)
    case = tiny_mlp.cases(16)[0]
    with start_engine(path, {"passes_per_step": 16}) as e:
        assert e.tokens([case["prompt"]], golden_params(case)) == [case["output"]]


NUM_SHARDS = 24


@pytest.fixture
def hub_folder(tmp_path):
    """The demo model, laid out as the hub has NVIDIA's: 24 shards, code that nobody runs, two places that name EOS."""
    shutil.copytree(DEMO_MODEL, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, index = sorted(tensors), {"metadata": {}, "weight_map": {}}
    for part in range(NUM_SHARDS):
        file, part_names = f"model-{part + 1:05}-of-{NUM_SHARDS:05}.safetensors", names[part::NUM_SHARDS]
        save_file({n: tensors[n] for n in part_names}, tmp_path / file)
        index["weight_map"].update(dict.fromkeys(part_names, file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "time_step_limit": [0.0, float("inf")],
        "auto_map": {
            "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
            "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("configuration_nemotron_h.py", "modeling_nemotron_h.py"):
        (tmp_path / file).write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle, and nobody looks")
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 11]}))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer["eos_token"] = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).id_to_token(12)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_a_folder_laid_out_like_the_hubs(hub_folder):
    with start_engine(hub_folder, {"passes_per_step": 16}, skip_tokenizer_init=False) as e:
        tokenizer = e.llm.get_tokenizer()
        assert tokenizer.eos_token_id == 12
        prompt = tokenizer.encode(SHORT)
        bias = {"max_tokens": 40, "temperature": 0.0}
        params = [diffusion_params(logit_bias={end: 100.0}, **bias) for end in (2, 11, 12, 13)]
        outputs = [o.outputs[0] for o in e.generate([prompt] * 4, params)]
    assert [o.finish_reason for o in outputs] == ["stop", "stop", "stop", "length"]
    assert [list(o.token_ids) for o in outputs] == [[2], [11], [12], [13] * 40], "generation config, both, tokenizer"
    assert not (hub_folder / "was_run").exists(), "code from a checkpoint is never run"


RELEASED = "nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16"


@pytest.mark.parametrize(
    "diffusion",
    [pytest.param([], id="AR", marks=pytest.mark.slow), pytest.param(["--diffusion"], id="all modes")],
)
def test_the_command_on_the_models_page(hub_folder, tmp_path_factory, monkeypatch, diffusion):
    """The model by its name on the hub, from a cache as ``huggingface_hub`` lays it out, and little else."""
    cache = tmp_path_factory.mktemp("hub")
    repository, commit = cache / f"models--{RELEASED.replace('/', '--')}", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(hub_folder.iterdir())):  # each file a link to a blob, as there
        blob = shutil.copy(file, repository / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    with vllm_server(RELEASED, *diffusion, *small, log=hub_folder / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        modes = ["mask_diffusion", "self_speculation", "ar"] if diffusion else [None]
        for mode in modes:
            xargs = {"vllm_xargs": {"diffusion_mode": mode}} if mode else {}
            answer = client.completions.create(
                model=RELEASED, prompt=SHORT, max_tokens=24, temperature=0.0, extra_body=xargs
            )
            assert answer.choices[0].text.strip()
    assert not (hub_folder / "was_run").exists(), "code from a checkpoint is never run"
