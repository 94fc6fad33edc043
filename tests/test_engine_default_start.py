"""One engine as a user starts it: compiled, profiled, default number of places, its core in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from vllm import LLM
from vllm_twotower import diffusion_params, diffusion_stats

if __name__ == "__main__":
    model, cases = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=model, skip_tokenizer_init=True, dtype="float32", additional_config={"diffusion": True})
    params = [
        diffusion_params(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False,
                         confidence_threshold=c["gamma"], max_steps=c["steps"])
        for c in cases
    ]
    outputs = llm.generate([{"prompt_token_ids": c["prompt"]} for c in cases], params, use_tqdm=False)
    config = llm.llm_engine.vllm_config
    print("RESULT " + json.dumps({
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "stats": diffusion_stats(llm),
        "mode": int(config.compilation_config.mode),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
    }))
"""


@pytest.mark.timeout(500)
def test_an_engine_with_default_settings_generates_correctly(tiny_moe, tmp_path):
    script = tmp_path / "default_start.py"
    script.write_text(SCRIPT)
    cases = [tiny_moe.cases(16)[i] for i in (0, 5, 8, 20)]
    arguments = [
        {"prompt": c["prompt"], "gamma": c["params"]["confidence_threshold"], "steps": c["params"]["steps_per_block"]}
        for c in cases
    ]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(tiny_moe.path), json.dumps(arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
        cwd=pathlib.Path(tmp_path),
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-2000:] + result.stderr[-4000:]
    answer = json.loads(lines[0].removeprefix("RESULT "))
    assert answer["tokens"] == [c["output"] for c in cases]
    assert answer["stats"]["denoise_passes"] == sum(c["nfe"] for c in cases)
    assert answer["mode"] > 0, "it was compiled"
    assert answer["max_num_seqs"] == 64
