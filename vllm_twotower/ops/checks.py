"""What every op checks of its arguments, with messages that name the argument, what it is and what is allowed."""

from collections.abc import Sequence

import torch

from vllm_twotower.core import MAX_CANVAS_LENGTH

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDEX = (torch.int64,)


def check_argument(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Refuse a tensor of the wrong shape, dtype or device.

    Args:
        name: of the argument, as the caller wrote it.
        tensor: the argument.
        shape: wanted sizes; a letter stands for any size.
        dtypes: allowed.
        device: wanted, or None.

    Raises:
        ValueError: it is not as wanted.

    """
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    if fits and sizes != shape:
        for size, wanted in zip(sizes, shape, strict=True):  # no generator: this runs a hundred times per pass
            if size != wanted and not isinstance(wanted, str):
                fits = False
    if not fits:
        wanted_sizes = ", ".join(str(w) for w in shape)
        raise ValueError(f"{name} has shape {list(sizes)}, wanted [{wanted_sizes}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, allowed: {', '.join(str(d) for d in dtypes)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {device}, where the other arguments are")


def check_canvas_width(name: str, tensor: torch.Tensor) -> None:
    """Refuse canvases, [R, S, ...], that are wider than any canvas.

    Raises:
        ValueError: names the argument, what it is and what is allowed.

    """
    if not 1 <= tensor.shape[1] <= MAX_CANVAS_LENGTH:
        raise ValueError(f"{name} has {tensor.shape[1]} positions per canvas, allowed: 1 to {MAX_CANVAS_LENGTH}")


def check_unit_strides(**tensors: torch.Tensor) -> None:
    """Refuse tensors whose last dimension does not lie together in memory; kernels read it in vectors.

    Args:
        tensors: by the names the caller wrote.

    Raises:
        ValueError: a last stride is not 1.

    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strides = list(tensor.stride())
            raise ValueError(
                f"{name} has strides {strides}, of which a kernel needs the last to be 1: call .contiguous()"
            )
