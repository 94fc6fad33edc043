"""The device: what is on it is a fake tensor, what is on the host is real, and everything between them is noted down.

Values on the device are not known. What the host reads of them is zeros, unless it is what the host has sent there
itself and nothing has written since.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

COPIES = {"_to_copy", "copy_", "_copy_from"}
MAKES_NO_KERNEL = frozenset(
    (
        "view",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "transpose",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
        "_unsafe_view",
        "as_strided",
        "permute",
        "detach",
        "detach_",
        "alias",
        "unbind",
        "empty",
        "empty_like",
        "new_empty",
        "lift_fresh",
        "reshape",
        "empty_strided",
        "narrow",
        "chunk",
        "empty_permuted",
        "unfold",
        "diagonal",
        "set_",
        "new_empty_strided",
        "view_as_real",
        "_reshape_alias",
        "is_pinned",
        "record_stream",
    )
)
"""Operators that look at a tensor in another way, or take memory."""


READS_HOST = ("get_cuda_view_from_cpu_tensor",)
"""Operators that are about memory of the host that the device can read."""

HELPERS = ("/vllm_twotower/runtime/host_copies.py",)
"""Files of this package that copy for others: a transfer is named by who asked for it."""


@dataclass(frozen=True)
class Launch:
    """What would run on the device: a torch operator, an operator of vLLM's libraries, or a Triton kernel."""

    source: str
    """``torch``, the operator's namespace, or ``triton``."""
    name: str
    scope: str
    """Which part of the model it belongs to."""
    arguments: dict[str, Any]
    """Of a Triton kernel, its arguments by name; otherwise empty."""
    kernel: Any = None
    """The Triton kernel."""
    off_device: tuple[str, ...] = ()
    """Tensors among the arguments that are not on the device."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of a Triton kernel, what its compiler is told."""


@dataclass(frozen=True)
class Transfer:
    """Data that goes between host and device."""

    to_device: bool
    blocking: bool
    where: str
    """The innermost line of this project's, or else of vLLM's."""


@dataclass
class Record:
    """What happened on the device."""

    launches: list[Launch] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    scope: str = ""


