"""With the plugin installed, other models load and give the same tokens as without it (TRITON_INTERPRET unset, as users
have it)."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
          max_num_seqs=4, kv_cache_memory_bytes=64 << 20)
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40)], params, use_tqdm=False)
print("RESULT " + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def write_llama(path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_nemotron_h(path):
    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        ssm_state_size=32,
    )
    NemotronHForCausalLM(config).save_pretrained(path)


def generate(path, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VLLM_PLUGINS")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.parametrize("write", [pytest.param(write_llama, marks=pytest.mark.slow), write_nemotron_h])
def test_another_model_is_untouched(write, tmp_path):
    write(tmp_path)
    with_plugin = generate(tmp_path)
    without = generate(tmp_path, VLLM_PLUGINS="none_of_them")
    assert with_plugin == without
    assert all(len(tokens) == 12 for tokens in with_plugin)
