"""``--data-parallel-size 2``: two engines behind one address, each with both towers; NVIDIA's tokens from either."""

import concurrent.futures
import re
import shutil

import httpx
import pytest

from tests.harness.server import read_metrics, vllm_server
from vllm_twotower.commands.cli import DEMO_MODEL

OPTIONS = ["--diffusion", '{"passes_per_step": 4}', "--data-parallel-size", "2", "--served-model-name", "tiny"]
OPTIONS += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager"]
SOME = [24, 27, 30, 33, 36, 40]


def complete(url, case, **xargs):
    body = {"model": "tiny", "prompt": case["prompt"], "max_tokens": len(case["output"]), "temperature": 0.0}
    body |= {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=180)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def answered_by_engine(url):
    pattern = r'^vllm:request_success_total\{engine="(\d)",[^}]*\} (\S+)$'
    found = re.findall(pattern, read_metrics(url), re.MULTILINE)
    return [sum(float(value) for engine, value in found if engine == which) for which in "01"]


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpu_workers")
@pytest.mark.parametrize("name", ["tiny_moe", "tiny_mlp"])
def test_two_engines_write_the_references_tokens(name, request, tmp_path):
    golden = request.getfixturevalue(name)
    tokenizer = DEMO_MODEL.glob("tokenizer*")  # a server wants one
    for file in [golden.path / "config.json", golden.path / "model.safetensors", *tokenizer]:
        shutil.copy(file, tmp_path)
    jobs = []
    for case in (golden.mask_diffusion[i] for i in SOME):
        assert case["params"]["block_size"] == 16
        assert case["params"]["temperature"] == 0.0
        settings = {"diffusion_confidence_threshold": case["params"]["confidence_threshold"]}
        jobs.append((case, settings | {"diffusion_max_steps": case["params"]["steps_per_block"]}))
    jobs += [(golden.ar[0], {"diffusion_mode": mode}) for mode in ("ar", "self_speculation")]
    jobs += [(golden.mock_ar[0], {"diffusion_mode": "mock_ar"})]
    with vllm_server(tmp_path, *OPTIONS, log=tmp_path / "log") as url, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: complete(url, job[0], **job[1]), jobs))
        shares = answered_by_engine(url)
    assert answers == [case["output"] for case, _ in jobs]
    assert sum(shares) == len(jobs)
    assert min(shares) > 0
