"""Real engines in this process: started and taken down; for tests, stepped under a bound, with a record of which tower
every step ran."""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm_twotower import diffusion_stats

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

MAX_MODEL_LEN = 512


@contextlib.contextmanager
def start_llm(model: Any, **settings: Any) -> Iterator["LLM"]:
    """Start an engine, without a tokenizer unless asked for one, and take it down so that the next one can start."""
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


def find_runner(llm: "LLM") -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def find_scheduler(llm: "LLM") -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def list_backends(llm: "LLM") -> list[str]:
    """Attention backends that the engine chose."""
    groups = [group for groups in find_runner(llm).attn_groups for group in groups]
    return sorted({group.backend.get_name() for group in groups})


def count_denoise_graphs(llm: "LLM") -> int:
    """CUDA graphs of denoise passes that the engine has captured."""
    graphs = find_runner(llm).model_state.graphs
    return len(graphs._recorded) if graphs is not None else 0


def count_tensors(_worker: Any = None) -> int:
    """Tensors alive in this process that came after the engine's start (what is older, vLLM hides from the collector).

    For ``llm.collective_rpc``, too, which hands over a worker.
    """
    import torch

    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def read_clock() -> float:
    """Seconds, after what the device was given to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Engine:
    """A vLLM engine and what its steps did."""

    def __init__(self, llm: "LLM") -> None:
        self.llm = llm
        self.scheduler = find_scheduler(llm)
        self.runner = find_runner(llm)
        self.model = self.runner.model
        self.towers_of_steps: list[list[str]] = []
        """For each engine step that ran the model, the towers it ran, in order and without repeats."""
        self.num_preemptions = 0
        self._watch()

    def _watch(self) -> None:
        def saw(tower: str) -> None:
            if self.towers_of_steps and self.towers_of_steps[-1][-1:] != [tower]:
                self.towers_of_steps[-1].append(tower)

        context_forward = self.model.model.forward
        self.model.model.forward = lambda *a, **k: (saw("context"), context_forward(*a, **k))[1]
        if getattr(self.model, "denoiser", None) is not None:
            self.model.denoiser.register_forward_pre_hook(lambda *_: saw("denoiser"))
        execute = self.runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler_output.total_num_scheduled_tokens:
                self.towers_of_steps.append([])
            return execute(scheduler_output, *args, **kwargs)

        self.runner.execute_model = execute_model
        preempt = self.scheduler._preempt_request

        def preempt_request(*args: Any, **kwargs: Any) -> Any:
            self.num_preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = preempt_request

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: "SamplingParams | Sequence[SamplingParams]",
        max_steps: int = 400,
    ) -> list[Any]:
        """Outputs in the prompts' order; fails if the engine takes more than ``max_steps`` steps."""
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        engine = self.llm.llm_engine
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, one.clone())
        done: dict[str, Any] = {}
        for _ in range(max_steps):
            if not engine.has_unfinished_requests():
                break
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
        else:
            ids = [r.request_id for r in self.scheduler.requests.values()]
            engine.abort_request(ids)
            raise AssertionError(f"not finished after {max_steps} engine steps: {ids}")
        return [done[str(index)] for index in range(len(prompts))]

    def tokens(self, prompts: Sequence[list[int]], params: Any, max_steps: int = 400) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in self.generate(prompts, params, max_steps)]

    def stats(self, reset: bool = True) -> dict[str, int]:
        return diffusion_stats(self.llm, reset=reset)

    def assert_one_tower_per_step(self) -> None:
        assert self.towers_of_steps, "no step ran"
        assert all(len(towers) == 1 for towers in self.towers_of_steps), self.towers_of_steps


@contextlib.contextmanager
def start_engine(model: Any, diffusion: Any = True, **settings: Any) -> Iterator[Engine]:
    """Start a small engine in fp32 that is watched."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 128 << 20,
    }
    if diffusion:
        defaults["additional_config"] = {"diffusion": diffusion}
    with start_llm(model, **{**defaults, **settings}) as llm:
        yield Engine(llm)