class Device(TorchDispatchMode):
    """The made-up device; active in the body of a ``with``.

    Attributes:
        record: of what happens, if anybody wants it.

    """

    def __init__(self) -> None:
        super().__init__()
        FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment,method-assign]
        # torch.tensor makes its tensor on the host and sends it, in two steps that are seen
        torch._C._set_only_lift_cpu_tensors(True)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.record: Record | None = None
        self.functions: dict[str, Callable[..., Any]] = {}
        """By an operator's name, the Python that it is: what vLLM wraps as one operator to hide it from a compiler."""
        self._sent = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # what a tensor is, not what it holds
            return func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        # in inference mode an operator arrives before it is taken apart into those that run
        with self:
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        to = kwargs.get("device")
        wants_device = to is not None and torch.device(to).type == "cuda"
        on_device = any(t.device.type == "cuda" for t in tensors)
        name = func.name().split("::")[1].split(".")[0]
        if name in ("is_pinned", "_pin_memory", "pin_memory"):
            return tensors[0] if name != "is_pinned" else True
        if not on_device and not wants_device and func.namespace != "_C":
            return func(*args, **kwargs)
        if (inside := self.functions.get(func.name())) is not None:
            with self:
                return inside(*args, **kwargs)
        if name == "_local_scalar_dense":
            self._note(False, True)
            return 0 if not tensors[0].dtype.is_floating_point else 0.0
        if name in COPIES and (result := self._copy(name, func, args, kwargs, tensors)) is not NotImplemented:
            return result
        if func._schema.is_mutable:
            self.forget(tensors)
        if name == "__lshift__" and args[0].dtype == torch.bool:
            # a shape function of torch's refuses what its kernels promote
            with self.fake:
                args = (torch.empty_like(args[0], dtype=torch.int64), *args[1:])
        with self.fake:
            out = func(*args, **kwargs)
        if name == "nonzero":
            self._note(False, True)
        self._note_launch(func, name, tensors)
        return out

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """A copy between host and device."""
        if name == "copy_":
            target, source = args[0], args[1]
            if target.device == source.device:
                return NotImplemented
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            to_device = target.device.type == "cuda"
            self.forget([target])
            self._note(to_device, blocking)
            if not to_device and (known := self._sent.get(source)) is not None:
                target.copy_(known)
            return target
        source = tensors[0]
        to = kwargs.get("device")
        if to is None or torch.device(to).type == source.device.type:
            return NotImplemented
        if torch.device(to).type == "meta":
            return torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        to_device, blocking = torch.device(to).type == "cuda", not kwargs.get("non_blocking", False)
        self._note(to_device, blocking)
        dtype = kwargs.get("dtype") or source.dtype
        if to_device:
            with self.fake:
                out = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device="cuda")
            if source.numel() <= 4096:
                self._sent[out] = source.to(dtype, copy=True)
            return out
        known = self._sent.get(source)
        return known.to(dtype, copy=True) if known is not None else torch.zeros(source.shape, dtype=dtype)

    def set_known(self, tensor: torch.Tensor, value: int) -> None:
        """The host will read this value from all of a tensor on the device."""
        self._sent[tensor] = torch.full(tuple(tensor.shape), value, dtype=tensor.dtype)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Something may have been written to these."""
        for tensor in tensors:
            self._sent.pop(tensor, None)

    def _note(self, to_device: bool, blocking: bool) -> None:
        if self.record is not None:
            self.record.transfers.append(Transfer(to_device, blocking, find_line()))

    def _note_launch(self, func: Any, name: str, tensors: list[torch.Tensor]) -> None:
        if self.record is None or name in MAKES_NO_KERNEL:
            return
        source = "torch" if func.namespace == "aten" else func.namespace
        # torch takes numbers as tensors without dimensions
        off = [str(tuple(t.shape)) for t in tensors if t.device.type != "cuda" and t.dim() and name not in READS_HOST]
        self.record.launches.append(Launch(source, name, self.record.scope, {}, off_device=tuple(off)))

    def note_call(self, source: str, name: str) -> None:
        """A kernel that is launched by a function that Python calls."""
        if self.record is not None:
            self.record.launches.append(Launch(source, name, self.record.scope, {}))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """Note down what the body does."""
        self.record = record = Record()
        try:
            yield record
        finally:
            self.record = None


def find_line() -> str:
    """The innermost line of this project's package on the stack, or else of vLLM's."""
    frame, of_vllm = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/vllm_twotower/" in name and not name.endswith(HELPERS):
            return f"vllm_twotower/{name.split('/vllm_twotower/')[-1]}:{frame.f_code.co_name}"
        if "/vllm/" in name and not of_vllm:
            of_vllm = f"vllm/{name.split('/vllm/')[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return of_vllm


def note_triton_launches(device: Device) -> None:
    """Let Triton kernels be noted down, not run."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def take_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.best_config = self.configs[0]
        return self.fn.run(*args, **{**self.configs[0].all_kwargs(), **kwargs})

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        device.forget(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        if self.fn.__name__ == "_get_num_sampled_and_rejected_kernel":  # otherwise a request never gets a token
            device.set_known(arguments["num_sampled_ptr"], 1)
        if device.record is None:
            return
        options = {k: v for k, v in kwargs.items() if k not in names}
        off = [
            f"{name}: {tuple(x.shape)}"
            for name, x in arguments.items()
            if isinstance(x, torch.Tensor) and x.device.type != "cuda"
        ]
        scope = device.record.scope
        device.record.launches.append(Launch("triton", self.fn.__name__, scope, arguments, self, tuple(off), options))

    JITFunction.run = run
    Autotuner.run = take_first


def read_lists(device: Device) -> None:
    """Let ``tolist`` of a tensor on the device be one read, as it is."""

    def tolist(self: FakeTensor) -> Any:
        return self.to("cpu").tolist()

    FakeTensor.tolist = tolist  # type: ignore[method-assign]


def keep_materialised_parameters_fake() -> None:
    """Let parameters that vLLM first makes without memory, where it quantises while it loads, be fake tensors and of
    their class; vLLM gives them their class in place of the tensor's own."""
    from vllm.model_executor.model_loader.reload import meta

    def materialise(meta_tensor: torch.Tensor) -> torch.Tensor:
        shape, stride, dtype = tuple(meta_tensor.shape), meta_tensor.stride(), meta_tensor.dtype
        tensor = torch.empty_strided(shape, stride, dtype=dtype, requires_grad=False)
        kind = type(meta_tensor)
        bases = (kind,) if issubclass(kind, FakeTensor) else (FakeTensor, kind)
        tensor.__class__ = types.new_class(kind.__name__, bases)  # type: ignore[assignment]
        tensor.__dict__.update({k: v for k, v in vars(meta_tensor).items() if k not in vars(tensor)})
        return tensor

    meta.materialize_meta_tensor = materialise


def look_inside_operators(device: Device) -> None:
    """Let the device see what is inside vLLM's operators that are Python; to be called before vLLM's layers are
    imported."""
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    def register_and_remember(op_name: str, op_func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        register(op_name, op_func, *args, **kwargs)
        device.functions[f"vllm::{op_name}"] = op_func

    torch_utils.direct_register_custom_op = register_and_remember
