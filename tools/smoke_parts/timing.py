"""Engine steps timed against their byte floors: AR step, commit, denoise pass, with dummy weights.

A step is the model runner's work for it, input preparation, forward and sampling, between two device synchronisations.
Its floor is the memory traffic that ``vllm_twotower/planning/forward_cost.py`` counts over the GPU's peak
bandwidth; routed experts are taken to be chosen independently.
"""

import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.harness.engine import count_denoise_graphs, find_runner, list_backends, read_clock, start_llm

CANVAS_LENGTH = 16
STEPS_OF_AR = 24
CANVASES = 9


@dataclass
class Step:
    """One step of the model runner."""

    is_denoise: bool
    tokens_by_row: list[int]
    seconds: float


class StepClock:
    """Times every step of a model runner."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.steps = runner, []
        runner.execute_model = self._timed(runner.execute_model, self._begin)
        runner.sample_tokens = self._timed(runner.sample_tokens, self._add)

    def _timed(self, function: Callable, record: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = read_clock()
            result = function(*args, **kwargs)
            record(read_clock() - started, *args)
            return result

        return call

    def _begin(self, seconds: float, scheduled: Any, *_: Any) -> None:
        tokens = list(scheduled.num_scheduled_tokens.values())
        self.steps.append(Step(self.runner.model_state.last_step.kind == "denoise", tokens, seconds))

    def _add(self, seconds: float, *_: Any) -> None:
        self.steps[-1].seconds += seconds


def run(args: Any, eager: bool) -> dict[str, Any]:
    """All batches on one engine, as many layers of ``args.config`` as fit."""
    config = json.loads((args.config / "config.json").read_text())
    gpu = this_gpu()
    config, layers = config_that_fits(config, gpu, args)
    settings: dict[str, Any] = {"dtype": args.dtype, "enforce_eager": eager, "enable_prefix_caching": False}
    settings |= {"load_format": "dummy", "max_num_seqs": max(args.batches), "max_model_len": model_length(args)}
    if gpu is None:
        settings["kv_cache_memory_bytes"] = 64 << 20
    if args.quantization:
        settings["quantization"] = args.quantization
    # a canvas takes one pass, and all canvases of the batch are committed in one step
    diffusion = {"canvas_length": CANVAS_LENGTH, "commit_quorum": 1.0, "max_steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        with start_llm(folder, additional_config={"diffusion": diffusion}, **settings) as llm:
            clock, rows = StepClock(find_runner(llm)), []
            for batch in args.batches:
                rows += measure(llm, clock, batch, args, floor_of(config, gpu, args))
            graphs = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
            backends, denoise_graphs = list_backends(llm), count_denoise_graphs(llm)
    return {
        "layers": layers,
        "layers_of_config": len(json.loads((args.config / "config.json").read_text())["hybrid_override_pattern"]),
        "cudagraph_mode": graphs,
        "denoise_graphs": denoise_graphs,
        "attention_backends": backends,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "prompt_tokens": args.prompt_tokens,
        "floor": f"bytes over the peak bandwidth of {gpu.name}" if gpu and gpu.bandwidth_Bps else "bytes only",
        "steps": rows,
    }


def model_length(args: Any) -> int:
    return args.prompt_tokens + max(STEPS_OF_AR, CANVASES * CANVAS_LENGTH) + CANVAS_LENGTH


def measure(llm: Any, clock: StepClock, batch: int, args: Any, floor: Callable) -> list[dict[str, Any]]:
    """Median and fastest step of each kind with ``batch`` rows."""
    from vllm_twotower import diffusion_params

    rows = []
    prompts = [{"prompt_token_ids": [10 + (7 * i + j) % 50 for j in range(args.prompt_tokens)]} for i in range(batch)]
    for mode, length in (("ar", STEPS_OF_AR), ("mask_diffusion", CANVASES * CANVAS_LENGTH)):
        params = diffusion_params(mode=mode, temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        clock.steps.clear()
        llm.generate(prompts, params, use_tqdm=False)
        width = 1 if mode == "ar" else CANVAS_LENGTH
        steps = [s for s in clock.steps if s.tokens_by_row == [width] * batch]
        kinds = {"ar": [s for s in steps if not s.is_denoise]}
        if mode != "ar":
            kinds = {"denoise": [s for s in steps if s.is_denoise], "commit": kinds["ar"]}
        for kind, found in kinds.items():
            rows.append(row(kind, batch, [s.seconds for s in found[1:]], *floor(kind, batch)))
    return rows


def row(kind: str, batch: int, seconds: list[float], num_bytes: float, floor_s: float | None) -> dict[str, Any]:
    """The first step of a kind warms up and is not among ``seconds``."""
    if not seconds:
        raise RuntimeError(f"no {kind} step held {batch} rows: is the KV cache too small for so many requests?")
    median = statistics.median(seconds)
    return {
        "step": kind,
        "batch": batch,
        "steps": len(seconds),
        "p50_ms": round(1e3 * median, 3),
        "fastest_ms": round(1e3 * min(seconds), 3),
        "floor_gb": round(num_bytes / 1e9, 4),
        "floor_ms": floor_s and round(1e3 * floor_s, 3),
        "share_of_floor": floor_s and round(floor_s / median, 3),
    }


def this_gpu() -> Any:
    """The GPU by its data sheet, with its own memory; bandwidth 0 where it is none that is known; None on a CPU."""
    import torch

    from vllm_twotower.planning.gpus import GPUS, H100

    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    known = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
    # the PCIe and NVL variants of an H100 have other memories than the SXM's data sheet says
    if known is None or "PCIe" in name or "NVL" in name:
        return replace(H100, name=name, memory_bytes=memory, bandwidth_Bps=0.0)
    return replace(known, memory_bytes=memory)


def config_that_fits(config: dict[str, Any], gpu: Any, args: Any) -> tuple[dict[str, Any], int]:
    """The model cut after so many layers that both towers and the largest batch fit; all of it on a CPU."""
    from vllm_twotower.planning.placement import Placement, fit_towers

    pattern = config["hybrid_override_pattern"]
    for layers in range(len(pattern), 0, -1):
        cut = {**config, "hybrid_override_pattern": pattern[:layers], "num_hidden_layers": layers}
        if gpu is None:
            return cut, layers
        one = fit_towers(sizes_of(cut), gpu, 1, Placement.COLOCATED, precision_of(args), model_length(args))
        if one.num_requests >= max(args.batches) and {"M", "*"} <= set(pattern[:layers]):
            return cut, layers
    raise RuntimeError(f"not even a few layers fit beside {max(args.batches)} requests: use smaller --batches")


def floor_of(config: dict[str, Any], gpu: Any, args: Any) -> Callable[[str, int], tuple[float, float | None]]:
    """Bytes of a step, and the seconds they take at the GPU's peak bandwidth."""
    from vllm_twotower.planning.forward_cost import Machine, ar_step, context_step, denoise_pass
    from vllm_twotower.planning.gpus import H100
    from vllm_twotower.planning.tower_sizes import Tower

    machine, towers = Machine(gpu=gpu or H100, precision=precision_of(args)), sizes_of(config)

    def floor(kind: str, batch: int) -> tuple[float, float | None]:
        length, tokens = args.prompt_tokens, batch * CANVAS_LENGTH
        forward = {
            "ar": lambda: ar_step(batch, length),
            "commit": lambda: context_step(batch, tokens, length),
            "denoise": lambda: denoise_pass(batch, length, CANVAS_LENGTH, 1.0),
        }[kind]()
        tower = Tower.DENOISER if kind == "denoise" else Tower.CONTEXT
        num_bytes = machine.cost(towers[tower], forward).num_bytes
        return num_bytes, num_bytes / gpu.bandwidth_Bps if gpu and gpu.bandwidth_Bps else None

    return floor


def sizes_of(config: dict[str, Any]) -> Any:
    from vllm_twotower.planning.model_facts import ModelFacts
    from vllm_twotower.planning.tower_sizes import Tower, TowerSizes

    facts = ModelFacts.from_config(config)
    return {tower: TowerSizes.of(facts, tower) for tower in Tower}


def precision_of(args: Any) -> Any:
    from vllm_twotower.planning.tower_sizes import Precision

    return Precision.FP8 if args.quantization else Precision.BF16
