"""Checkpoints that are cut, incomplete, contradictory or poisoned: a quick error that names what is wrong, nothing of
them is ever executed, and NaN ends a request and not the engine."""

import json
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params, greedy_params
from vllm_twotower.frontend.checkpoint_checks import check_checkpoint

TENSOR = "denoiser_tower.layers.3.mixer.q_proj.weight"
QUICK_SECONDS = 10
"""On a loaded machine; it takes milliseconds."""


@pytest.fixture
def folder(tmp_path, tiny_moe):
    """A copy of a golden checkpoint, to be broken."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_moe.path / name, tmp_path)
    return tmp_path


def refused(folder, message, **settings):
    """Starting an engine on the folder fails at once; ``create_engine_config`` is the first thing ``LLM`` does."""
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        additional_config={"diffusion": True},
        max_model_len=512,
        **settings,
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        args.create_engine_config()
    assert time.monotonic() - start < QUICK_SECONDS


def test_the_unbroken_copy_is_accepted_and_other_models_are_not_looked_at(folder, tmp_path):
    check_checkpoint(EngineArgs(model=str(folder)))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    check_checkpoint(EngineArgs(model=str(folder)))
    (folder / "config.json").write_text("{")
    check_checkpoint(EngineArgs(model=str(folder)))
    check_checkpoint(EngineArgs(model="somebody/on-the-hub"))


# ---- files -----------------------------------------------------------------------------------------------------------


def _tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _bytes(change):
    def apply(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def _in_two_shards(folder, keep=(1, 2)):
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for part in (1, 2):
        file, names = f"model-{part:05}-of-00002.safetensors", sorted(tensors)[part - 1 :: 2]
        weight_map |= dict.fromkeys(names, file)
        if part in keep:
            save_file({n: tensors[n] for n in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BROKEN_FILES = {
    "empty": (
        _bytes(lambda b: b""),
        r"model.safetensors is not a whole safetensors file \(0 bytes; .*download",
    ),
    "cut in the header": (_bytes(lambda b: b[:100]), "model.safetensors is not a whole safetensors file"),
    "cut in a tensor": (_bytes(lambda b: b[:-1000]), "model.safetensors is not a whole safetensors file"),
    "longer than it says": (_bytes(lambda b: b + b"x"), "model.safetensors is not a whole safetensors file"),
    "endless header": (_bytes(lambda b: b"\xff" * 8 + b[8:]), "not a whole safetensors file"),
    "no header": (_bytes(lambda b: b[:8] + b"?" * 64 + b[72:]), "not a whole safetensors file"),
    "a git-lfs pointer": (_bytes(lambda b: b"version https://git-lfs"), "git-lfs pointer.*git lfs pull"),
    "a shard is missing": (lambda f: _in_two_shards(f, keep=(1,)), "lacks 1 .*: model-00002-of-00002.safetensors"),
    "all shards are missing": (lambda f: _in_two_shards(f, keep=()), "lacks 2 of the files"),
    "an index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "index.json has no weight_map",
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({TENSOR: torch.zeros(7, 64)})),
        rf"{TENSOR} has shape \[7, 64\].*asks for \[128, 64\]",
    ),
    "integers": (_tensors(lambda t: t.update({TENSOR: t[TENSOR].to(torch.int8)})), f"{TENSOR} holds I8"),
    "booleans": (_tensors(lambda t: t.update({TENSOR: t[TENSOR] > 0})), f"{TENSOR} holds BOOL.*floating point"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named(folder, name):
    change, message = BROKEN_FILES[name]
    change(folder)
    refused(folder, message)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=f"Cannot find any model weights with `{folder}`"), start_engine(folder):
        pass


def test_weights_of_another_float_type_are_converted(folder, tiny_moe):
    _tensors(lambda t: t.update({TENSOR: t[TENSOR].double()}))(folder)
    _in_two_shards(folder)
    case = tiny_moe.cases(16)[0]
    with start_engine(folder, {"passes_per_step": 16}) as e:
        assert e.tokens([case["prompt"]], golden_params(case)) == [case["output"]]


# ---- config.json -----------------------------------------------------------------------------------------------------

NEEDED = ["hybrid_override_pattern", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"]
NEEDED += ["head_dim", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named(folder, field):
    change_config(folder, **{field: None})
    refused(folder, f"config.json has no {field}")


CONTRADICTIONS = [
    ({"hybrid_override_pattern": "MEM*EMEQME"}, "hybrid_override_pattern='MEM.EMEQME'.*use M, E, . and - only"),
    ({"hybrid_override_pattern": ""}, "hybrid_override_pattern=''"),
    ({"hybrid_override_pattern": 5}, "hybrid_override_pattern=5"),
    ({"hybrid_override_pattern": "MEM*EME*M"}, "num_hidden_layers=10.*has 9"),
    ({"num_hidden_layers": 9}, "num_hidden_layers=9.*has 10"),
    ({"num_attention_heads": 5}, "num_attention_heads=5.*multiple of num_key_value_heads=2"),
    ({"mamba_num_heads": 5}, "mamba_num_heads=5.*multiple of n_groups=2"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0.*integer from 1"),
    ({"hidden_size": -64}, "hidden_size=-64"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"hidden_size": 2**40}, r"has shape .*, but config.json asks for \[.*1099511627776"),
    ({"head_dim": 16}, r"k_proj.weight has shape \[64, 64\].*\[32, 64\]"),
    ({"vocab_size": 511}, r"weight has shape \[512, 64\].*\[511, 64\]"),
    ({"mask_token_id": 512}, "mask_token_id=512.*below vocab_size=512"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9.*n_routed_experts=8"),
    ({"moe_intermediate_size": None}, r"experts.0.*has shape \[64, 32\].*\[64, 0\]"),
    ({"torch_dtype": "float7"}, "dtype='float7'.*use one of bfloat16"),
    ({"mamba_ssm_cache_dtype": "int8"}, "mamba_ssm_cache_dtype='int8'"),
    ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'.*'relu2'"),
    ({"attention_bias": True}, "attention_bias=True.*False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"n_group": 2}, "n_group=2.*has 1"),
    ({"topk_group": 2}, "topk_group=2.*has 1"),
    ({"norm_topk_prob": False}, "norm_topk_prob=False.*has True"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan.*between 0 and 1"),
    ({"max_position_embeddings": 100}, "max_position_embeddings=100"),
    ({"architectures": ["Nope"]}, "Nope"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=[str(c) for c, _ in CONTRADICTIONS])
def test_a_contradictory_or_absurd_config_is_named(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "\x00\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    args = EngineArgs(model=str(folder), skip_tokenizer_init=True)
    with pytest.raises((ValueError, OSError, AttributeError), match=r"config\.json|'list' object"):
        args.create_engine_config()


# ---- what must never run ---------------------------------------------------------------------------------------------


class Mark:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_of_a_checkpoint_is_executed_or_unpickled(folder, tiny_moe):
    marks = {name: folder / f"{name}-ran" for name in ("pickle", "python")}
    pickle.loads(pickle.dumps(Mark(str(marks["pickle"])))).close()
    assert marks["pickle"].exists(), "the trap works"
    marks["pickle"].unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Mark(str(marks["pickle"]))))
    for name in ("configuration_nemotron_h.py", "modeling_nemotron_h.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(marks['python'])!r}, 'w')\n")
    auto_map = {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    }
    change_config(folder, auto_map=auto_map)
    case = tiny_moe.cases(16)[0]
    with start_engine(folder, {"passes_per_step": 16}) as e:
        assert e.tokens([case["prompt"]], golden_params(case)) == [case["output"]]
    (folder / "model.safetensors").unlink()  # now the pickles are all there is
    with pytest.raises(RuntimeError, match="Cannot find any model weights"), start_engine(folder):
        pass
    assert not any(mark.exists() for mark in marks.values())


# ---- NaN -------------------------------------------------------------------------------------------------------------


def poison_of(cases):
    """A token that one case generates in its second canvas or later and no other case ever has; and that case."""
    for index, case in enumerate(cases):
        others = {t for i, c in enumerate(cases) if i != index for t in c["prompt"] + c["output"]}
        for position, token in enumerate(case["output"]):
            if 16 <= position < 48 and token not in others and token not in case["prompt"] + case["output"][:16]:
                return index, position // 16, token
    raise AssertionError("no golden case has a token of its own")


@pytest.mark.parametrize("prefix_caching", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nan_ends_a_request_with_an_error_and_nobody_else(folder, tiny_moe, prefix_caching):
    """The context tower's embedding of one token is NaN: whoever has it in its prompt or generates it is lost."""
    cases = tiny_moe.cases(16)[:10]
    lost, canvas, poison = poison_of(cases)
    healthy = [c for c in cases if c is not cases[lost]]
    tensors = load_file(folder / "model.safetensors")
    tensors["context_tower.embeddings.weight"][poison] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    bad_prompt = [*healthy[0]["prompt"][:9], poison, 7, 8]
    small = {"max_num_seqs": 16, "max_model_len": 256, "kv_cache_memory_bytes": 4 << 20}  # blocks are used again
    with start_engine(folder, {"passes_per_step": 4}, enable_prefix_caching=prefix_caching, **small) as e:
        for _ in range(2):
            prompts = [bad_prompt, cases[lost]["prompt"], bad_prompt, bad_prompt, *(c["prompt"] for c in healthy)]
            params = [
                golden_params(cases[0]),
                golden_params(cases[lost]),
                greedy_params("ar", 6),
                greedy_params("mock_ar", 6),
            ]
            outputs = [o.outputs[0] for o in e.generate(prompts, params + [golden_params(c) for c in healthy])]
            assert [o.finish_reason for o in outputs[:4]] == ["error"] * 4
            assert [list(outputs[i].token_ids) for i in (0, 2, 3)] == [[], [], []]
            # whole canvases up to the one that holds it; it is the commit that fails
            assert list(outputs[1].token_ids) == cases[lost]["output"][: 16 * (canvas + 1)]
            assert [list(o.token_ids) for o in outputs[4:]] == [c["output"] for c in healthy]
            assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)
            assert not e.scheduler._progress


def test_a_denoiser_of_nan_reveals_nothing_and_the_context_tower_goes_on(folder, tiny_moe):
    tensors = load_file(folder / "model.safetensors")
    tensors["denoiser_tower.norm_f.weight"][5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    case, ar = tiny_moe.cases(16)[4], tiny_moe.ar[4]
    with start_engine(folder) as e:
        prompts = [case["prompt"], ar["prompt"], case["prompt"]]
        outputs = e.generate(prompts, [golden_params(case), greedy_params("ar", 6), greedy_params("mock_ar", 6)])
        assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length", "error"]
        assert [list(o.outputs[0].token_ids) for o in outputs] == [[], ar["output"][:6], []]
        assert e.stats()["canvases"] == 0
