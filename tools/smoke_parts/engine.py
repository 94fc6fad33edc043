"""A vLLM engine in this process, for one part of the smoke run or one of the benchmarks."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def engine(model: Any, **settings: Any) -> Iterator[Any]:
    """Start an engine, without a tokenizer unless asked for one, and take it down."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(model), **{"skip_tokenizer_init": True, "disable_log_stats": True, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def backends_of(llm: Any) -> list[str]:
    """Attention backends that the engine chose."""
    groups = [group for groups in runner_of(llm).attn_groups for group in groups]
    return sorted({group.backend.get_name() for group in groups})


def num_denoise_graphs(llm: Any) -> int:
    """CUDA graphs of denoise passes that the engine has captured."""
    graphs = runner_of(llm).model_state.graphs
    return graphs.num_captured if graphs is not None else 0
