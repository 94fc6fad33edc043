"""Checks of a checkpoint folder before anything is started: ``config.json`` and the headers of its shards.

vLLM would find most of this too, but after seconds or minutes, in a worker, and without the name of the file. Reads
nothing but JSON; a checkpoint that is not a folder on this machine is left to vLLM.
"""

import json
import pathlib
from typing import Any

from vllm_twotower.models.tensor_shapes import check_scales, checkpoint_tensors
from vllm_twotower.planning.checkpoint_folder import CheckpointFolder
from vllm_twotower.planning.model_facts import ARCHITECTURE, ModelFacts

LOADED_FROM_SHARDS = ("auto", "hf", "safetensors")
"""Values of ``--load-format`` that read the shards."""


def check_checkpoint(engine_args: Any) -> None:
    """Refuse a two-tower folder whose config or shards cannot be right.

    Args:
        engine_args: vLLM's ``EngineArgs``.

    Raises:
        ValueError: names the file, and the field or the tensor, and says what is allowed.

    """
    path = pathlib.Path(engine_args.model)
    if not _is_two_tower_folder(path) or engine_args.hf_overrides:
        return
    folder = CheckpointFolder.read(path)
    facts = ModelFacts.from_config(folder.config, str(folder.config_file))
    if engine_args.load_format not in LOADED_FROM_SHARDS:
        return
    if engine_args.quantization is not None and facts.quantization_config is None:
        return
    expected = checkpoint_tensors(facts)
    folder.check_tensors(expected)
    check_scales(folder.tensors or {}, expected)


def _is_two_tower_folder(path: pathlib.Path) -> bool:
    """Whether a folder's ``config.json`` says so; what cannot be read is left to vLLM, it may be anybody's."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architectures") == [ARCHITECTURE]
