"""GPUs that are made up: ``torch.cuda`` and vLLM's CUDA platform say that one is there. To be called before vLLM is
imported."""

import contextlib
import os
import pathlib
import subprocess
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

from vllm_twotower.planning import gpus as plans


@dataclass(frozen=True)
class Gpu:
    """What vLLM asks a GPU for."""

    capability: tuple[int, int]
    name: str
    memory_bytes: int
    multiprocessors: int


GPUS = {
    "h100": Gpu((9, 0), "NVIDIA H100 80GB HBM3", plans.GPUS["H100"].memory_bytes, 132),
    "h200": Gpu((9, 0), "NVIDIA H200", plans.GPUS["H200"].memory_bytes, 132),
    "b200": Gpu((10, 0), "NVIDIA B200", plans.GPUS["B200"].memory_bytes, 148),
    "a100": Gpu((8, 0), "NVIDIA A100-SXM4-80GB", plans.GPUS["H100"].memory_bytes, 108),
}
"""Memory as ``vllm-twotower inspect`` has it; of an A100 as of an H100, which is sold with as much."""

CUDA_VERSION = "13.0"
"""Of the CUDA that vLLM's wheels are built with."""


class IdleStream:
    """A stream, or an event, on which nothing ever is to be waited for."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "IdleStream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = synchronize = record = wait = wait_stream

    def record_event(self, *_: Any) -> "IdleStream":
        return IdleStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 1.0


_memory = [0, 0]
"""Bytes of the GPU that are free, and all of them."""


def take_memory(num_bytes: int) -> None:
    """So many bytes of the GPU are in use from now on; what a step needs besides weights nobody counts."""
    _memory[0] = max(0, _memory[0] - num_bytes)


class HostGenerator(torch.Generator):
    """A generator of random numbers, wherever it is asked for: nothing is drawn on the device."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls, "cpu")


def load_device_guard(folder: pathlib.Path) -> None:
    """Give torch's CPU build what it lacks to index tensors on a CUDA device; compiled in this folder on first use."""
    source, library = (
        pathlib.Path(__file__).parent / "device_guard.cpp",
        folder / f"device_guard-{torch.__version__}.so",
    )
    if not library.exists():
        torch_folder = pathlib.Path(torch.__file__).parent
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", f"-I{torch_folder}/include", str(source)]
        command += ["-o", str(library), f"-L{torch_folder}/lib", "-lc10"]
        subprocess.run(command, check=True)
    torch.ops.load_library(str(library))


def make_up_torch_cuda(gpu: Gpu, count: int) -> None:
    """Let ``torch.cuda`` and ``torch.accelerator`` speak of ``count`` GPUs of this kind."""
    properties = types.SimpleNamespace(
        major=gpu.capability[0],
        minor=gpu.capability[1],
        name=gpu.name,
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.multiprocessors,
        is_integrated=False,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10,
        shared_memory_per_multiprocessor=228 << 10,
        regs_per_multiprocessor=65536,
        L2_cache_size=50 << 20,
    )
    stream = IdleStream()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_compiled": True,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_device_properties": properties,
        "device_count": count,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "set_stream": None,
        "current_stream": stream,
        "default_stream": stream,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "manual_seed_all": None,
        "_lazy_init": None,
        "memory_stats": {},
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "graph_pool_handle": (0, 1),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.Stream = torch.cuda.Event = IdleStream  # type: ignore[misc,assignment]
    _device_constructors()  # remembers, by what they are now, the functions that take a default
    make_tensor = torch.tensor
    torch.tensor = lambda *args, pin_memory=False, **kwargs: make_tensor(*args, **kwargs)
    torch.Generator = HostGenerator  # type: ignore[misc]
    torch.accelerator.device_index = torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    accelerator = {
        "synchronize": None,
        "empty_cache": None,
        "device_count": count,
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "set_device_index": None,
        "current_device_index": 0,
        "current_stream": stream,
        "set_stream": None,
        "memory_stats": {},
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
    }
    for name, answer in accelerator.items():
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, lambda *_, _answer=answer, **__: _answer)
    _memory[:] = [gpu.memory_bytes, gpu.memory_bytes]
    torch.cuda.mem_get_info = torch.accelerator.get_memory_info = lambda *_: tuple(_memory)  # type: ignore[assignment]
    torch.version.cuda = CUDA_VERSION
    torch.cuda.memory.get_allocator_backend = lambda: "cudaMallocAsync"
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined]


def make_up_platform(gpu: Gpu, count: int) -> None:
    """Make vLLM's platform its CUDA platform with GPUs of this kind."""
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class CudaPlatform(cuda.NonNvmlCudaPlatform):
        """vLLM's, with answers made up."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*gpu.capability)

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return gpu.multiprocessors

        @classmethod
        def device_count(cls) -> int:
            return count

        @classmethod
        def is_integrated_gpu(cls, device_id: int = 0) -> bool:
            return False

    vllm.platforms._current_platform = CudaPlatform()
