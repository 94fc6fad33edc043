"""With the plugin installed, other models load and give the same tokens as without it (TRITON_INTERPRET unset, as users
have it), also where the plugin does not fit the vLLM it meets."""

import json
import os
import re
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
OURS_TOO = """
llm.llm_engine.engine_core.shutdown()
try:
    LLM(model=sys.argv[2], skip_tokenizer_init=True, additional_config={"diffusion": True}, max_model_len=256,
        kv_cache_memory_bytes=64 << 20)
except Exception as problem:
    print("REFUSAL " + json.dumps(str(problem)))
"""
# Python runs a module of this name first. It deletes a name from a module of vLLM as soon as that has been imported.
WITHOUT_A_NAME = """
import importlib.util, operator, os, sys

MODULE, NAME = os.environ["WITHOUT_NAME"].split(":")

class Deleting:
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_delete(module):
            execute(module)
            owner, _, last = NAME.rpartition(".")
            delattr(operator.attrgetter(owner)(module) if owner else module, last)

        spec.loader.exec_module = execute_and_delete
        return spec

sys.meta_path.insert(0, Deleting())
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


def run(script, *paths, **environment):
    """What a script printed, by the word that each line begins with."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VLLM_PLUGINS")}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line.split(" ", 1) for line in result.stdout.splitlines() if line.startswith(("RESULT ", "REFUSAL "))]
    assert lines, result.stderr[-3000:]
    return {word: json.loads(text) for word, text in lines}


def generate(path, **environment):
    return run(SCRIPT, path, **environment)["RESULT"]


@pytest.mark.parametrize("write", [pytest.param(write_llama, marks=pytest.mark.slow), write_nemotron_h])
def test_another_model_is_untouched(write, tmp_path):
    write(tmp_path)
    with_plugin = generate(tmp_path)
    without = generate(tmp_path, VLLM_PLUGINS="none_of_them")
    assert with_plugin == without
    assert all(len(tokens) == 12 for tokens in with_plugin)


MODELS = "vllm.model_executor.models"
NAMES = [
    pytest.param(f"{MODELS}.nemotron_h:NemotronHMLP", id="the model's"),
    pytest.param("vllm.engine.arg_utils:EngineArgs.from_cli_args", id="registration's", marks=pytest.mark.slow),
    pytest.param(f"{MODELS}.config:NemotronHForCausalLMConfig", id="the configuration hook's", marks=pytest.mark.slow),
    pytest.param(
        "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState",
        id="the model state's",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_vllm_without_a_name_that_we_need_refuses_our_model_only(name, tiny_mlp, tmp_path):
    model, site = tmp_path / "model", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT_A_NAME)
    write_llama(model)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "WITHOUT_NAME": name, "TRITON_INTERPRET": "1"}
    printed = run(SCRIPT + OURS_TOO, model, tiny_mlp.path, **environment)
    assert [len(tokens) for tokens in printed["RESULT"]] == [12, 12, 12]
    assert re.split(r"[.:]", name)[-1] in printed["REFUSAL"]
