"""How a checkpoint can store a matrix: each way's tensors, their shapes and dtypes, and which of them
``quantization_config`` means.

The words are those of compressed-tensors and of ModelOpt, whose layouts these are; vLLM's layers take both. Imports
neither torch nor vLLM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FLOATS = ("BF16", "F16", "F32", "F64")
"""Safetensors' names of the dtypes of what is not quantised."""

SCALES = ("F32", "BF16", "F16")
NVFP4_GROUP = 16
"""Numbers that share a scale in NVFP4."""

ALLOWED = (
    "use FP8 weights per channel or per tensor, INT8 weights with INT8 inputs, or NVFP4 "
    "(compressed-tensors or ModelOpt; `vllm-twotower quantize` writes the first two)"
)


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a checkpoint has to be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    """Safetensors' names of the dtypes that it may have."""
    scheme: str | None = None
    """Name of the scheme that it is a part of; None: it is not quantised."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape will do: ModelOpt writes a single number as [], compressed-tensors as [1]."""
        return shape == self.shape or (self.shape == (1,) and shape == ())


SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "matrix": lambda rows, columns: (rows, columns),
    "nibbles": lambda rows, columns: (rows, columns // 2),
    "group": lambda rows, columns: (rows, columns // NVFP4_GROUP),
    "row": lambda rows, columns: (rows, 1),
    "one": lambda rows, columns: (1,),
}
"""What a tensor has something for: each number of a matrix [N, K], each two, each group, each row, or all of it."""

Part = tuple[str, tuple[str, ...]]
"""Shape of one tensor of a matrix, a key of ``SHAPES``, and its dtypes."""


@dataclass(frozen=True)
class Scheme:
    """One way to store a matrix [N, K]."""

    name: str
    """For people."""
    parts: Mapping[str, Part]
    """The tensors that stand for it, by the last part of their names."""

    def tensors(self, module: str, matrix: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors of one matrix.

        Args:
            module: its name without ``.weight``.
            matrix: [N, K].

        Raises:
            ValueError: the matrix cannot be stored so.

        """
        rows, columns = matrix
        if columns % NVFP4_GROUP and any(shape == "group" for shape, _ in self.parts.values()):
            raise ValueError(f"{module} has {columns} columns, and NVFP4 needs a multiple of {NVFP4_GROUP}: ignore it")
        return {
            f"{module}.{last}": TensorSpec(SHAPES[shape](rows, columns), dtypes, self.name)
            for last, (shape, dtypes) in self.parts.items()
        }


def read_group(where: str, group: Mapping[str, Any], default_format: str | None) -> Scheme:
    """The scheme of one of compressed-tensors' ``config_groups``.

    Raises:
        ValueError: a layout that does not load here, by what the group says of it.

    """
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    how = {key: weights.get(key) for key in ("num_bits", "type", "strategy", "group_size", "symmetric")}
    layout = group.get("format") or default_format
    static = bool(inputs) and inputs.get("dynamic") is False
    kind = (how["num_bits"], how["type"], how["strategy"])
    scheme = None
    if how["symmetric"] is not False and not weights.get("dynamic") and not group.get("output_activations"):
        if kind in ((8, "float", "channel"), (8, "float", "tensor")) and layout in ("float-quantized", None):
            scheme = _eight_bits("FP8", "F8_E4M3", kind[2], static)
        elif kind in ((8, "int", "channel"), (8, "int", "tensor")) and layout in ("int-quantized", None) and inputs:
            if inputs.get("symmetric") is not False:
                scheme = _eight_bits("INT8", "I8", kind[2], static)
        elif kind == (4, "float", "tensor_group") and how["group_size"] == NVFP4_GROUP:
            scheme = _nvfp4_of_compressed_tensors(with_inputs=bool(inputs))
    if scheme is None:
        told = ", ".join(f"{key}={value!r}" for key, value in how.items() if value is not None)
        raise ValueError(f"{where}: weights of {told} in format {layout!r} do not load here: {ALLOWED}")
    return scheme


def read_algorithm(where: str, algorithm: Any, group_size: Any) -> Scheme:
    """The scheme of ModelOpt's ``quant_algo``.

    Raises:
        ValueError: a layout that does not load here, by name.

    """
    if algorithm == "FP8":
        return _eight_bits("FP8", "F8_E4M3", "tensor", static_inputs=True)
    if algorithm == "NVFP4" and group_size in (None, NVFP4_GROUP):
        parts = {
            "weight": ("nibbles", ("U8",)),
            "weight_scale": ("group", ("F8_E4M3",)),
            "weight_scale_2": ("one", SCALES),
            "input_scale": ("one", SCALES),
        }
        return Scheme("NVFP4 (ModelOpt)", parts)
    size = f" with group_size={group_size!r}" if group_size is not None else ""
    raise ValueError(f"{where}: quant_algo={algorithm!r}{size} does not load here: {ALLOWED}")


def _eight_bits(name: str, dtype: str, strategy: str, static_inputs: bool) -> Scheme:
    per_channel = strategy == "channel"
    parts: dict[str, Part] = {
        "weight": ("matrix", (dtype,)),
        "weight_scale": ("row" if per_channel else "one", SCALES),
    }
    if static_inputs:
        parts["input_scale"] = ("one", SCALES)
    inputs = "static" if static_inputs else "dynamic"
    return Scheme(f"{name} per {'channel' if per_channel else 'tensor'}, {inputs} inputs", parts)


def _nvfp4_of_compressed_tensors(with_inputs: bool) -> Scheme:
    parts: dict[str, Part] = {
        "weight_packed": ("nibbles", ("U8",)),
        "weight_scale": ("group", ("F8_E4M3",)),
        "weight_global_scale": ("one", SCALES),
    }
    if with_inputs:
        parts["input_global_scale"] = ("one", SCALES)
    return Scheme("NVFP4" if with_inputs else "NVFP4, inputs not quantised", parts)
