"""The kernels as the op tests call them: under Triton's interpreter, or natively where there is a GPU:

    TRITON_INTERPRET=0 python -m pytest tests/test_op_canvas_sample.py tests/test_op_reveal.py ...

Tests make their tensors on the CPU, where the references run. Natively a kernel gets copies on the GPU with the same
strides; what it writes comes back, its arguments included, so a test sees if it wrote what it should only read.
"""

import dataclasses
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_twotower.cpu.library import load_library

NATIVE = os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available()


IN_CPP = pytest.mark.skipif(load_library() is None, reason="no compiler when the package was installed")


def every_form(kernel: Any | None, reference: ModuleType, cpp: ModuleType | None = None) -> pytest.MarkDecorator:
    """Run a test with each form of an op; in C++ where that was built at install."""
    forms = [pytest.param(reference, id="reference")]
    if kernel is not None:
        forms.append(pytest.param(kernel, id="kernel"))
    if cpp is not None:
        forms.append(pytest.param(cpp, id="cpp", marks=IN_CPP))
    return pytest.mark.parametrize("form", forms)


def every_size(*cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Run a test with ``sizes`` that are each of these changes to its usual ones, and named after them."""
    named = [pytest.param(sizes, id=" ".join(f"{k}={v}" for k, v in sizes.items()) or "base") for sizes in cases]
    return pytest.mark.parametrize("sizes", named)


def kernels_of(module: ModuleType, *names: str, device: str | None = "cuda" if NATIVE else None) -> SimpleNamespace:
    """The named kernels of a ``kernel.py``, over copies on a device; as they are where there is none."""
    forms = {name: getattr(module, name) for name in names}
    if device is not None:
        forms = {name: _over_copies(form, device) for name, form in forms.items()}
    return SimpleNamespace(**forms)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def scan_step_by_step(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    a_H: torch.Tensor,
    b_BLGN: torch.Tensor,
    c_BLGN: torch.Tensor,
    state_BHPN: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The recurrence as the Mamba-2 paper writes it, one token at a time, in fp64: y [B, L, H, P] and the state after
    each token. ``dt`` is positive, the skip term is left out."""
    x, dt, a, b, c, h = (t.double() for t in (x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, state_BHPN))
    b, c = (t.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for t in (b, c))
    y, states = [], []
    for t in range(x.shape[1]):
        h = torch.exp(a * dt[:, t])[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        y.append((h * c[:, t, :, None]).sum(-1))
        states.append(h)
    return torch.stack(y, dim=1), states


def _over_copies(form: Callable[..., Any], device: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def there(tensor: torch.Tensor) -> torch.Tensor:
            copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)
            pairs.append((tensor, copy))
            return copy

        moved_args, moved_kwargs = _each_tensor((args, kwargs), there)
        result = _each_tensor(form(*moved_args, **moved_kwargs), lambda tensor: tensor.cpu())
        for tensor, copy in pairs:
            tensor.copy_(copy)
        return result

    return run


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nest of tuples, dicts and dataclasses with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each_tensor(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _each_tensor(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: _each_tensor(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value
