"""Which matrices of a checkpoint are quantised, and how: ``quantization_config`` of ``config.json``, read as vLLM's
layers read it.

Names are the checkpoint's own throughout: ``models/twotower.py`` has vLLM look its layers up under them too.
``tests/test_stored_quantization.py`` compares with what vLLM builds. Imports neither torch nor vLLM.
"""

import fnmatch
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_twotower.models.stored_schemes import ALLOWED, Scheme, read_algorithm, read_group

WHERE = "config.json, quantization_config"

MODULES_LEFT = ("lm_head", "context_lm_head")
"""Heads, which vLLM would quantise if they were not ignored; of what it never quantises nothing has to be said."""

QKV = re.compile(r"\.[qkv]_proj$")
EXPERT = re.compile(r"(.*\.mixer\.experts)\.\d+\.")


class StoredQuantization(ABC):
    """The quantisation of one checkpoint."""

    @abstractmethod
    def scheme_of(self, module: str) -> Scheme | None:
        """How a matrix is stored; None: not quantised.

        Args:
            module: a linear layer's name in the checkpoint, without ``.weight``.

        """

    @staticmethod
    def read(config: Mapping[str, Any] | None) -> "StoredQuantization | None":
        """Read a ``quantization_config``; None where there is none.

        Raises:
            ValueError: a method, an algorithm or a field that is not handled here, by name.

        """
        if not config:
            return None
        method = str(config.get("quant_method", ""))
        if method == "compressed-tensors":
            _refuse(config, "kv_cache_scheme", "transform_config", "sparsity_config")
            found: StoredQuantization = CompressedTensors(config)
        elif method.startswith("modelopt"):
            found = ModelOpt(config)
        else:
            raise ValueError(f"{WHERE}: quant_method={method!r} does not load here: {ALLOWED}")
        for head in MODULES_LEFT:
            if found.scheme_of(head) is not None:
                raise ValueError(
                    f"{WHERE} does not ignore {head}, and heads are never quantised here: add {head!r} to its list of "
                    "what to ignore"
                )
        return found


class CompressedTensors(StoredQuantization):
    """As llm-compressor writes it: groups with targets and a scheme each, and what to ignore."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.ignore: list[str] = list(config.get("ignore") or [])
        self.schemes: dict[str, Scheme] = {}
        for name, group in (config.get("config_groups") or {}).items():
            scheme = read_group(f"{WHERE}.config_groups.{name}", group, config.get("format"))
            self.schemes.update(dict.fromkeys(group.get("targets") or [], scheme))
        if not self.schemes:
            raise ValueError(f"{WHERE} has no config_groups with targets: write which layers are quantised and how")

    def scheme_of(self, module: str) -> Scheme | None:
        """A target by name or expression goes before ``Linear``, which is every linear layer and no head."""
        if _first_match(module, self.ignore) is not None:
            return None
        target = _first_match(module, list(self.schemes))
        if target is None and "Linear" in self.schemes and module not in MODULES_LEFT:
            target = "Linear"
        return None if target is None else self.schemes[target]


class ModelOpt(StoredQuantization):
    """As NVIDIA's ModelOpt writes it, in ``config.json`` or, before its version 0.31, in ``hf_quant_config.json``: one
    algorithm, and what to leave out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        older = config.get("quantization")
        given = older if isinstance(older, Mapping) else config
        _refuse(given, "kv_cache_scheme", "kv_cache_quant_algo")
        self.scheme = read_algorithm(WHERE, given.get("quant_algo"), given.get("group_size"))
        patterns = given.get("exclude_modules" if given is older else "ignore") or []
        # vLLM cuts a star off so that the rest also matches as a part of a name
        cut = [(p[:-1], p[:-1] + ".*") if re.search(r"[^.]\*$", p) else (p,) for p in patterns]
        self.left_out = [pattern for pair in cut for pattern in pair]

    def scheme_of(self, module: str) -> Scheme | None:
        """The algorithm, unless the layer is left out: by its name, a part of it, or a pattern with stars."""
        layer = QKV.sub(".qkv_proj", module)
        if experts := EXPERT.match(module):
            layer = experts[1]  # one layer of vLLM's, left out as a whole if one expert is
            if any(layer in pattern for pattern in self.left_out):
                return None
        if module in self.left_out:
            return None
        return None if any(p in layer or fnmatch.fnmatch(layer, p) for p in self.left_out) else self.scheme


def _refuse(config: Mapping[str, Any], *fields: str) -> None:
    """Raise for a field that adds tensors of which the denoiser knows nothing."""
    for field in fields:
        if value := config.get(field):
            advice = "set it to null"
            if field.startswith("kv_cache"):
                advice += ", take k_scale and v_scale out of the shards, and use --kv-cache-dtype if you want"
            raise ValueError(f"{WHERE}: {field}={value!r} is not handled for two towers: {advice}")


def _first_match(name: str, targets: Sequence[str]) -> str | None:
    """The first target that is the name, or after ``re:`` an expression that its beginning matches."""
    return next((t for t in targets if t == name or (t.startswith("re:") and _compile(t[3:]).match(name))), None)


_compile = functools.cache(re.compile)
