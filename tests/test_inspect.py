"""``vllm-twotower inspect`` on folders: what it reports, and what it says of folders that are not what they seem."""

import json
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from tests.test_loading import REAL_CONFIG
from vllm_twotower.commands.cli import DEMO_MODEL, main
from vllm_twotower.planning.inspection import inspect


@pytest.fixture
def real_config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(REAL_CONFIG))
    return file


@pytest.fixture
def golden_copy(tmp_path, tiny_mlp):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_mlp.path / name, tmp_path)
    return tmp_path


def test_the_real_config_as_a_page(real_config, capsys):
    assert main(["inspect", str(real_config)]) == 0
    page = capsys.readouterr().out
    for expected in (
        "52: 23 Mamba-2, 6 attention, 23 mixture of experts",
        "6 of 128 per token",
        "mask id 3 (the model card's default)",
        "31.578 B",
        "126.4 GB (117.7 GiB)",
        "6,144 bytes per token",
        "48.2 SSM",
        "1 x H100 (80 GB)",
        "auto is colocated",
        "4,667,392 B to the denoiser",
        "tokens/s of all requests, at the memory floor / with the overhead others measured",
        "2.2 ms more for each forward",
        "`python -m benchmarks.roofline`",
    ):
        assert expected in page
    assert max(map(len, page.splitlines())) <= 140


def test_the_real_config_as_json(real_config, capsys):
    assert main(["inspect", "--json", str(real_config)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint"]["tensors_by_config"] == 12_544
    assert report["checkpoint"]["source"] == "config.json"
    requests = {(r["gpu"], r["num_gpus"], r["placement"], r["precision"]): r["requests"] for r in report["fits"]}
    assert requests["H100", 1, "colocated", "bf16"] == 0
    assert requests["H100", 1, "colocated", "fp8"] > 64
    assert 0 < requests["H100", 2, "split", "bf16"] < requests["H100", 2, "colocated", "bf16"]
    speeds = {(s["gpu"], s["num_gpus"], s["precision"], s["requests"]): s for s in report["speeds"]}
    assert ("H100", 1, "bf16", 1) not in speeds, "both towers do not fit"
    assert ("H100", 1, "fp8", 64) in speeds
    one = speeds["B200", 2, "fp8", 1]
    assert one["overhead"]["ar"] == pytest.approx(1 / 2.91e-3, rel=0.05), "published: 2.91 ms per token"
    for speed in speeds.values():
        assert all(speed["overhead"][kind] < speed["floor"][kind] for kind in ("ar", "diffusion"))


def test_canvases_of_one_token_have_a_speed(real_config):
    report = inspect(str(real_config), canvas_length=1)
    assert report["assumptions"]["passes_per_canvas"] == 1
    assert all(speed["floor"]["diffusion"] < speed["floor"]["ar"] for speed in report["speeds"]), "a pass and a commit"


def test_where_no_gpu_holds_both_towers_no_speed_is_shown(real_config, capsys):
    assert main(["inspect", str(real_config), "--gpu-memory-utilization", "0.05"]) == 0
    assert "none: no such GPUs hold both towers" in capsys.readouterr().out


def test_shards_are_counted_by_their_headers(golden_copy, tiny_mlp):
    checkpoint = inspect(str(golden_copy))["checkpoint"]
    assert checkpoint["agrees"]
    assert checkpoint["parameters_by_headers"] == checkpoint["parameters_by_config"]
    tensors = load_file(tiny_mlp.path / "model.safetensors")
    assert sum(checkpoint["bytes_by_headers"].values()) == sum(t.nbytes for t in tensors.values())


def test_a_checkpoint_as_the_hub_lays_it_out(tmp_path, tiny_mlp):
    """Shards with an index, ``auto_map`` present and not followed, a bare Infinity in the config."""
    tensors = load_file(tiny_mlp.path / "model.safetensors")
    names, num_shards = sorted(tensors), 24
    weight_map = {}
    for part in range(num_shards):
        file = f"model-{part + 1:05}-of-{num_shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[part::num_shards]}, tmp_path / file)
        weight_map.update(dict.fromkeys(names[part::num_shards], file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**tiny_mlp.config, "auto_map": {"AutoConfig": "x.Y"}, "time_step_limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert inspect(str(tmp_path))["checkpoint"]["agrees"]
    (tmp_path / "model-00007-of-00024.safetensors").unlink()
    differences = inspect(str(tmp_path))["checkpoint"]["differences"]
    assert differences[0] == "shard model-00007-of-00024.safetensors is missing"
    assert "tensors missing" in differences[1]


def test_shards_that_disagree_with_the_config_are_named(golden_copy, tiny_mlp, capsys):
    tensors = load_file(tiny_mlp.path / "model.safetensors")
    tensors["extra"] = tensors.pop("lm_head.weight")
    save_file(tensors, golden_copy / "model.safetensors")
    assert main(["inspect", str(golden_copy)]) == 1
    page = capsys.readouterr().out
    assert "DO NOT AGREE" in page
    assert "1 tensors missing: lm_head.weight" in page
    assert "1 tensors not part of the model: extra" in page


def _write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json: name the folder"),
    "config cut short": (lambda f: (f / "config.json").write_text('{"a": '), r"is not JSON .*download it again"),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), r"holds a list, not an object"),
    "another model": (lambda f: _write_config(f, architectures=["LlamaForCausalLM"]), r"LlamaForCausalLM.*should be"),
    "field missing": (lambda f: _write_config(f, head_dim=None), r"has no head_dim"),
    "field of nonsense": (lambda f: _write_config(f, hidden_size=-1), r"hidden_size=-1 is not allowed: use an integer"),
    "unknown layers": (lambda f: _write_config(f, hybrid_override_pattern="MXM"), r"'MXM' is not allowed: use M, E"),
    "unknown dtype": (lambda f: _write_config(f, torch_dtype="int3"), r"dtype='int3' is not allowed: use one of"),
    "git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        r"git-lfs pointer.*git lfs pull",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"not a whole safetensors file.*download it again",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"not a whole safetensors file"),
    "no header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope"),
        r"not a whole safetensors file",
    ),
    "header of nonsense": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b'{"a": {}}'),
        r"not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_one_readable_line(golden_copy, capsys, kind):
    spoil, message = BAD_FOLDERS[kind]
    spoil(golden_copy)
    with pytest.raises(ValueError, match=message):
        inspect(str(golden_copy))
    assert main(["inspect", str(golden_copy)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_name_on_the_hub_is_not_downloaded():
    with pytest.raises(ValueError, match=r"does not exist: .*hf download nvidia/some-model"):
        inspect("nvidia/some-model")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokens-per-request", "0", "use an integer from 1 to"),
        ("--tokens-per-request", "3000", "use an integer from 1 to 2048"),
        ("--canvas-length", "64", "use an integer from 1 to 32"),
        ("--gpu-memory-utilization", "1.5", "use a number above 0 and at most 1"),
    ],
)
def test_options_out_of_range_are_refused(option, value, message, capsys):
    assert main(["inspect", str(DEMO_MODEL), option, value]) == 2
    assert message in capsys.readouterr().err
