"""Real engines for tests: started in this process, stepped under a bound, with a record of which tower every step
ran."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from smoke_parts.engine import engine as vllm_engine
from smoke_parts.engine import runner_of
from smoke_parts.goldens import golden_params
from vllm import LLM, SamplingParams

from vllm_twotower import diffusion_stats

__all__ = ["MAX_MODEL_LEN", "Engine", "engine", "golden_params"]

MAX_MODEL_LEN = 512


class Engine:
    """A vLLM engine and what its steps did."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.runner = runner_of(llm)
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
        self, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams], max_steps: int = 400
    ) -> list[Any]:
        """Outputs in the prompts' order; fails if the engine takes more than ``max_steps`` steps."""
        if isinstance(params, SamplingParams):
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
def engine(model: Any, diffusion: Any = True, **settings: Any) -> Iterator[Engine]:
    """Start an engine, and take it down so that the next one can start."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": 128 << 20,
    }
    if diffusion:
        defaults["additional_config"] = {"diffusion": diffusion}
    with vllm_engine(model, **{**defaults, **settings}) as llm:
        yield Engine(llm)
