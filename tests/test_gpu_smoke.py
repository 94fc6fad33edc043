"""``tools.gpu_smoke`` in its CPU form: the same code on a tiny model; and what it makes of a part that fails."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools.smoke_parts.golden_runs import compare

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


def test_agreement_is_counted_by_token_and_up_to_the_first_that_differs():
    found = compare([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]])
    assert found["equal_cases"] == 1
    assert found["cases_that_differ"] == [1]
    assert (found["equal_tokens"], found["tokens"]) == (5, 6)
    assert found["mean_equal_prefix"] == 2.0
