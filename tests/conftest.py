"""Environment of every test: Triton's interpreter, engines in this process, quiet logs; uninitialised memory is
poison."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it overrides every engine's kv_cache_memory_bytes

import contextlib

import pytest
import torch

from tests.harness.goldens import Golden


@pytest.fixture(scope="session")
def tiny_moe() -> Golden:
    return Golden("tiny-moe")


@pytest.fixture(scope="session")
def tiny_mlp() -> Golden:
    return Golden("tiny-mlp")


@pytest.fixture
def two_cpu_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core for each of two workers, if the environment does not say which; vLLM alone wants a NUMA node for each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "0|1"))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, so that an element nobody wrote shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty",):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def bf16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; Triton's interpreter cuts the low bits of fp32 off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, from_type, to_type, rounding_mode):
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return cut(values, from_type, to_type, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def single_process_group():
    """A process group of one, as a worker has it when it builds a model."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port

    @contextlib.contextmanager
    def group(config):
        method = get_distributed_init_method("127.0.0.1", get_open_port())
        init_distributed_environment(1, 0, method, 0, backend="gloo")
        initialize_model_parallel()
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()

    return group


@pytest.fixture
def without_amx(monkeypatch):
    """vLLM's eight-bit layers as on any CPU: with AMX it packs their weights, and its INT8 kernel takes no fp32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
