"""``tools.gpu_smoke`` in its CPU form: the same code on a tiny model; and what it makes of a part that fails."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.paths import REAL_MODEL
from tools.smoke_parts.golden_runs import compare
from tools.tune_experts import SCRIPT, list_tables, write_backbone
from tools.vllm_source import read_source

ROOT = pathlib.Path(__file__).resolve().parents[1]


def smoke(out, *options):
    command = [sys.executable, "-m", "tools.gpu_smoke", "--dry-run", "--out", str(out), *options]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return result.returncode, json.loads(out.read_text())


@pytest.mark.slow
def test_a_dry_run_finds_equal_goldens_and_times_every_kind_of_step(tmp_path):
    code, report = smoke(tmp_path / "smoke.json")
    parts = report["parts"]
    assert code == 0, report
    assert report["label"].startswith("CPU DRY RUN")
    goldens = parts["goldens_fp32"]["tiny-mlp"]
    assert goldens["equal_cases"] == goldens["cases"] == 2
    assert goldens["denoise_passes"] == goldens["denoise_passes_of_reference"]
    steps = {(row["step"], row["batch"]): row for row in parts["timing_eager"]["steps"]}
    assert set(steps) == {(kind, batch) for kind in ("ar", "denoise", "commit") for batch in (1, 2)}
    assert all(row["p50_ms"] >= row["fastest_ms"] > 0 and row["floor_ms"] is None for row in steps.values())
    assert steps["denoise", 2]["floor_gb"] > steps["denoise", 1]["floor_gb"] > 0
    assert goldens["denoise_graphs"] == 0
    assert {parts[name]["status"] for name in ("goldens_graphs", "goldens_bf16", "timing_graphs")} == {"skipped"}


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(tmp_path):
    code, report = smoke(tmp_path / "smoke.json", "--parts", "timing_eager", "timing_graphs", "--config", str(tmp_path))
    assert code == 1
    assert not report["all_well"]
    assert report["parts"]["timing_eager"]["status"] == "failed"
    assert "config.json" in report["parts"]["timing_eager"]["error"]
    assert report["parts"]["timing_graphs"]["status"] == "skipped"


def test_tables_that_a_gpu_has_are_told_from_those_to_measure(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    config = json.loads((REAL_MODEL / "config.json").read_text())
    monkeypatch.setattr(type(current_platform), "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    bf16, fp8 = list_tables(config, tensor_parallel_size=2).values()
    assert bf16 == ("E=128,N=928,device_name=NVIDIA_H100_80GB_HBM3.json", True)
    assert fp8 == ("E=128,N=928,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8.json", False)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    (tmp_path / fp8[0]).touch()
    assert list_tables(config, tensor_parallel_size=2)["fp8_w8a8"] == (fp8[0], True)


def test_a_table_that_is_missing_is_named_with_the_command_that_measures_it(tmp_path):
    _, report = smoke(tmp_path / "smoke.json", "--parts", "expert_tables")
    found = report["parts"]["expert_tables"]
    assert (found["status"], found["there"], len(found["missing"])) == ("ok", [], 4)
    assert (
        "device_name=cpu.json, which would be measured by: python -m tools.tune_experts --tune" in found["missing"][0]
    )


@pytest.mark.slow
def test_vllms_tuning_script_knows_what_it_is_given(tmp_path):
    """The script wants Ray and a GPU; the function in it that reads a config wants neither."""
    from vllm.transformers_utils.config import get_config

    source = read_source([SCRIPT])[SCRIPT].decode()
    (function,) = (n for n in ast.parse(source).body if getattr(n, "name", None) == "get_model_params")
    names = {}
    exec(ast.unparse(function), names)
    write_backbone(json.loads((REAL_MODEL / "config.json").read_text()), tmp_path)
    assert names["get_model_params"](get_config(str(tmp_path), False)) == (128, 6, 1856, 2688)
    for option in ("--tune", "--model", "--save-dir", "--tp-size", "--dtype", "--batch-size", "fp8_w8a8"):
        assert f'"{option}"' in source


def test_agreement_is_counted_by_token_and_up_to_the_first_that_differs():
    found = compare([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]])
    assert found["equal_cases"] == 1
    assert found["cases_that_differ"] == [1]
    assert (found["equal_tokens"], found["tokens"]) == (5, 6)
    assert found["mean_equal_prefix"] == 2.0
