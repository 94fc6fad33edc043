"""``vllm run-batch`` and Ray Data as ``docs/batch.md`` shows them."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tools.setup_ray import TARGET as RAY

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_documented_batch(tmp_path):
    """Every line gets its answer, in its own mode; one that is refused gets a 400 and stops nobody."""
    (command,) = re.findall(r"^vllm run-batch .*$", (ROOT / "docs" / "batch.md").read_text(), re.MULTILINE)
    answers = tmp_path / "answers.jsonl"
    words = shlex.split(command.replace("answers.jsonl", str(answers)))
    words[0] = str(pathlib.Path(sys.executable).with_name("vllm"))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(words, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    by_id = {answer["custom_id"]: answer for answer in map(json.loads, answers.read_text().splitlines())}
    text = {
        name: answer["response"]["body"]["choices"][0]["message"]["content"]
        for name, answer in by_id.items()
        if answer["response"]["status_code"] == 200
    }
    assert text.keys() == {"sorted", "sorted by ar", "moved"}
    assert text["sorted"] == text["sorted by ar"] == " b45 f12 k31"
    assert text["moved"].startswith(" Monday -2 Saturday")
    assert by_id["refused"]["response"]["status_code"] == 400
    assert "diffusion_max_steps=0 is not allowed" in json.dumps(by_id["refused"]["error"])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Ray starts its processes one after the other
@pytest.mark.skipif(not (RAY / "done").exists(), reason="`make ray` installs Ray for this test")
def test_a_replica_of_ray_data_answers():
    """One node, one replica: a cluster of one machine is a cluster to Ray."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [RAY / "bin" / "python", "examples/ray_data.py"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Sort: k31 b45 f12 ->  b45 f12 k31\n" in run.stdout
    assert "Move by days: -2 +3 +3 +5 -6 -1 -8 ->  Monday -2 Saturday" in run.stdout
