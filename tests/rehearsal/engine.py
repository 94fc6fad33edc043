"""An engine core and one rank's model runner on the made-up device, for the real model's configuration."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.rehearsal.device import Device
from tests.rehearsal.gpu import take_memory

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "models" / "30b-a3b" / "config.json"
"""The real model's."""


def describe_nvfp4_experts() -> dict[str, Any]:
    """What llm-compressor writes of a checkpoint whose experts are NVFP4."""
    from compressed_tensors.quantization import QuantizationConfig

    experts = [r"re:.*\.experts\.\d+\.(up|down)_proj$"]
    config = QuantizationConfig(
        config_groups={"NVFP4": experts}, format="nvfp4-pack-quantized", ignore=["lm_head", "context_lm_head"]
    )
    return config.model_dump(mode="json")


STORED = {"nvfp4-experts": describe_nvfp4_experts}
"""``quantization_config`` of checkpoints that are stored quantised, by what the rehearsal is told."""


@dataclass(frozen=True)
class Setup:
    """One engine to rehearse."""

    gpu: str
    tensor_parallel_size: int = 1
    rank: int = 0
    placement: str = "colocated"
    quantization: str | None = None
    attention_backend: str | None = None
    kv_cache_dtype: str = "auto"
    stored: str | None = None

    @property
    def title(self) -> str:
        """In words."""
        parts = [self.gpu, f"tp{self.tensor_parallel_size}" if self.placement == "colocated" else "split"]
        if self.placement == "split":
            parts.append("context" if self.rank < self.tensor_parallel_size // 2 else "denoiser")
        parts.append(self.quantization or self.stored or "bf16")
        if self.attention_backend:
            parts.append(f"attention {self.attention_backend}")
        if self.kv_cache_dtype != "auto":
            parts.append(f"cache {self.kv_cache_dtype}")
        return " ".join(parts)


def make_config(setup: Setup) -> Any:
    """vLLM's configuration of an engine for the model, as ``vllm serve --diffusion`` makes it."""
    import vllm.plugins
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    folder = pathlib.Path(tempfile.mkdtemp())
    content = json.loads(CONFIG.read_text(encoding="utf-8"))
    if setup.stored is not None:
        content["quantization_config"] = STORED[setup.stored]()
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    vllm.plugins.load_general_plugins()
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        additional_config={"diffusion": {"tower_placement": setup.placement, "draft_policy": "always"}},
        tensor_parallel_size=setup.tensor_parallel_size,
        quantization=setup.quantization,
        attention_backend=setup.attention_backend,
        kv_cache_dtype=setup.kv_cache_dtype,
    )
    return args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def make_executor(setup: Setup) -> type:
    """vLLM's executor of one worker in this process, which is one rank among several.

    Torch's fake process group takes the other ranks' part: what is sent arrives nowhere, and what is received is
    whatever was there.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.platforms import current_platform
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    make_group = dist.new_group
    dist.new_group = lambda ranks=None, *_, **__: make_group(ranks, backend="fake")  # type: ignore[assignment]
    type(current_platform).dist_backend = "fake"
    # objects from other ranks never come: nobody waits for them, and there is no queue to the other workers
    dist.broadcast_object_list = lambda *_, **__: None  # type: ignore[assignment]
    MessageQueue.create_from_process_group = staticmethod(lambda *_, **__: None)  # type: ignore[assignment]

    class OneRank(UniProcExecutor):
        """Its worker is told that there are others."""

        supports_pp = True

        def _distributed_args(self) -> tuple[str, int, int]:
            dist.init_process_group("fake", rank=setup.rank, world_size=setup.tensor_parallel_size, store=FakeStore())
            return "env://", setup.rank, 0  # each rank sees one GPU, the first

        def _init_executor(self) -> None:
            super()._init_executor()
            runner = find_runner(self)
            for module in runner.model.modules():
                if hasattr(module, "do_not_compile"):  # inductor would need the GPU's compiler
                    type(module).__call__ = torch.nn.Module.__call__
            runner.profile_cudagraph_memory = lambda: 0
            take_memory(sum(p.nbytes for p in runner.model.parameters()))

        def compile_or_warm_up_model(self) -> None:
            """Nothing is compiled, tuned or captured."""

    return OneRank


@contextlib.contextmanager
def start_engine(setup: Setup, device: Device, config: Any) -> Iterator[Any]:
    """vLLM's engine core in this process, with its one worker on the made-up device; it ends with the process."""
    from vllm.v1.engine.core import EngineCore

    with device:
        yield EngineCore(config, make_executor(setup), log_stats=False)


def find_runner(executor: Any) -> Any:
    """The worker's model runner."""
    return executor.driver_worker.worker.model_runner


def find_model(executor: Any) -> Any:
    """The worker's model."""
    return find_runner(executor).model
